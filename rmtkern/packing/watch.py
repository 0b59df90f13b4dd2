"""Watches one forward pass: which linears run on how many tokens, who else reads their weights, what follows them.

It also knows which linears must stay as they are. It measures no time and packs nothing.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

from rmtkern.activations import FUNCTIONS

__all__ = ["DESCRIPTIVE", "Seen", "is_altered", "reason_to_leave", "watch"]

DESCRIPTIVE = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "requires_grad",
    "is_cuda",
    "size",
    "dim",
    "numel",
    "is_floating_point",
)
"""What code may ask of a weight that is not there as a tensor."""
_DESCRIBING = [getattr(Tensor, name) for name in DESCRIPTIVE]
_DESCRIBING = [
    member if callable(member) else member.__get__ for member in _DESCRIBING
]  # as __torch_function__ gets it

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Seen:
    """What a forward pass showed of one linear.

    Args:
        tokens: T of every call, and of every F.linear that other code makes with the weight.
        lent: whether other code reads the weight or the bias; it then asks the weight for what `DESCRIPTIVE` names, or
            gives it to F.linear, and does nothing else with it.
        reason: why the linear must stay as it is, or None.
        follower: name of the activation module that alone consumes the linear's output, or None.
        activation: its name in `ops.ACTIVATIONS`, or None.
    """

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    follower: str | None = None
    activation: str | None = None
    lent: bool = False


def is_altered(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced forward, which a swap would lose."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def reason_to_leave(model: nn.Module, name: str, module: nn.Linear, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why this linear cannot be swapped at all, or None.

    Args:
        model: the whole model.
        name: of the linear in it.
        module: the linear.
        dtypes: that kernels take where the model is.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    weight = module.weight
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight directly and never calls the linear"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, whose forward may differ from nn.Linear's"
    if is_altered(module):
        return "it has hooks or a replaced forward, which a swap would lose"
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    if len(names) > 1:
        return f"the module is shared under the names {', '.join(names)}"
    sharers = [
        f"{n}.{key}"
        for n, m in model.named_modules()
        for key, value in m._parameters.items()
        if value is not None and m is not module and (value is weight or value is module.bias)
    ]
    if sharers:
        return f"its parameter is tied to {', '.join(sharers)}"
    if weight.dtype not in dtypes or (module.bias is not None and module.bias.dtype != weight.dtype):
        held = " and ".join(map(str, dtypes))
        return f"dtype {weight.dtype}; the layouts hold {held} here: call model.float() to pack it"
    if 0 in weight.shape:
        return "the weight is empty"
    return None


@contextmanager
def watch(model: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Seen]]:
    """Watch the forward passes inside the block; the result is complete when it ends.

    While it lasts, the class of each watched module is a subclass that notes what happens: unlike a hook, this leaves
    the fast paths of PyTorch and timm as they are, and it sees others read `.weight`.

    Args:
        model: what will run.
        linears: name -> linear to watch.
    """
    record = _Record({name: Seen() for name in linears})
    originals: list[tuple[nn.Module, type]] = []
    leaves = _leaves(model)
    try:
        for name, module in {**linears, **leaves}.items():
            originals.append((module, type(module)))
            kind = _watched_linear if name in linears else _watched_leaf
            module.__class__ = kind(type(module), name, record)
        yield record.seen
    finally:
        for module, original in originals:
            module.__class__ = original
            vars(module).pop("_rmtkern_inside", None)
    record.finish(leaves)


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may be activations: reached by one name, without state, children or hooks."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        bare = not module._parameters and not module._buffers and not module._modules
        if bare and name and not is_altered(module):
            found.setdefault(id(module), []).append(name)
    return {names[0]: model.get_submodule(names[0]) for names in found.values() if len(names) == 1}


class _Record:
    """The events of the forward passes, in order."""

    def __init__(self, seen: dict[str, Seen]) -> None:
        self.seen = seen
        self.loans: list[_Loan] = []
        self.followers: dict[str, list[str | None]] = {name: [] for name in seen}
        self.calls: dict[str, int] = {}
        self.made: tuple[str, weakref.ref[Tensor]] | None = None  # the last linear and its output
        self.gone: tuple[str, weakref.ref[Tensor]] | None = None  # the last output that a follower took

    def linear(self, name: str, x: Tensor, y: Tensor) -> None:
        self.multiply(name, x)
        self.made = (name, weakref.ref(y))

    def multiply(self, name: str, x: Tensor) -> None:
        self.settle()
        self.seen[name].tokens.append(x.numel() // max(x.shape[-1], 1))
        self.followers[name].append(None)
        self.made = None

    def read(self, name: str, key: str, value: Tensor | None) -> Tensor | None:
        """What other code gets that reads the weight or the bias of a linear."""
        self.seen[name].lent = True
        if key == "bias" or value is None:  # a packed linear has the same one
            return value
        tensor = value.detach().as_subclass(_LentTensor)
        tensor.loan = _Loan(name, value, self, weakref.ref(tensor))
        self.loans.append(tensor.loan)
        return tensor

    def keep(self, name: str, key: str, more: str) -> None:
        """Leave a linear as it is, for what other code does."""
        self.seen[name].reason = f"other code reads its .{key} besides its own forward{more}"

    def leaf(self, name: str, x: Any) -> None:
        self.settle()
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.made is not None and self.made[1]() is x:
            self.followers[self.made[0]][-1] = name
            self.gone = self.made
        self.made = None

    def settle(self) -> None:
        """An output that outlived its follower has another reader: then nothing may be absorbed."""
        if self.gone is not None and self.gone[1]() is not None:
            self.followers[self.gone[0]][-1] = None
        self.gone = None

    def finish(self, leaves: Mapping[str, nn.Module]) -> None:
        self.settle()
        for loan in self.loans:
            if (kept := loan.tensor()) is not None:
                kept.__class__ = Tensor  # type: ignore[assignment]
                self.keep(loan.name, "weight", " and keeps it")
        for name, seen in self.seen.items():
            if seen.reason is None and not seen.tokens:
                seen.reason = "the model never calls it on the example"
            if seen.reason is None and 0 in seen.tokens:
                seen.reason = "the example gives it no tokens; pass a batch of at least one"
            followers = set(self.followers[name])
            follower = followers.pop() if len(followers) == 1 else None
            sibling = follower is not None and follower.rpartition(".")[0] == name.rpartition(".")[0]
            if follower is not None and sibling and self.calls[follower] == len(seen.tokens):
                seen.activation = _activation(leaves[follower])
                seen.follower = follower if seen.activation is not None else None


class _LentTensor(Tensor):
    """A watched linear's weight in other code; it computes everything and notes what is not F.linear."""

    loan: "_Loan"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lent = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, _LentTensor)]
        plain, named = pytree.tree_map(lambda v: v.loan.weight if isinstance(v, _LentTensor) else v, (args, kwargs))
        y = func(*plain, **named)
        if func in _DESCRIBING:
            return y
        if func is F.linear:
            x, reason = _factor(*args, **kwargs)
        else:
            x, reason = None, f" and gives it to {resolve_name(func) or func}"
        for loan in (tensor.loan for tensor in lent):
            if x is None:
                loan.record.keep(loan.name, "weight", reason)
            else:
                loan.record.multiply(loan.name, x)
        return y


