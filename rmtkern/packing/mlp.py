"""Finds modules that compute second(activation(first(x))) and makes them do it in one kernel, and takes that back.

It finds them by trying a copy of a module with random numbers, so it needs to know no model. The linears stay where
they are, with their weights; pack.py decides who gets the kernel.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.activations import apply_activation
from rmtkern.mlp import reason_against
from rmtkern.nn import AbsorbedActivation, PackedLinear, packed_mlp
from rmtkern.packing.gated import part, takes_one
from rmtkern.packing.sites import KernelForward
from rmtkern.packing.watch import is_altered
from rmtkern.testing import excess_over, random_copy

__all__ = ["Chain", "MlpCall", "MlpForward", "find_chains", "mlp_calls"]

CHECKED = 64
"""Tokens of a call, evenly spread, that are compared with float64."""


@dataclass(frozen=True)
class Chain:
    """A module whose forward runs its children one after the other, two linears among them.

    Args:
        name: of the module.
        order: names of the children in the order they run.
        linears: (first, second) of them; what runs between changes nothing, but for the activation.
        activation: name of the child between them that does, or None.
    """

    name: str
    order: tuple[str, ...]
    linears: tuple[str, str]
    activation: str | None

    @property
    def paths(self) -> tuple[str, str]:
        """The linears' names in the model."""
        first, second = self.linears
        return part(self.name, first), part(self.name, second)

    @property
    def steps(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Names of the children before the first linear, from it to the second, and after that."""
        first, second = (self.order.index(name) for name in self.linears)
        return self.order[:first], self.order[first : second + 1], self.order[second + 1 :]


def find_chains(model: nn.Module, linears: Mapping[str, nn.Linear]) -> list[Chain]:
    """The modules of a model that run two linears one after the other, with an activation between or without.

    Args:
        model: in eval mode, on the CPU.
        linears: name -> linear that may be swapped.

    Returns:
        One chain for each such module: its first two linears in `linears` that fit.
    """
    found = []
    for name, module in model.named_modules():
        movable = {
            child: linears[path] for child, _ in module.named_children() if (path := part(name, child)) in linears
        }
        widths = [linear.out_features for linear in movable.values()]
        if not any(linear.in_features in widths for linear in movable.values()) or is_altered(module):
            continue
        if takes_one(module) and (chain := _try(name, module, movable)):
            found.append(chain)
    return found


def _try(name: str, module: nn.Module, movable: Mapping[str, nn.Linear]) -> Chain | None:
    """Run a copy of the module in float64 with random numbers; see whether each child gets what the last one gave."""
    generator = torch.Generator().manual_seed(0)
    calls: list[tuple[str, Any, Any]] = []

    def note(child: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            calls.append((child, args[0] if len(args) == 1 else None, y))

        return hook

    try:
        trial = random_copy(module, generator)
        for key, child in trial.named_children():
            child.register_forward_hook(note(key))
        columns = next(iter(movable.values())).in_features
        x = torch.randn(2, 3, columns, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            y = trial(x)
    except Exception:  # it wants another input, or cannot be copied: then it is no such module
        return None
    order = tuple(ran for ran, _, _ in calls)
    if not isinstance(y, Tensor) or len(set(order)) < len(order):
        return None
    now: Any = x
    changing: list[str] = []
    for ran, got, gave in calls:
        if not isinstance(got, Tensor) or not isinstance(gave, Tensor) or not _same(got, now):
            return None
        changing += [] if _same(gave, got) else [ran]
        now = gave
    if not _same(y, now):
        return None
    for first, *rest in (changing[i:] for i in range(len(changing))):
        for between, second in enumerate(rest[:2]):  # at most one that changes something
            if first in movable and second in movable:
                return Chain(name, order, (first, second), rest[0] if between else None)
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


class MlpForward(KernelForward):
    """Stands as a module's `forward`: its children in their order, the two linears in one kernel where that can be.

    Args:
        module: the module.
        chain: what it runs.
    """

    def __init__(self, module: nn.Module, chain: Chain) -> None:
        super().__init__(module)
        self.chain = chain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's class says."""
        (x,) = (*args, *kwargs.values())
        before, inside, after = self.chain.steps
        children = self.module._modules
        for name in before:
            x = children[name](x)  # type: ignore[misc]
        first, second = (children[name] for name in self.chain.linears)
        act = None if self.chain.activation is None else children[self.chain.activation]
        absorbed = act is None or isinstance(act, AbsorbedActivation)
        if absorbed and isinstance(first, PackedLinear) and isinstance(second, PackedLinear):
            x = packed_mlp(first, second, x)
        else:
            for name in inside:
                x = children[name](x)  # type: ignore[misc]
        for name in after:
            x = children[name](x)  # type: ignore[misc]
        return x


@dataclass(frozen=True)
class MlpCall:
    """The two linears of a chain on random tokens, in the forms that were chosen for them.

    Args:
        first: what stands for the first linear.
        second: what stands for the second.
        tokens: T.
    """

    first: PackedLinear
    second: PackedLinear
    tokens: int

    @cached_property
    def x(self) -> Tensor:
        """[T, K] in the dtype of the weights."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.tokens, self.first.in_features, generator=generator).to(self.first.weight.dtype)

    @property
    def reason(self) -> str | None:
        """Why one kernel cannot compute both, or None."""
        return reason_against(self.x, self.first.form(self.tokens), self.second.form(self.tokens))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the input."""
        return (tuple(self.x.shape),)

    def torch(self) -> Tensor:
        """One linear after the other."""
        y: Tensor = self.second(self.first(self.x))
        return y

    def kernel(self) -> Tensor:
        """Both in one kernel."""
        return packed_mlp(self.first, self.second, self.x)

    def excess(self) -> float:
        """The kernel's error against float64 over what is allowed: 2x PyTorch's, plus 4 eps of the scale."""
        sample = torch.linspace(0, self.tokens - 1, min(self.tokens, CHECKED)).long()
        modules = (self.first, self.second)
        plain = [(module.form(self.tokens).unpack(), module.bias, module.activation) for module in modules]

        def dense(dtype: torch.dtype) -> Tensor:
            y = self.x[sample].to(dtype)
            for weight, bias, activation in plain:
                y = F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
                y = apply_activation(y, activation)
            return y.double()

        exact = dense(torch.float64)
        return excess_over(self.kernel()[sample], dense(self.x.dtype), exact)


def mlp_calls(
    chains: Sequence[Chain],
    slots: Mapping[str, nn.Module],
    tokens: Mapping[str, Sequence[int]],
    alike: Mapping[str, Hashable],
) -> dict[str, list[MlpCall]]:
    """What each chain would compute in one kernel, as `measure_sites` takes it.

    Args:
        chains: as `find_chains` gives them.
        slots: module name -> what stands there.
        tokens: name of a linear -> its token counts.
        alike: name of a linear -> what is equal where its time is; chains whose linears are alike share their calls.

    Returns:
        Name of a chain's module -> a call for each token count. Without the chains of which a linear is PyTorch's or
        does not apply the activation that follows it.
    """
    seen: dict[Hashable, MlpCall] = {}
    calls = {}
    for chain in chains:
        first, second = (slots.get(path) for path in chain.paths)
        act = None if chain.activation is None else slots.get(part(chain.name, chain.activation))
        absorbed = chain.activation is None or isinstance(act, AbsorbedActivation)
        if not absorbed or not isinstance(first, PackedLinear) or not isinstance(second, PackedLinear):
            continue
        both = tuple(alike[path] for path in chain.paths)
        calls[chain.name] = [
            seen.setdefault((both, count), MlpCall(first, second, count)) for count in tokens[chain.paths[0]]
        ]
    return calls
