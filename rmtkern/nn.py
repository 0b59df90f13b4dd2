"""PackedLinear: the inference-only module that holds a packed weight and calls its kernel.

It decides nothing about speed; packing.py chooses what goes in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.errors import PackedModelError
from rmtkern.layouts.base import PackedWeight
from rmtkern.ops import ACTIVATIONS, linear, load_kernels

__all__ = ["AbsorbedActivation", "PackedLinear"]

_ADVICE = "call rmtkern.unpack_(model) first, train, then pack_ again"


@torch.library.custom_op("rmtkern::refuse_backward", mutates_args=())
def _refuse(grad: Tensor) -> Tensor:
    raise PackedModelError(f"a packed model has no backward pass; {_ADVICE}")


@_refuse.register_fake
def _(grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


class _Inference(torch.autograd.Function):
    """Passes y on, with a backward that refuses: as an op, so that torch.compile can trace it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _refuse(grad).sum()


_anchor = torch.zeros((), requires_grad=True)  # makes an output require grad, as the nn.Linear's would


class PackedLinear(nn.Module):
    """y = activation(x Wᵀ + b) with a packed W, for inference.

    state_dict keys: `weight.<part>` for each part of the layout, `bias`, and `others.<i>.<part>` if the module holds
    more than one form of the weight.

    Args:
        weight: packed [N, K].
        bias: [N] or None.
        activation: None or a name in `ops.ACTIVATIONS`, applied in the kernel.
        others: token count -> another form of the same weight, used where that count is the nearest to a call's;
            `tokens` must then say for which count `weight` was chosen.
        tokens: token count of `weight`.
        requires_grad: whether the (weight, bias) that `unpack_` gives back require grad.

    Raises:
        TypeError: `weight` is not a PackedWeight.
        ValueError: a shape does not match, or the activation is unknown.
    """

    bias: Tensor | None
    others: nn.ModuleList | tuple[()]

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        others: Mapping[int, PackedWeight] | None = None,
        tokens: int = 1,
        requires_grad: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        forms = (weight, *(others or {}).values())
        for form in forms:
            if not isinstance(form, PackedWeight):
                raise TypeError(f"weight: expected a PackedWeight, got {type(form).__name__}; use BitmaskWeight.pack")
            if form.shape != weight.shape:
                raise ValueError(f"others: expected shape {weight.shape}, got {form.shape}")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; valid: {', '.join(map(str, ACTIVATIONS))}")
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.activation = activation
        self.requires_grad = requires_grad
        self.tokens = (tokens, *(others or {}))
        self.others = nn.ModuleList(forms[1:]) if others else ()
        for form in forms:
            load_kernels(form.layout)
        self.eval()

    def form(self, tokens: int) -> PackedWeight:
        """The form of the weight for this many tokens: that of the nearest measured count, the smaller of two."""
        if len(self.tokens) == 1:
            return self.weight
        best = 0
        for i, measured in enumerate(self.tokens):
            if abs(measured - tokens) < abs(self.tokens[best] - tokens):
                best = i
        return (self.weight, *self.others)[best]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the packed weight.

        Args:
            x: [..., K], dtype and device of the weight.

        Returns:
            [..., N].

        Raises:
            PackedModelError: the module is in train mode; a backward through the result raises it as well.
            KernelUnavailable: no kernel supports this call, such as after `.to(torch.float64)`.
        """
        if self.training:
            raise PackedModelError(f"a packed model cannot train; call eval(), or {_ADVICE}")
        weight = self.weight if len(self.tokens) == 1 else self.form(x.numel() // self.in_features)
        y = linear(x, weight, self.bias, activation=self.activation)
        if torch.is_grad_enabled() and (x.requires_grad or any(self.requires_grad)):
            return _Inference.apply(y, _anchor)
        return y

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        load_kernels(self.weight.layout)

    def extra_repr(self) -> str:
        """Shape, bias, activation and the layouts held."""
        layouts = ", ".join(f.layout for f in (self.weight, *self.others))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" activation={self.activation}, layout={layouts}"
        )

    def unpack(self) -> nn.Linear:
        """The plain nn.Linear: weight bit-exact at the packed dtype (-0.0 becomes 0.0), requires_grad as it was."""
        dense: Tensor = self.weight.unpack()
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(dense, requires_grad=self.requires_grad[0])
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone(), requires_grad=self.requires_grad[1])
        return plain.train(self.training)


class AbsorbedActivation(nn.Identity):
    """Stands where an activation was that the PackedLinear before it now applies; keeps it for `unpack_`.

    Args:
        original: the activation module.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
