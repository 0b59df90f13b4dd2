"""Products x Wᵀ by the faster of the two libraries of a PyTorch for CPUs: MKL is not at its best on AMD."""

import functools

import torch
from torch import Tensor

from rmtkern.environment import cpu_model

__all__ = ["product"]


def product(x: Tensor, w: Tensor) -> Tensor:
    """The product x wᵀ, [T, N]: in float32 on an AMD CPU by oneDNN, else as PyTorch computes it; no gradients.

    Args:
        x: [T, K].
        w: [N, K], in the dtype of x; contiguous, or it is copied where oneDNN takes it.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and _onednn():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), w.contiguous(), None, "none", [], "")
    return x @ w.t()


@functools.cache
def _onednn() -> bool:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and "AMD" in cpu_model()
