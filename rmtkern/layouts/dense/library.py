"""dense by PyTorch's own `F.linear`, whatever library computes it on a device. It decides nothing."""

from torch import Tensor
from torch.nn import functional as F

from rmtkern.activations import apply_activation
from rmtkern.layouts.pairs import CHUNK

__all__ = ["finish", "gate", "library_linear"]


def library_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: int,
) -> Tensor:
    """Apply a weight [N, K]: y = activation(x Wᵀ + bias) * scale + residual; all else as in layouts/cpu.py."""
    y = F.linear(x, weight, bias)
    if gated:
        y = gate(y, activation, gated)
    elif activation in ("gelu", "gelu_tanh"):
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation is not None:
        y = F.relu_(y) if activation == "relu" else F.silu(y, inplace=True)
    return finish(y, scale, residual)


def gate(y: Tensor, activation: str | None, features: int) -> Tensor:
    """The product activation(gate) * up [T, F] of the interleaved pair y [T, N] (pairs.py)."""
    both = y.unflatten(-1, (-1, 2, CHUNK))
    left, right = (both.select(-2, part).flatten(-2)[:, :features] for part in range(2))
    return apply_activation(left, activation) * right


def finish(y: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """In place: y * scale + residual."""
    if scale is not None:
        y = y.mul_(scale)
    return y if residual is None else y.add_(residual)
