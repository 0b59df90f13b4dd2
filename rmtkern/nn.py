"""PackedLinear and PackedGatedLinear: the inference-only modules that hold a packed weight and call its kernel.

They decide nothing about speed; rmtkern.packing chooses what goes in.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from rmtkern.errors import PackedModelError
from rmtkern.layouts.base import CPU_DTYPES, PackedWeight
from rmtkern.layouts.cpu import Norm
from rmtkern.layouts.pairs import rows_of, separate
from rmtkern.mlp import mlp, normed_linear
from rmtkern.ops import ACTIVATIONS, gated_linear, linear, load_kernels

__all__ = [
    "AbsorbedActivation",
    "NotPickled",
    "PackedGatedLinear",
    "PackedLinear",
    "PackedModule",
    "check_inference",
    "in_autocast",
    "is_autocast",
    "packed_mlp",
    "refuse_gradient",
]

_ADVICE = "call rmtkern.unpack_(model) first, train, then pack_ again"
_NO_PICKLE = (
    "a packed model is not pickled, as a pickle runs code when it is read and fits one version: use rmtkern.save(model,"
    " path) and rmtkern.load(path, model), or pickle model.state_dict(); a process that is not forked loads the file"
)


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


def refuse_gradient(y: Tensor) -> Tensor:
    """The same tensor, with a backward that raises PackedModelError."""
    refusing: Tensor = _Inference.apply(y, _anchor)
    return refusing


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x. Where it is off, this costs a fifth of asking for that device."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def in_autocast(x: Tensor, dtype: torch.dtype, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """A result that autocast would compute in its own dtype, computed without it.

    Args:
        x: the input; if it is of a dtype that autocast leaves alone, so is the result.
        dtype: what `compute` takes.
        compute: is called outside of autocast.
    """
    kind = x.device.type
    with torch.autocast(kind, enabled=False):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return compute(x)
        return compute(x.to(dtype)).to(torch.get_autocast_dtype(kind))


def check_inference(module: nn.Module) -> None:
    """Raise PackedModelError for a packed module in train mode."""
    if module.training:
        raise PackedModelError(f"a packed model cannot train; call eval(), or {_ADVICE}")


class NotPickled:
    """Is copied as any object, and refuses pickle with advice."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PackedModelError(_NO_PICKLE)

    def _become(self, state: Any) -> Self:
        if isinstance(self, nn.Module):
            self.__setstate__(state)
        else:
            vars(self).update(state)
        return self

    def __copy__(self) -> Self:
        return type(self).__new__(type(self))._become(self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self).__new__(type(self))  # before its state, which may hold it
        return twin._become(copy.deepcopy(self.__getstate__(), memo))


class PackedModule(NotPickled, nn.Module):
    """What modules with a packed weight share: forms of it by token count, and no training.

    state_dict keys: `weight.<part>` for each part of the layout, `bias`, and `others.<i>.<part>` if the module holds
    more than one form of the weight.

    Args:
        weight: packed [N, K].
        bias: [N] or None.
        activation: None or a name in `ops.ACTIVATIONS`, applied in the kernel.
        others: token count -> another form of the same weight, used where that count is the nearest to a call's;
            `tokens` must then say for which count `weight` was chosen.
        tokens: token count of `weight`.
        requires_grad: whether the weights and biases that `unpack_` gives back require grad.

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
        requires_grad: tuple[bool, ...] = (True, True),
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

    @property
    def forms(self) -> tuple[PackedWeight, ...]:
        """All forms of the weight, in the order of `tokens`."""
        return (self._modules["weight"], *self.others)

    def form(self, tokens: int) -> PackedWeight:
        """The form of the weight for this many tokens: that of the nearest measured count, the smaller of two."""
        if len(self.tokens) == 1:
            return self.forms[0]
        best = 0
        for i, measured in enumerate(self.tokens):
            if abs(measured - tokens) < abs(self.tokens[best] - tokens):
                best = i
        return self.forms[best]

    def _compute(self, x: Tensor, weight: PackedWeight) -> Tensor:
        raise NotImplementedError

    def _dense(self) -> Tensor:
        """The dense weight [N, K], in the dtype that `.to()` asked for last."""
        form = self.forms[0]
        return form.unpack().to(form.wanted or form.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the packed weight.

        Args:
            x: [..., K], dtype and device of the weight. In autocast any dtype that it casts.

        Returns:
            [..., out_features], dtype of x. In autocast: computed in the weight's dtype, returned in that of an
            nn.Linear's result.

        Raises:
            PackedModelError: the module is in train mode; a backward through the result raises it as well.
            KernelUnavailable: no kernel supports this call, such as after `.to(torch.float64)`.
        """
        check_inference(self)
        if is_autocast(x):
            return in_autocast(x, self.forms[0].dtype, lambda x: PackedModule.forward(self, x))
        return self._finish(x, self._compute(x, self._form(x)))

    def _form(self, x: Tensor) -> PackedWeight:
        return self.forms[0] if len(self.tokens) == 1 else self.form(x.numel() // self.in_features)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or any(self.requires_grad)):
            return refuse_gradient(y)
        return y

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for form in self.forms:
            load_kernels(form.layout)

    def extra_repr(self) -> str:
        """Shape, bias, activation and the layouts held."""
        layouts = ", ".join(f.layout for f in self.forms)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" activation={self.activation}, layout={layouts}"
        )


def _plain(weight: Tensor, bias: Tensor | None, requires_grad: tuple[bool, ...], training: bool) -> nn.Linear:
    features, k = weight.shape
    plain = nn.Linear(k, features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=requires_grad[0])
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=requires_grad[1])
    return plain.train(training)


