"""The activations that a kernel can absorb, as PyTorch computes them: name -> function."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

__all__ = ["FUNCTIONS", "apply_activation"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def apply_activation(y: Tensor, name: str | None) -> Tensor:
    """The activation as PyTorch computes it; None leaves `y` alone."""
    return y if name is None else FUNCTIONS[name](y)