@dataclass
class _Loan:
    """One time that other code read a linear's weight."""

    name: str
    weight: Tensor
    record: _Record
    tensor: weakref.ref[_LentTensor]


def _factor(input: Any, weight: Any, bias: Any = None) -> tuple[Tensor | None, str]:
    """What F.linear multiplies a lent weight with; None and the reason, if that is more than a packed weight can do."""
    if not isinstance(weight, _LentTensor) or isinstance(input, _LentTensor) or isinstance(bias, _LentTensor):
        return None, " and gives it to F.linear as its input or bias"
    shape, dtype = weight.loan.weight.shape, weight.loan.weight.dtype
    if input.dtype != dtype or (bias is not None and (bias.dtype != dtype or bias.shape != shape[:1])):
        return None, f" and calls F.linear with another dtype than {dtype} or a bias that is not [{shape[0]}]"
    return input, ""


def _watched_leaf(base: type, name: str, record: _Record) -> type:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record.leaf(name, _first(args, kwargs))
        return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(base.__name__, (base,), {"forward": forward})


def _watched_linear(base: type, name: str, record: _Record) -> type:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        vars(self)["_rmtkern_inside"] = True
        try:
            y = base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            vars(self)["_rmtkern_inside"] = False
        record.linear(name, _first(args, kwargs), y)
        return y

    def read(self: nn.Module, key: str) -> Any:
        value = base.__getattr__(self, key)  # type: ignore[attr-defined]
        if key in ("weight", "bias") and not vars(self).get("_rmtkern_inside", False):
            return record.read(name, key, value)
        return value

    return type(base.__name__, (base,), {"forward": forward, "__getattr__": read})


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _activation(module: nn.Module) -> str | None:
    """The name in `ops.ACTIVATIONS` of what this module computes, found by trying it; None if it is none of them."""
    x = torch.linspace(-8, 8, 1001)
    with torch.no_grad():
        y = module(x.clone())
    for name, function in FUNCTIONS.items():
        # float32 rounding of different formulas of one function; "gelu" and "gelu_tanh" are 4e-4 apart
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, function(x), rtol=1e-6, atol=2e-6):
            return name
    return None
