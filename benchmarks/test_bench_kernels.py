"""The kernels under pytest-benchmark: pytest benchmarks/test_bench_kernels.py (not in the default suite)."""

import pytest
import torch

from benchmarks.kernels import LAYERS, dense_calls, pack, random_weight
from rmtkern.layouts import cpu


@pytest.fixture(autouse=True)
def one_thread():
    """All timings here are on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("layout", "sparsity"), [("bitmask", 0.5), ("bitmask", 0.7), ("bitmask", 0.9), ("nofm", 0.5)])
@pytest.mark.parametrize("tokens", [1, 197])
@pytest.mark.parametrize("layer", ["vit_b.fc1", "vit_b.fc2"])
def test_sparse(benchmark, layer, tokens, layout, sparsity):
    """A packed layer, checked against the dense one."""
    n_rows, n_cols = LAYERS[layer]
    weight, bias, x = random_weight(n_rows, n_cols, layout, sparsity), torch.randn(n_rows), torch.randn(tokens, n_cols)
    packed = pack(layout, weight)
    got = benchmark(cpu.linear, x, packed, bias, None, None)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["dense torch", "dense onednn", "dense onednn prepacked"])
@pytest.mark.parametrize("tokens", [1, 197])
@pytest.mark.parametrize("layer", ["vit_b.fc1", "vit_b.fc2"])
def test_dense(benchmark, layer, tokens, form):
    """The dense forms, for the ratio."""
    n_rows, n_cols = LAYERS[layer]
    weight, bias, x = torch.randn(n_rows, n_cols), torch.randn(n_rows), torch.randn(tokens, n_cols)
    with torch.no_grad():
        calls = dense_calls(x, weight, bias, None)
        if form not in calls:
            pytest.skip("this torch has no oneDNN")
        benchmark(calls[form])
