"""The epilogue of the NumPy float64 references, from its definition. It knows no layout and no kernel."""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["finish"]

_erfc = np.frompyfunc(math.erfc, 1, 1)


def finish(
    y: NDArray[np.float64],
    bias: NDArray[np.float64] | None,
    activation: str | None,
    residual: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """activation(y + bias) + residual.

    Args:
        y: [T, N] float64, x Wᵀ.
        bias: [N] or None.
        activation: None, "gelu" (x Phi(x)), "gelu_tanh", "relu" or "silu".
        residual: [T, N] or None.

    Returns:
        [T, N] float64.

    Raises:
        ValueError: an unknown activation.
    """
    if bias is not None:
        y = y + bias
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
        return y if residual is None else y + residual
