"""dense in NumPy float64: y = activation(x Wᵀ + bias) + residual from the definition."""

import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import finish

__all__ = ["linear", "supports"]


def supports(w: PackedWeight, x: Tensor) -> str | None:
    """Why the reference cannot compute this, or None if it can: it needs tensors on the CPU."""
    return None if x.device.type == "cpu" else f"device {x.device}; the reference runs on the cpu"


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(x Wᵀ + bias) + residual in float64.

    Args:
        x: [T, K], any float dtype.
        w: packed [N, K].
        bias: [N] or None.
        activation: see layouts/reference.py.
        residual: [T, N] or None.

    Returns:
        [T, N] in the dtype of x, rounded once.
    """

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    b, r = wide(bias), wide(residual)
    y = x.detach().double().numpy() @ w.tensors()[0].detach().double().numpy().T
    out = finish(y, None if b is None else b.numpy(), activation, None if r is None else r.numpy())
    return torch.from_numpy(out).to(x.dtype)
