"""A contender's name ("block 4x1 0.7") as a random weight of that pattern, packed in that layout.

It asks the layouts what they take, so a layout or a dtype that is added later is picked up. It times nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.dense.weight import FORMS
from rmtkern.layouts.spectral.weight import SpectralWeight
from rmtkern.ops import KERNELS, load_kernels

__all__ = ["Contender", "Unavailable", "build", "kernel_of", "pack", "parse", "random_weight"]

_NAMES = {
    "bitmask": r"(?P<sparsity>0(\.\d+)?)",
    "block": r"(?P<r>\d+)x(?P<c>\d+) (?P<unstructured>unstructured )?(?P<sparsity>0(\.\d+)?)",
    "nofm": r"(?P<n>\d+):(?P<m>\d+)(x(?P<shared>\d+))?",
    "lowrank": r"(?P<rank>\d+)",
    "spectral": r"(?P<rank>\d+)\+(?P<sparsity>0(\.\d+)?)",
    "dense": r"own",
}
"""Layout -> what follows it in a contender's name."""


class Unavailable(Exception):
    """This library does not have the layout, the dtype or the form (yet); the message says which."""


@dataclass(frozen=True)
class Contender:
    """A parsed name.

    Args:
        name: as in cases.py.
        layout: its first word.
        numbers: the integers in the name: r and c of mini-blocks, n and m, `shared` (rows with one n:m pattern), rank.
        sparsity: of the mask; 0 without one.
        unstructured: whether the mask has no mini-blocks though the layout does.
    """

    name: str
    layout: str
    numbers: dict[str, int] = field(default_factory=dict, hash=False)
    sparsity: float = 0.0
    unstructured: bool = False

    @property
    def pattern(self) -> str:
        """Of the mask, such as "4x1", "2:4" or "unstructured"; the rank of a layout with factors."""
        rest = self.name.split()[1:]
        return "unstructured" if self.layout == "bitmask" or self.unstructured else rest[0].partition("+")[0]

    def executed(self, weight: Tensor) -> float:
        """Multiplications of one token through this form of the weight [N, K]."""
        n_rows, n_cols = weight.shape
        thin = self.numbers.get("rank", 0) * (n_rows + n_cols)
        if self.layout == "lowrank":
            return thin
        if self.layout == "spectral":
            return thin + n_rows * n_cols * (1 - self.sparsity)
        return int(weight.count_nonzero())


def parse(name: str) -> Contender:
    """Read a contender's name; ValueError if it is none."""
    layout, _, rest = name.partition(" ")
    match = re.fullmatch(_NAMES[layout], rest) if layout in _NAMES else None
    if match is None:
        raise ValueError(f"contender {name!r}: expected '<layout> [pattern] [sparsity]' such as 'block 4x1 0.7'")
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    sparsity, unstructured = float(found.pop("sparsity", 0)), bool(found.pop("unstructured", False))
    return Contender(name, layout, {key: int(value) for key, value in found.items()}, sparsity, unstructured)


