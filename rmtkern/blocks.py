"""Finds the parts of a model that can be made smaller: hidden units of MLPs, heads of attention; and cuts them.

It understands a part by trying a copy with random parameters: without some of its units it must compute what it did
with their outgoing weights set to zero. It must not know which units are worth keeping.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmtkern.fewer_heads import FewerHeads
from rmtkern.models import HEAD_COUNTS, HEAD_WIDTHS, PrunableWeight, prunable_weights
from rmtkern.testing import random_copy

__all__ = ["Block", "cut_all_", "find_blocks"]

Kind = Literal["mlp", "heads"]
KINDS: dict[Kind, tuple[tuple[str, ...], str]] = {
    "mlp": (("mlp_in", "mlp_gate"), "mlp_out"),
    "heads": (("qkv", "q", "k", "v"), "attn_out"),
}
"""Kind of block -> roles of the weights that make its units, role of the weight that takes them."""


@dataclass(frozen=True)
class Block:
    """A module with units that can go: each is some rows of the producers and some columns of the consumer.

    Args:
        name: of the module that holds them.
        kind: "mlp" (a unit is a hidden feature) or "heads".
        producers: names of the weights [r units size, D] whose rows belong to the units.
        consumer: name of the weight [N, units size] whose columns do.
        units: how many there are.
        size: columns of the consumer for each unit.
        by_unit: order of the rows of a producer with r > 1: true for (units, r, size), false for (r, units, size).
        numbers: (module, attribute, value for each unit): integers that follow the number of units.
    """

    name: str
    kind: Kind
    producers: tuple[str, ...]
    consumer: str
    units: int
    size: int
    by_unit: bool = False
    numbers: tuple[tuple[str, str, int], ...] = ()

    def columns(self, units: Tensor) -> Tensor:
        """The columns of the consumer, int64 [len(units) size], of units, int64."""
        return torch.arange(self.units * self.size).reshape(self.units, self.size)[units.cpu()].flatten()

    def rows(self, units: Tensor, total: int) -> Tensor:
        """The rows of a producer with `total` rows, int64, of units, int64."""
        index = torch.arange(total)
        if self.by_unit:
            return index.reshape(self.units, -1)[units.cpu()].flatten()
        return index.reshape(-1, self.units, self.size)[:, units.cpu()].flatten()


def find_blocks(model: nn.Module, kinds: Iterable[Kind] = ("mlp", "heads")) -> tuple[list[Block], dict[str, str]]:
    """The blocks of a model that can be cut, and why others cannot.

    Args:
        model: any module that is not packed; on the meta device too.
        kinds: which blocks to look for.

    Returns:
        The blocks in the order of the model, and name -> reason for each that must stay whole.

    Raises:
        TypeError, ValueError, PackedModelError: as models.prunable_weights raises them.
    """
    weights = prunable_weights(model, "all")
    found: dict[str, Block] = {}
    left: dict[str, str] = {}
    for kind in kinds:
        for weight in (weight for weight in weights if weight.role == KINDS[kind][1]):
            name, block = _describe(model, weight, weights, kind)
            reason = block if isinstance(block, str) else None
            for candidate in [] if isinstance(block, str) else _variants(model, block):
                reason = _try(model, candidate)
                if reason is None:
                    found[weight.name] = candidate
                    break
            if reason is not None:
                left[f"{name} ({kind})"] = reason
    return [found[weight.name] for weight in weights if weight.name in found], left


def _describe(
    model: nn.Module, consumer: PrunableWeight, weights: Sequence[PrunableWeight], kind: Kind
) -> tuple[str, Block | str]:
    """The name of a block and its description, or why there is none."""
    makes, takes = KINDS[kind]
    path = consumer.name.rpartition(".")[0]
    producers: list[PrunableWeight] = []
    while path and not producers:
        path = path.rpartition(".")[0]
        inside = [weight for weight in weights if not path or weight.name.startswith(f"{path}.")]
        producers = [weight for weight in inside if weight.role in makes]
    if not producers:
        return consumer.name, "no weight that makes its inputs was recognised"
    if sum(weight.role == takes for weight in inside) > 1:
        return consumer.name, f"{path or 'the model'} holds more than one of its kind"
    multihead = isinstance(model.get_submodule(path), nn.MultiheadAttention)
    for weight in (consumer, *producers):
        owner = model.get_submodule(weight.name.rpartition(".")[0])
        plain = isinstance(owner, nn.Linear) or (multihead and weight.name.endswith("in_proj_weight"))
        if not plain or weight.tied:
            return path, f"{weight.name} is {'tied' if weight.tied else f'in a {type(owner).__name__}, no nn.Linear'}"
    units = consumer.shape[1]
    numbers: tuple[tuple[str, str, int], ...] = ()
    if kind == "heads":
        numbers = tuple(_numbers(model.get_submodule(path), path, units))
        if not numbers:
            return path, f"no number of heads was found ({', '.join(HEAD_COUNTS)})"
        module, attribute, _ = numbers[0]
        units = getattr(model.get_submodule(module), attribute)
    size = consumer.shape[1] // units
    if any(weight.shape[0] % (units * size) for weight in producers) or size * units != consumer.shape[1]:
        shapes = ", ".join(f"{weight.name} {list(weight.shape)}" for weight in (*producers, consumer))
        return path, f"{units} units do not divide {shapes}"
    if units < 2:
        return path, "it has one unit only"
    return path, Block(path, kind, tuple(w.name for w in producers), consumer.name, units, size, numbers=numbers)


def _numbers(module: nn.Module, path: str, width: int) -> list[tuple[str, str, int]]:
    """Which integers count the heads of a module, and which are their width; the counts first."""
    held = [(".".join(filter(None, (path, name))), attribute, value)
            for name, part in module.named_modules() for attribute, value in vars(part).items()
            if type(value) is int]  # fmt: skip
    counts = [entry for entry in held if entry[1] in HEAD_COUNTS and 0 < entry[2] <= width]
    if not counts:
        return []
    heads = counts[0][2]
    widths = [entry for entry in held if entry[1] in HEAD_WIDTHS and entry[2] == width]
    return [(name, attribute, value // heads) for name, attribute, value in (*counts, *widths)
            if value in (heads, width)]  # fmt: skip


def _variants(model: nn.Module, block: Block) -> list[Block]:
    """What is not known before trying: the order of the rows in a producer of several parts."""
    stacked = any(_parameter(model, name).shape[0] > block.units * block.size for name in block.producers)
    return [block, replace(block, by_unit=True)] if stacked else [block]


def _parameter(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    return getattr(model.get_submodule(path), key)


def _call(module: nn.Module, x: Tensor) -> Any:
    multihead = isinstance(module, nn.MultiheadAttention | FewerHeads)
    y = module(x, x, x, need_weights=False) if multihead else module(x)
    return y[0] if isinstance(y, tuple | list) else y


def _try(model: nn.Module, block: Block) -> str | None:
    """Why a block is not what its description says, or None: half of its units cut from a copy with random numbers."""
    if not block.name and isinstance(model, nn.MultiheadAttention):
        return "a lone nn.MultiheadAttention cannot be replaced in place; wrap it in nn.Sequential"
    generator = torch.Generator().manual_seed(0)
    root = nn.Module()
    prefix = f"{block.name}." if block.name else ""

    def inside(name: str) -> str:
        return "part" if name == block.name else f"part.{name.removeprefix(prefix)}"

    small = replace(
        block,
        name="part",
        producers=tuple(map(inside, block.producers)),
        consumer=inside(block.consumer),
        numbers=tuple((inside(name), attribute, value) for name, attribute, value in block.numbers),
    )
    units = torch.randperm(block.units, generator=generator)
    kept, gone = units[: (block.units + 1) // 2].sort().values, units[(block.units + 1) // 2 :]
    try:
        root.part = random_copy(model.get_submodule(block.name), generator).eval()
        width = _parameter(root, small.producers[0]).shape[1]
        x = torch.randn(2, 5, width, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            whole = _call(root.part, x)
            weight = _parameter(root, small.consumer)
            weight[:, small.columns(gone)] = 0
            masked = _call(root.part, x)
            _cut(root, small, kept)
            y = _call(root.part, x)
    except Exception as error:  # it wants another input, cannot be copied, or its shapes do not fit
        return f"trying a smaller copy failed ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    if not all(isinstance(found, Tensor) for found in (whole, masked, y)) or y.shape != masked.shape:
        return "a smaller copy returned something else"
    tolerance = 1e-9 * float(masked.abs().max())
    if not torch.allclose(y, masked, rtol=1e-9, atol=tolerance):
        return "a smaller copy computed something else"
    if torch.allclose(whole, masked, rtol=1e-6, atol=1e-6 * float(whole.abs().max())):
        return "its output does not depend on its units"
    return None


def cut_all_(model: nn.Module, kept: Sequence[tuple[Block, Tensor]]) -> Callable[[], None]:
    """Leave blocks only some of their units; parameters are new objects, with the values of the old ones.

    Args:
        model: changed in place; if anything fails, it is as it was.
        kept: blocks of the model, from `find_blocks`, and the units of each that stay: int64, ascending, at least one.

    Returns:
        What takes it back: the old objects stand again, until the next cut.
    """
    undo: list[Callable[[], None]] = []

    def take_back() -> None:
        for one in reversed(undo):
            one()

    try:
        for block, units in kept:
            undo.append(_cut(model, block, units))
    except BaseException:
        take_back()
        raise
    return take_back


def _cut(model: nn.Module, block: Block, kept: Tensor) -> Callable[[], None]:
    module = model.get_submodule(block.name)
    undo: list[tuple[nn.Module, str, Any]] = []

    def put(owner: nn.Module, key: str, value: Any) -> None:
        undo.append((owner, key, getattr(owner, key)))
        setattr(owner, key, value)

    def take_back() -> None:
        for owner, key, value in reversed(undo):
            setattr(owner, key, value)

    def shorten(linear: nn.Module, key: str, index: Tensor, dimension: int) -> None:
        old = getattr(linear, key)
        if old is not None:
            new = old.detach().index_select(dimension, index.to(old.device))
            put(linear, key, nn.Parameter(new, old.requires_grad))

    try:
        if isinstance(module, nn.MultiheadAttention):
            parent, _, key = block.name.rpartition(".")
            put(model.get_submodule(parent), key, FewerHeads(module, kept))
            return take_back
        for name in block.producers:
            linear = model.get_submodule(name.rpartition(".")[0])
            rows = block.rows(kept, _parameter(model, name).shape[0])
            shorten(linear, "weight", rows, 0)
            shorten(linear, "bias", rows, 0)
            put(linear, "out_features", len(rows))
        linear, columns = model.get_submodule(block.consumer.rpartition(".")[0]), block.columns(kept)
        shorten(linear, "weight", columns, 1)
        put(linear, "in_features", len(columns))
        for name, attribute, each in block.numbers:
            put(model.get_submodule(name), attribute, each * len(kept))
    except BaseException:
        take_back()
        raise
    return take_back
