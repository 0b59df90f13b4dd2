"""Which tile a GPU kernel uses, by (layout, element size, architecture, shape class). It decides nothing else.

The figures come from static analysis (registers, shared memory, instructions; docs/gpu.md), not from timing: no GPU has
run them yet. It knows no kernel and imports no triton.
"""

from dataclasses import dataclass, replace
from typing import Self

from rmtkern.gpu import ARCHITECTURES, architecture, precision

__all__ = [
    "ARCHITECTURES",
    "DESCRIBING",
    "Config",
    "architecture",
    "candidates",
    "choose",
    "precision",
    "shape_class",
]

DESCRIBING = ("sm_90", "sm_100", "sm_120")
"""Those with a copy engine that takes tensor descriptors; elsewhere a kernel with descriptors spills."""

SHAPE_CLASSES = {"row": 16, "image": 512, "batch": None}
"""Class -> most tokens T in it: a class token or tiny batch, one or two images (ViT: 197 each), everything else."""


@dataclass(frozen=True)
class Config:
    """One way to run a tile kernel.

    Args:
        bm: tokens of an output tile, a power of two >= 16.
        bn: output features of a tile, likewise.
        bk: input features of one step, likewise; 0 for a kernel that has none.
        warps: warps of a program.
        stages: buffers of the software pipeline.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    @property
    def label(self) -> str:
        """Such as "128x128x64-w8-s3"."""
        return f"{self.bm}x{self.bn}x{self.bk}-w{self.warps}-s{self.stages}"

    def within(self, block: tuple[int, int] | None) -> Self:
        """The same with at most the rows of a block as `bn` and its columns as `bk`; None: the same."""
        return self if block is None else replace(self, bn=min(self.bn, block[0]), bk=min(self.bk, block[1]))


_Table = dict[str, Config]

# sm_86, 89 and 120 give a block 99 KiB of shared memory, sm_80 163, sm_90 and 100 227, gfx942 64 (so two stages).
# "ragged": for more than a few tokens where N or K is no multiple of 16, when wider tiles spill registers.
_DENSE_16: _Table = {
    "row": Config(16, 64, 128, 4, 4),
    "image": Config(64, 64, 64, 4, 4),
    "batch": Config(128, 128, 64, 8, 3),
    "ragged": Config(64, 64, 64, 4, 4),
}
_DENSE_32: _Table = {
    "row": Config(16, 64, 64, 4, 3),
    "image": Config(32, 64, 32, 4, 3),
    "batch": Config(128, 64, 32, 8, 3),  # fewest instructions per product of those that do not spill
    "ragged": Config(32, 64, 32, 4, 3),
}
_DENSE_16_AMD: _Table = {
    "row": Config(16, 64, 128, 4, 2),
    "image": Config(64, 64, 64, 4, 2),
    "batch": Config(128, 128, 64, 8, 2),
    "ragged": Config(64, 64, 64, 4, 2),
}
_DENSE_32_AMD: _Table = {
    "row": Config(16, 64, 64, 4, 2),
    "image": Config(32, 64, 32, 4, 2),
    "batch": Config(64, 64, 32, 4, 2),
    "ragged": Config(32, 64, 32, 4, 2),
}
# The dense product by descriptors, whose copies need no registers.
_DESCRIPTOR_16: _Table = {
    "row": Config(16, 64, 128, 4, 4),
    "image": Config(64, 64, 64, 4, 4),
    "batch": Config(128, 128, 64, 8, 3),
    "ragged": Config(64, 64, 64, 4, 4),
}
_DESCRIPTOR_32: _Table = {
    "row": Config(16, 64, 64, 4, 3),
    "image": Config(32, 64, 32, 4, 3),
    "batch": Config(128, 64, 32, 8, 3),
    "ragged": Config(32, 64, 32, 4, 3),
}
# The threshold of masked_linear is applied in registers. It is for training, which has many tokens: one class.
_MASKED_16: _Table = {
    **dict.fromkeys(SHAPE_CLASSES, Config(128, 128, 64, 8, 3)),
    "ragged": Config(64, 64, 32, 4, 3),
}
_MASKED_32: _Table = dict.fromkeys((*SHAPE_CLASSES, "ragged"), Config(128, 64, 16, 8, 3))
# A bitmask tile is as deep as a mask is wide (bk = 64). It can pay for small T only; larger T stay correct.
_BITMASK_16: _Table = {
    "row": Config(16, 32, 64, 4, 2),
    "image": Config(64, 64, 64, 4, 2),
    "batch": Config(128, 64, 64, 8, 2),
    "ragged": Config(64, 64, 64, 8, 2),
}
_BITMASK_32: _Table = {
    "row": Config(16, 32, 64, 8, 2),
    "image": Config(32, 32, 64, 8, 2),
    "batch": Config(64, 32, 64, 8, 2),
    "ragged": Config(16, 32, 64, 8, 2),
}
# The same with the middle of a low rank in registers besides.
_SPECTRAL_16: _Table = {
    "row": Config(16, 32, 64, 4, 2),
    "image": Config(64, 64, 64, 8, 2),
    "batch": Config(128, 64, 64, 8, 2),
    "ragged": Config(64, 64, 64, 8, 2),
}
_SPECTRAL_32: _Table = {
    "row": Config(16, 32, 64, 8, 2),
    "image": Config(32, 32, 64, 8, 2),
    "batch": Config(32, 32, 64, 8, 2),
    "ragged": Config(16, 32, 64, 8, 2),
}
# A tile of a block weight lies in one block, so smaller blocks make it smaller.
_BLOCK_16: _Table = {
    "row": Config(16, 64, 64, 4, 4),
    "image": Config(64, 64, 64, 4, 3),
    "batch": Config(128, 64, 64, 4, 3),
    "ragged": Config(64, 64, 64, 4, 3),
}
_BLOCK_32: _Table = {
    "row": Config(16, 64, 32, 4, 3),
    "image": Config(64, 64, 32, 4, 3),
    "batch": Config(64, 64, 32, 4, 3),
    "ragged": Config(32, 64, 32, 4, 3),
}
# Entries of 2:4 are expanded in registers; bk is 32 or 64.
_NOFM_16: _Table = {
    "row": Config(16, 64, 64, 4, 4),
    "image": Config(64, 64, 64, 4, 3),
    "batch": Config(128, 64, 64, 8, 3),
    "ragged": Config(64, 64, 64, 4, 3),
}
_NOFM_32: _Table = {
    "row": Config(16, 64, 32, 4, 3),
    "image": Config(32, 64, 32, 4, 3),
    "batch": Config(64, 64, 32, 8, 3),
    "ragged": Config(16, 64, 32, 4, 3),
}
# 2:4 on sparse tensor cores (CUDA C++, 16-bit): two warps along the features, each with 32 or 64; bk is 64 or 128. Here
# "aligned" means copies of 16 bytes; narrower ones hold more addresses in registers.
_SPARSE_16: _Table = {
    "row": Config(16, 64, 128, 4, 3),
    "image": Config(64, 64, 64, 4, 3),
    "batch": Config(128, 128, 64, 8, 3),
    "ragged": Config(64, 64, 64, 4, 3),
}


def _table(layout: str, itemsize: int, arch: str) -> _Table:
    if layout == "sparse_product":
        return _SPARSE_16
    if layout == "masked":
        return _MASKED_16 if itemsize == 2 else _MASKED_32
    if layout == "bitmask":
        return _BITMASK_16 if itemsize == 2 else _BITMASK_32
    if layout == "spectral":
        return _SPECTRAL_16 if itemsize == 2 else _SPECTRAL_32
    if layout == "block":
        return _BLOCK_16 if itemsize == 2 else _BLOCK_32
    if layout == "descriptor":
        return _DESCRIPTOR_16 if itemsize == 2 else _DESCRIPTOR_32
    if layout == "nofm":
        return _NOFM_16 if itemsize == 2 else _NOFM_32
    if arch.startswith("gfx"):
        return _DENSE_16_AMD if itemsize == 2 else _DENSE_32_AMD
    return _DENSE_16 if itemsize == 2 else _DENSE_32


def shape_class(tokens: int) -> str:
    """The class of a call with `tokens` rows: "row", "image" or "batch"."""
    return next(name for name, most in SHAPE_CLASSES.items() if most is None or tokens <= most)


def choose(
    layout: str, itemsize: int, arch: str, tokens: int, aligned: bool = True, block: tuple[int, int] | None = None
) -> Config:
    """The tile for a call.

    Args:
        layout: "dense", "bitmask", "spectral", "block", "nofm", "descriptor" (dense, by tensor descriptors), "masked"
            (masked_linear.py) or "sparse_product" (nofm 2:4 in 16 bits on sparse tensor cores).
        itemsize: bytes of an element, 2 or 4.
        arch: a name in `ARCHITECTURES`.
        tokens: T >= 1.
        aligned: whether N and K are multiples of 16.
        block: rows and columns of a block of W, within which a tile lies; None: W has no blocks.

    Returns:
        The table's entry for the shape class of `tokens`.
    """
    name = shape_class(tokens)
    return _table(layout, itemsize, arch)[name if aligned or name == "row" else "ragged"].within(block)


def candidates(
    layout: str, itemsize: int, arch: str, aligned: bool = True, block: tuple[int, int] | None = None
) -> tuple[Config, ...]:
    """Every distinct tile that `choose` can return for a layout, element size, architecture, alignment and block."""
    chosen = (choose(layout, itemsize, arch, most or 2**20, aligned, block) for most in SHAPE_CLASSES.values())
    return tuple(dict.fromkeys(chosen))
