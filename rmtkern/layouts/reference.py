"""What the NumPy float64 references share: the call and the epilogue, from its definition. It knows no layout."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmtkern.layouts.base import PackedWeight

__all__ = ["finish", "reference_linear", "supports"]

Float = NDArray[np.float64]
Linear = Callable[..., Tensor]

_erfc = np.frompyfunc(math.erfc, 1, 1)


def finish(
    y: Float,
    bias: Float | None,
    activation: str | None,
    scale: Float | None,
    residual: Float | None,
    gated: int = 0,
) -> Float:
    """activation(y + bias) * scale + residual, or with a gate-up pair activation(gate) * up * scale + residual.

    Args:
        y: [T, N] float64, x Wᵀ.
        bias: [N] or None.
        activation: None, "gelu" (x Phi(x)), "gelu_tanh", "relu" or "silu".
        scale: [N] ([F] if gated) or None.
        residual: [T, N] ([T, F] if gated) or None.
        gated: F > 0 if the columns of y + bias are 8 of the gate, the same 8 of the up, and so on; else 0.

    Returns:
        [T, N] ([T, F] if gated) float64.

    Raises:
        ValueError: an unknown activation.
    """
    if bias is not None:
        y = y + bias
    up = None
    if gated:
        chunks = y.reshape(len(y), -1, 2, 8)
        y, up = (chunks[:, :, part].reshape(len(y), -1)[:, :gated] for part in range(2))
    with np.errstate(over="ignore", invalid="ignore"):
        if activation == "gelu":
            y = y * 0.5 * np.asarray(_erfc(-y / math.sqrt(2)), dtype=np.float64)
        elif activation == "gelu_tanh":
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        elif activation == "silu":
            y = y / (1 + np.exp(-y))
        elif activation == "relu":
            y = np.maximum(y, 0)
        elif activation is not None:
            raise ValueError(f"unknown activation {activation!r}; valid: None, gelu, gelu_tanh, relu, silu")
        if up is not None:
            y = y * up
        if scale is not None:
            y = y * scale
        return y if residual is None else y + residual


def supports(w: PackedWeight, x: Tensor) -> str | None:
    """Why a reference cannot compute this, or None if it can: it needs tensors on the CPU."""
    return None if x.device.type == "cpu" else f"device {x.device}; the reference runs on the cpu"


def reference_linear(product: Callable[[Float, PackedWeight], Float]) -> Linear:
    """The `linear` of a reference from its product x Wᵀ.

    Args:
        product: (x [T, K], w) -> x Wᵀ [T, N], float64; an entry that is not stored multiplies nothing, not even Inf.

    Returns:
        linear(x [T, K] of any float dtype, w, bias [N] or None, activation, residual [T, N] or None, scale [N] or None,
        gated 0 or F) -> [T, N], or [T, F] of a gate-up pair, in the dtype of x, rounded once.
    """

    def wide(tensor: Tensor | None) -> Float | None:
        return None if tensor is None else tensor.detach().double().numpy()

    def linear(
        x: Tensor,
        w: PackedWeight,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        scale: Tensor | None = None,
        gated: int = 0,
    ) -> Tensor:
        with np.errstate(invalid="ignore"):
            y = product(x.detach().double().numpy(), w)
        y = finish(y, wide(bias), activation, wide(scale), wide(residual), gated)
        return torch.from_numpy(np.ascontiguousarray(y)).to(x.dtype)

    return linear
