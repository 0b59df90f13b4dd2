"""LendingLinear: a packed linear whose weight other code reads, as in F.linear(x, linear.weight, bias).

Attention with biases of its own for q and v does that. What such code gets is no tensor: it says what the weight is
(its shape, dtype, device), F.linear runs the packed kernel with it, and everything else refuses it, also a part of it.
watch.py says who uses a weight in no other way.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.errors import PackedModelError
from rmtkern.nn import PackedLinear, check_inference, in_autocast, is_autocast, refuse_gradient
from rmtkern.ops import linear

__all__ = ["LendingLinear", "LentWeight"]

_ADVICE = "call rmtkern.unpack_(model), or pack it with an example that makes it do so, and the layer stays dense"


class LentWeight:
    """Stands for a packed weight in other code: `F.linear(x, it, bias)` multiplies with it, and it can be described.

    Args:
        lender: the linear whose weight it stands for.
    """

    is_cuda = property(lambda self: self.device.type == "cuda")
    ndim = 2

    def __init__(self, lender: "LendingLinear") -> None:
        self.lender = lender

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return torch.Size(self.lender.forms[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the packed values."""
        return self.lender.forms[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the packed values."""
        return self.lender.forms[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether the weight does that `unpack` gives back."""
        return self.lender.requires_grad[0]

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As Tensor.dim."""
        return self.ndim

    def numel(self) -> int:
        """As Tensor.numel."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """As Tensor.is_floating_point."""
        return True

    def __getitem__(self, index: object) -> Any:
        raise PackedModelError(f"the model takes a part of a packed weight, which is only whole F.linear's: {_ADVICE}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """F.linear by the packed kernel; PackedModelError for any other function."""
        if func is F.linear:
            return _multiply(*args, **(kwargs or {}))
        raise PackedModelError(f"the model gives a packed weight to {func}, and it can only be F.linear's: {_ADVICE}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the model reads .{name} of a packed weight, which only F.linear can use: {_ADVICE}")


def _multiply(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(weight, LentWeight) or isinstance(input, LentWeight) or isinstance(bias, LentWeight):
        raise PackedModelError(f"the model gives a packed weight to F.linear as its input or bias: {_ADVICE}")
    return weight.lender.multiply(input, bias)


class LendingLinear(PackedLinear):
    """A PackedLinear whose `.weight` other code hands to F.linear; arguments and state_dict as PackedModule has them.

    `forms` has the packed weights; `weight` gives a LentWeight.
    """

    @property
    def weight(self) -> LentWeight:  # type: ignore[override]
        """What stands for the weight in other code."""
        return LentWeight(self)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x Wᵀ + bias, whatever bias and activation the linear itself has.

        Args:
            x: [..., K], dtype and device of the weight, or as PackedModule says in autocast.
            bias: [N] likewise, or None.

        Returns:
            [..., N].

        Raises:
            PackedModelError: the module is in train mode; a backward through the result raises it as well.
            ValueError: a shape or dtype does not match.
            KernelUnavailable: no kernel supports this call.
        """
        check_inference(self)
        if is_autocast(x):
            dtype = self.forms[0].dtype
            return in_autocast(x, dtype, lambda x: self.multiply(x, None if bias is None else bias.to(dtype)))
        y = linear(x, self.form(x.numel() // self.in_features), bias)
        needed = x.requires_grad or self.requires_grad[0] or (bias is not None and bias.requires_grad)
        return refuse_gradient(y) if torch.is_grad_enabled() and needed else y
