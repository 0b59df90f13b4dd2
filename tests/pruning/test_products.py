"""Products x wᵀ by either library: as accurate as PyTorch's own, whatever the strides, and empty ones too."""

import pytest
import torch

from rmtkern.pruning import products
from rmtkern.pruning.products import product
from rmtkern.testing import assert_as_accurate_as_dense


@pytest.mark.parametrize("onednn", [False, True])
def test_products(onednn, monkeypatch):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_onednn", lambda: onednn)
    x, w = torch.randn(33, 70), torch.randn(45, 70)
    for left, right in ((x, w), (x.t().contiguous().t(), w.t().contiguous().t())):
        assert_as_accurate_as_dense(product(left, right), x, w)
    assert torch.equal(product(x.double(), w.double()), x.double() @ w.double().t())
    assert product(x[:0], w).shape == (0, 45) and product(x, w[:0]).shape == (33, 0)
