"""Finds gate-up pairs, y = tail(act(gate(h)) * up(h)) with h = head(x), and makes their module run them in one kernel.

It finds them by trying a copy of a module with random parameters, so it needs to know no model, and takes a swap back.
pairs.py decides which pair is swapped, by timing.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.activations import apply_activation
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.pairs import interleave
from rmtkern.nn import PackedGatedLinear
from rmtkern.ops import ACTIVATIONS
from rmtkern.testing import random_copy

__all__ = ["AbsorbedLinear", "GatedPair", "find_pairs", "fuse", "fused", "part", "takes_one", "unfuse"]


class AbsorbedLinear(nn.Identity):
    """Stands where the up linear was that the PackedGatedLinear beside it now computes; nobody calls it."""


@dataclass(frozen=True)
class GatedPair:
    """A module whose forward is tail(act(gate(h)) * up(h)), h = head(x).

    Args:
        name: of the module.
        head: names of the children that run before the linears, in order.
        linears: (gate, up), or the one linear that computes both.
        tail: names of the children that run after the product, in order.
        activation: of the gate, a name in `ops.ACTIVATIONS` or None.
        stacked: which half of the one linear comes first, "gate" or "up"; None if there are two.
    """

    name: str
    head: tuple[str, ...]
    linears: tuple[str, ...]
    tail: tuple[str, ...]
    activation: str | None
    stacked: str | None

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears' names in the model."""
        return tuple(f"{self.name}.{linear}" if self.name else linear for linear in self.linears)

    def halves(self, both: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(gate, up) of what the linears hold: a tensor for each, or one whose last dimension has both halves."""
        if self.stacked is not None:
            both = both[0].chunk(2, -1)[:: 1 if self.stacked == "gate" else -1]
        return both[0], both[1]

    def weight(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(gate weight, up weight, gate bias, up bias)."""
        gate, up = (half.t() for half in self.halves([linear.weight.detach().t() for linear in linears]))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        return gate, up, *(self.halves(biases) if biases else (None, None))

    def combine(self, outputs: Sequence[Tensor], activation: str | None) -> Tensor:
        """activation(gate) * up of the linears' outputs, as the model computes it."""
        gate, up = self.halves(outputs)
        return apply_activation(gate, activation) * up

    def module(self, form: PackedWeight, linears: Sequence[nn.Linear]) -> PackedGatedLinear:
        """The packed module for these linears."""
        gate, _, bg, bu = self.weight(linears)
        grads = [(x.weight.requires_grad, x.bias is not None and x.bias.requires_grad) for x in linears]
        return PackedGatedLinear(
            form,
            None if bg is None or bu is None else interleave(bg, bu),
            self.activation,
            features=gate.shape[0],
            stacked=self.stacked,
            requires_grad=tuple(grad for pair in grads for grad in pair),
        )

    def slots(self, packed: PackedGatedLinear) -> dict[str, nn.Module]:
        """What stands where, once this pair is swapped."""
        return {self.paths[0]: packed, **{path: AbsorbedLinear().eval() for path in self.paths[1:]}}


def part(parent: str, name: str) -> str:
    """The name in the model of a module's child."""
    return f"{parent}.{name}" if parent else name


def find_pairs(model: nn.Module, linears: Mapping[str, nn.Linear]) -> list[GatedPair]:
    """The gate-up pairs of a model.

    Args:
        model: in eval mode, on the CPU.
        linears: name -> linear that may be swapped.

    Returns:
        Pairs of which each linear is in `linears`; no linear is in two.
    """
    found = []
    for name, module in model.named_modules():
        movable = {
            child: linears[path] for child, _ in module.named_children() if (path := part(name, child)) in linears
        }
        if not movable or "forward" in vars(module) or not takes_one(module):
            continue
        shapes = [tuple(linear.weight.shape) for linear in movable.values()]
        ends = {child.in_features for child in module.children() if isinstance(child, nn.Linear)}
        twice = any(shapes.count(shape) > 1 for shape in shapes)
        if (twice or any(n % 2 == 0 and n // 2 in ends for n, _ in shapes)) and (pair := _try(name, module, movable)):
            found.append(pair)
    return found


def takes_one(module: nn.Module) -> bool:
    """Whether a module's forward has exactly one parameter."""
    try:
        return len(inspect.signature(module.forward).parameters) == 1
    except (TypeError, ValueError):  # not a Python function
        return False


@dataclass
class _Call:
    name: str
    x: Any
    y: Any


def _try(name: str, module: nn.Module, movable: Mapping[str, nn.Linear]) -> GatedPair | None:
    """Run a copy of the module in float64 with random parameters; see whether a gate-up pair explains every step."""
    generator = torch.Generator().manual_seed(0)
    columns = next(iter(movable.values())).in_features
    x = torch.randn(2, 3, columns, dtype=torch.float64, generator=generator)
    calls: list[_Call] = []

    def note(child: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            calls.append(_Call(child, args[0] if len(args) == 1 else None, y))

        return hook

    try:
        trial = random_copy(module, generator)
        for key, child in trial.named_children():
            child.register_forward_hook(note(key))
        with torch.no_grad():
            y = trial(x)
    except Exception:  # it wants another input, or cannot be copied: then it is no such module
        return None
    plain = all(isinstance(call.x, Tensor) and isinstance(call.y, Tensor) for call in calls) and isinstance(y, Tensor)
    if not plain or len({call.name for call in calls}) < len(calls):
        return None
    return next(
        (pair for pair in _explanations(name, movable, [call.name for call in calls]) if _explains(pair, x, y, calls)),
        None,
    )


def _explanations(name: str, movable: Mapping[str, nn.Linear], order: list[str]) -> Iterator[GatedPair]:
    """Every pair that the children's order allows."""
    candidates = {child: movable[child] for child in order if child in movable}
    sites: list[tuple[tuple[str, ...], str | None]] = []
    for child, a in candidates.items():
        if a.out_features % 2 == 0:
            sites += [((child,), "gate"), ((child,), "up")]
        for other, b in candidates.items():
            same = a.weight.shape == b.weight.shape and a.weight.dtype == b.weight.dtype
            if child != other and same and (a.bias is None) == (b.bias is None):
                sites.append(((child, other), None))
    for linears, stacked in sites:
        first, last = sorted((order.index(linears[0]), order.index(linears[-1])))
        for skipped in (0, 1):  # the activation may be a module that runs after both linears
            head, tail = tuple(order[:first]), tuple(order[last + 1 + skipped :])
            for activation in ACTIVATIONS:
                yield GatedPair(name, head, linears, tail, activation, stacked)


def _explains(pair: GatedPair, x: Tensor, y: Tensor, calls: list[_Call]) -> bool:
    """Whether head, pair and tail, one after the other, are what the module computed, up to float64 rounding."""
    at = {call.name: call for call in calls}

    def close(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))

    for name in pair.head:
        if not close(at[name].x, x):
            return False
        x = at[name].y
    if not all(close(at[name].x, x) for name in pair.linears):
        return False
    now = pair.combine([at[name].y for name in pair.linears], pair.activation)
    for name in pair.tail:
        if not close(at[name].x, now):
            return False
        now = at[name].y
    return close(y, now)


class _GatedForward:
    """Stands as a module's `forward`: head, the packed pair in the gate's place, tail."""

    def __init__(self, module: nn.Module, pair: GatedPair) -> None:
        self.module, self.pair = module, pair

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        for name in (*self.pair.head, self.pair.linears[0], *self.pair.tail):
            x = getattr(self.module, name)(x)
        return x


def fused(model: nn.Module) -> dict[str, GatedPair]:
    """The modules that run a packed pair, by name."""
    found = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return {name: forward.pair for name, forward in found.items() if isinstance(forward, _GatedForward)}


def fuse(model: nn.Module, pairs: Sequence[GatedPair]) -> None:
    """Make these modules call the packed pair that stands where the gate was."""
    for pair in pairs:
        module = model.get_submodule(pair.name)
        vars(module)["forward"] = _GatedForward(module, pair)


def unfuse(model: nn.Module) -> dict[str, nn.Module]:
    """Give modules their own forward back.

    Returns:
        The linears that belong where packed pairs stand now, by name; the caller places them.
    """
    slots: dict[str, nn.Module] = {}
    for name, pair in fused(model).items():
        module = model.get_submodule(name)
        packed = getattr(module, pair.linears[0])
        if isinstance(packed, PackedGatedLinear):
            slots |= dict(zip((part(name, child) for child in pair.linears), packed.unpack(), strict=True))
        del vars(module)["forward"]
    return slots
