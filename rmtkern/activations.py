"""The activations that a kernel can absorb, as PyTorch computes them and their gradients: name -> function."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FUNCTIONS", "GRADIENTS", "apply_activation"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "silu": torch.ops.aten.silu_backward,
}
"""Name -> function(gradient of the result, argument) -> gradient of the argument."""


def apply_activation(y: Tensor, name: str | None) -> Tensor:
    """The activation as PyTorch computes it; None leaves `y` alone."""
    return y if name is None else FUNCTIONS[name](y)