def random_weight(contender: Contender, n_rows: int, n_cols: int) -> Tensor:
    """Normal entries under a random mask of the pattern (of spectral: its sparse part), or a product of the rank.

    Returns:
        [N, K] float32, from torch's generator.

    Raises:
        ValueError: the shape is not divisible by the pattern.
    """
    numbers = contender.numbers
    rows, cols = numbers.get("r", numbers.get("shared", 1)), numbers.get("c", numbers.get("m", 1))
    if contender.unstructured:
        rows = cols = 1
    if n_rows % rows or n_cols % cols:
        raise ValueError(f"{contender.name}: [{n_rows}, {n_cols}] is not divisible by {rows} x {cols}")
    weight = torch.randn(n_rows, n_cols)
    if contender.layout == "nofm":
        ranks = torch.rand(n_rows // rows, n_cols // cols, cols).argsort(-1).argsort(-1)
        return weight * (ranks < numbers["n"]).view(-1, n_cols).repeat_interleave(rows, 0)
    if contender.layout == "lowrank":
        b, a = _factors(contender, n_rows, n_cols)
        return b @ a
    kept = torch.rand(n_rows // rows, n_cols // cols) >= contender.sparsity
    return weight * kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def _factors(contender: Contender, n_rows: int, n_cols: int) -> tuple[Tensor, Tensor]:
    rank = contender.numbers["rank"]
    return torch.randn(n_rows, rank) / rank**0.5, torch.randn(rank, n_cols)


def build(contender: Contender, n_rows: int, n_cols: int, dtype: torch.dtype) -> tuple[Tensor, PackedWeight]:
    """A contender's weight [N, K] in a dtype, and the same in its layout.

    Raises:
        Unavailable: as `pack`.
        RuntimeError: as `pack`.
        ValueError: the shape is not divisible by the pattern.
    """
    weight = random_weight(contender, n_rows, n_cols).to(dtype)
    if contender.layout != "spectral":
        return weight, pack(contender, weight)
    b, a = (factor.to(dtype) for factor in _factors(contender, n_rows, n_cols))
    packed = SpectralWeight.from_parts(b, a, weight)
    return packed.unpack(), packed


def pack(contender: Contender, weight: Tensor) -> PackedWeight:
    """The weight [N, K] in the contender's layout, in the weight's dtype.

    The layout's own `variants` say how it spells its params; the one whose numbers are those of the name is taken.

    Raises:
        Unavailable: no such layout, dtype or variant.
        RuntimeError: the packed weight is not the weight.
    """
    name, layout = contender.name, contender.layout
    if layout not in LAYOUTS:
        raise Unavailable(f"{name}: there is no layout {layout!r}")
    kind = LAYOUTS[layout]
    if weight.dtype not in kind.dtypes:
        raise Unavailable(f"{name}: layout {layout} does not take {weight.dtype}")
    packed = kind.pack(weight, **_params(contender, kind, weight))
    exact, got = weight.float(), packed.unpack().float()
    # Factors are rounded to the dtype each, so their product is off by a few eps; the other layouts are exact.
    allowed = 4 * torch.finfo(weight.dtype).eps if "rank" in contender.numbers else 0.0
    if not float((got - exact).norm()) <= allowed * float(exact.norm()):
        raise RuntimeError(f"{name}: unpack() does not give the packed weight back")
    return packed


def _params(contender: Contender, kind: type[PackedWeight], weight: Tensor) -> dict[str, int]:
    if contender.layout == "bitmask":
        return {}
    offered = list(kind.variants(weight))
    for params in offered:
        fits = _is_own(params) if contender.layout == "dense" else _same(params, contender.numbers)
        if fits:
            return params
    raise Unavailable(f"{contender.name}: layout {contender.layout} offers {offered or 'nothing'} for this weight")


def _is_own(params: dict[str, int]) -> bool:
    return FORMS[params["form"]] == "own"


def _same(params: dict[str, int], numbers: dict[str, int]) -> bool:
    """Equal where both name it (a missing number is 1); what only one of them names must be equal as values."""
    common = {name for name in ("r", "c", "n", "m") if name in numbers}
    ours = sorted(value for name, value in numbers.items() if name not in common)
    theirs = sorted(value for name, value in params.items() if name not in common and value != 1)
    return ours == theirs and all(params.get(name, 1) == numbers[name] for name in common)


def kernel_of(packed: PackedWeight, x: Tensor) -> Callable[..., Tensor]:
    """The CPU kernel `linear(x, w, bias, activation, residual)` of a packed weight; Unavailable if it refuses x."""
    load_kernels(packed.layout)
    kernel = KERNELS[packed.layout]["cpu"]
    reason = kernel if isinstance(kernel, str) else kernel.supports(packed, x)
    if reason is not None:
        raise Unavailable(f"{packed.label}: {reason}")
    linear: Callable[..., Tensor] = kernel.linear
    return linear