class PackedLinear(PackedModule):
    """y = activation(x Wᵀ + b) with a packed W, for inference; arguments and state_dict as PackedModule has them."""

    norms: tuple[nn.LayerNorm, ...] = ()
    """The LayerNorm before it, if that leaves its rows as they are where `takes` says so; none otherwise."""

    def _compute(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return linear(x, weight, self.bias, activation=self.activation)

    def takes(self, x: Tensor) -> bool:
        """Whether it normalises x [..., K] on its way into the kernel. The LayerNorm asks the same for the same x."""
        if not self.norms or not x.is_cpu or x.dtype not in CPU_DTYPES or is_autocast(x):
            return False
        rows = [row for row in (self.norms[0].weight, self.norms[0].bias) if row is not None]
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(row.requires_grad for row in rows))
        return not wanted and all(row.dtype == x.dtype and row.is_cpu for row in rows)

    @property
    def norm(self) -> Norm:
        """What the kernel takes of `norms`."""
        return self.norms[0].weight, self.norms[0].bias, self.norms[0].eps

    def forward(self, x: Tensor) -> Tensor:
        """As PackedModule says; x is not normalised yet where `takes` says so."""
        if not self.takes(x):
            return super().forward(x)
        check_inference(self)
        y = normed_linear(x, self._form(x), self.bias, norm=self.norm, activation=self.activation)
        return self._finish(x, y)

    def unpack(self) -> nn.Linear:
        """The plain nn.Linear: weight bit-exact at the packed dtype (-0.0 becomes 0.0), requires_grad as it was."""
        bias = None if self.bias is None else self.bias.clone()
        return _plain(self._dense(), bias, self.requires_grad, self.training)


def packed_mlp(first: PackedLinear, second: PackedLinear, x: Tensor) -> Tensor:
    """second(first(x)) in one kernel, where there is one for both forms at this token count.

    Args:
        first: with the activation between them.
        second: without one.
        x: [..., K], as `first` takes it.

    Returns:
        What the two modules would, up to rounding.

    Raises:
        PackedModelError, KernelUnavailable: as the modules do.
    """
    check_inference(first)
    check_inference(second)
    if second.activation is not None or is_autocast(x):
        y: Tensor = second(first(x))
        return y
    tokens = x.numel() // first.in_features
    y = mlp(
        x,
        first.form(tokens),
        second.form(tokens),
        first_bias=first.bias,
        second_bias=second.bias,
        activation=first.activation,
        norm=first.norm if first.takes(x) else None,
    )
    if torch.is_grad_enabled() and (x.requires_grad or any((*first.requires_grad, *second.requires_grad))):
        return refuse_gradient(y)
    return y


class PackedGatedLinear(PackedModule):
    """y = activation(x Wgᵀ + bg) * (x Wuᵀ + bu) with a packed gate-up pair, for inference.

    state_dict keys as PackedModule has them.

    Args:
        weight: packed [N, K], rows as `layouts.pairs.interleave` puts them.
        bias: [N] likewise, or None.
        activation: of the gate: None or a name in `ops.ACTIVATIONS`.
        features: F, the outputs.
        stacked: the pair was one linear [2 F, K], whose first half was "gate" or "up"; None: it was two.
        others: token count -> another form of the same weight, as in PackedModule.
        tokens: token count of `weight`.
        requires_grad: of what `unpack` gives back: (weight, bias) of one linear, or of the gate's and then of the up's.

    Raises:
        TypeError: `weight` is not a PackedWeight.
        ValueError: a shape does not match, or the activation or `stacked` is unknown.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        activation: str | None = "silu",
        *,
        features: int,
        stacked: str | None = None,
        others: Mapping[int, PackedWeight] | None = None,
        tokens: int = 1,
        requires_grad: tuple[bool, ...] = (True, True, True, True),
    ) -> None:
        super().__init__(weight, bias, activation, others=others, tokens=tokens, requires_grad=requires_grad)
        if features < 1 or rows_of(features) != weight.shape[0]:
            raise ValueError(f"features: {features} outputs need {rows_of(features)} rows, got {weight.shape[0]}")
        if stacked not in (None, "gate", "up"):
            raise ValueError(f"stacked: expected None, 'gate' or 'up', got {stacked!r}")
        if len(requires_grad) != (4 if stacked is None else 2):
            raise ValueError(f"requires_grad: expected (weight, bias) of each linear, got {requires_grad}")
        self.out_features = features
        self.stacked = stacked

    def _compute(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return gated_linear(x, weight, self.bias, activation=self.activation, features=self.out_features)

    def extra_repr(self) -> str:
        """Shape, bias, activation, the layouts held and what it was."""
        return f"{super().extra_repr()}, stacked={self.stacked}"

    def unpack(self) -> tuple[nn.Linear, ...]:
        """What was there: (gate, up), or the one linear; exact as `PackedLinear.unpack` is."""
        weights = separate(self._dense(), self.out_features)
        biases = (None, None) if self.bias is None else separate(self.bias, self.out_features)
        if self.stacked is None:
            grads = self.requires_grad[:2], self.requires_grad[2:]
            return tuple(_plain(*part, self.training) for part in zip(weights, biases, grads, strict=True))
        step = 1 if self.stacked == "gate" else -1
        bias = None if self.bias is None else torch.cat(biases[::step])  # type: ignore[arg-type]
        return (_plain(torch.cat(weights[::step]), bias, self.requires_grad, self.training),)


class AbsorbedActivation(nn.Identity):
    """Stands where an activation was that the PackedLinear before it now applies; keeps it for `unpack_`.

    Args:
        original: the activation module.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
