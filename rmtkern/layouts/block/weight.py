"""BlockWeight: how a weight of r x c blocks is stored. It knows no kernel; csrc/linear/block.inl reads mini-blocks."""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Self

import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.strips import blocks_by_strip, masks_by_row, pack_strips, rows_damage, unpack_strips

__all__ = ["BlockWeight"]

SIZES: dict[torch.dtype, tuple[tuple[int, int], ...]] = {
    torch.float32: ((2, 1), (4, 1), (8, 1)),
    torch.bfloat16: ((1, 2), (4, 2)),
    torch.float16: (),
}
"""The mini-blocks (r rows, c columns) that CPU kernels run for each dtype."""
SIDES = (16, 32, 64, 128)
"""Rows and columns of the blocks that GPU kernels run, in every dtype."""
LARGE = tuple(product(SIDES, SIDES))
WASTE = 0.1
"""Share of stored entries that may be zero in a weight that is offered this layout without being asked."""


def _check(params: Mapping[str, int], dtype: torch.dtype) -> tuple[int, int]:
    size = (params["r"], params["c"]) if set(params) == {"r", "c"} else None
    if size is None or size not in (*SIZES[dtype], *LARGE):
        wanted = "".join(f"{valid}, " for valid in SIZES[dtype])
        raise ValueError(
            f"block: params (r, c) must be one of {wanted}or each one of {', '.join(map(str, SIDES))} for {dtype}, got"
            f" {dict(params)}"
        )
    return size


def _fills(kept: Tensor, r: int, c: int) -> bool:
    """Whether at most the share WASTE of the entries of the stored r x c blocks is zero; `kept` [N, K] bool."""
    (n_rows, n_cols), total = kept.shape, int(kept.sum())
    padded = torch.nn.functional.pad(kept, (0, -n_cols % c, 0, -n_rows % r))
    filled = padded.view(padded.shape[0] // r, r, -1, c)
    return 0 < total >= (1 - WASTE) * r * c * int(filled.any(3).any(1).sum())


class BlockWeight(PackedWeight):
    """Blocks of r rows and c columns, stored whole if they have a non-zero.

    Mini-blocks, float32: patterns "2x1", "4x1", "8x1"; bfloat16: "1x2", "4x2". Any weight can be stored; a zero beside
    a non-zero in its block is stored too (in float32, and on a GPU, it multiplies like any entry: Inf times it is NaN).
    In bfloat16 "1x2" also holds unstructured weights: more bytes than `bitmask` (at 50 % 0.78 of the dense ones instead
    of 0.57), but entries that lie in pairs already, which is faster.

    Large blocks, r and c 16, 32, 64 or 128 each, float32, bfloat16 and float16: patterns such as "32x32", for a GPU; a
    CPU runs weights of such patterns as mini-blocks, which tile them. Mini-blocks run on a GPU as `bitmask` does, from
    a second copy of their values in the order of the rows.

    The storage of strips.py with strips of r rows and units of c columns.

    Parts:
        values: [stored, r * c], segment by segment, by unit in it, row by row in a block.
        masks: [segments] int64; bit j of a segment is set where its unit j is stored.
        rows: [segments] uint8, the segment's strip in its row block.
        starts: [groups + 1] int64, where a group's mini-blocks begin.
    """

    layout = "block"
    parts = ("values", "masks", "rows", "starts")
    gpu_parts = ("begins", "columns", "places", "row_values", "row_masks", "row_starts")
    dtypes = tuple(SIZES)
    values: Tensor
    masks: Tensor
    rows: Tensor
    starts: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """None: any weight can be stored; ValueError for impossible params."""
        check_dense(dense, cls.dtypes, cls.layout)
        _check(params, dense.dtype)
        return None

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """Each (r, c) whose blocks are nearly full here, so that it was pruned in that pattern or wider.

        On a CPU mini-blocks, and of these (1, 2) whatever the pattern, as its pairs are worth a zero in each; on a GPU
        the widest large blocks.
        """
        if dense.device.type != "cpu":
            widest = cls.widest(dense)
            return [] if widest is None else [widest]
        kept = dense.detach() != 0
        if dense.dtype not in SIZES or bool(kept.all()):
            return []
        return [{"r": r, "c": c} for r, c in SIZES[dense.dtype] if (r, c) == (1, 2) or _fills(kept, r, c)]

    @classmethod
    def widest(cls, dense: Tensor) -> dict[str, int] | None:
        """The large blocks with the most entries that are nearly full in this weight [N, K] with zeros; None: none.

        Of two with as many entries, those with more rows.
        """
        kept = dense.detach() != 0
        if bool(kept.all()):
            return None
        sizes = sorted(LARGE, key=lambda size: (size[0] * size[1], size[0]), reverse=True)
        return next(({"r": r, "c": c} for r, c in sizes if _fills(kept, r, c)), None)

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, bfloat16 or float16, finite.
            params: r and c, rows and columns of a block, as the class says; they need not divide N and K.

        Returns:
            The packed weight, on the device of `dense`.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape, dtype or param, NaN or Inf.
        """
        check_dense(dense, cls.dtypes, cls.layout)
        r, c = _check(params, dense.dtype)
        return cls((dense.shape[0], dense.shape[1]), {"r": r, "c": c}, pack_strips(dense, r, c))

    def unpack(self) -> Tensor:
        """The dense weight [N, K] in the packed dtype, bit for bit (-0.0 has become 0.0)."""
        parts = (self.values, self.masks, self.rows, self.starts)
        return unpack_strips(self.shape, self.params["r"], parts, self.params["c"])

    def damage(self) -> str | None:
        """Rows that are not each strip of a group once."""
        return rows_damage(self.shape, self.rows, self.params["r"], self.params["c"])

    @property
    def large(self) -> bool:
        """Whether these are blocks for a GPU, not mini-blocks."""
        return (self.params["r"], self.params["c"]) in LARGE

    def gpu_form(self) -> tuple[Tensor | None, ...]:
        """The index of large blocks, 8 bytes for each, or mini-blocks as `bitmask` holds them on a GPU.

        Returns:
            begins, columns and places as `blocks_by_strip` returns them, or row_values [nnz], row_masks [C, N] int64
            and row_starts [C, N] int32, C = ceil(K / 64), as BitmaskWeight has them; None for the others.
        """
        if self.large:
            index = blocks_by_strip(self.shape, self.params["r"], self.params["c"], self.masks, self.rows)
            return *index, None, None, None
        values, masks, rows, _ = pack_strips(self.unpack(), 1)
        return None, None, None, values[:, 0].contiguous(), *masks_by_row(self.shape, masks, rows)

    def gpu_tensors(self) -> tuple[Tensor, ...]:
        """(values [stored, r, c], begins, columns, places), or (row_values, row_masks, row_starts) of mini-blocks."""
        form = super().gpu_tensors()
        return (self.values.unflatten(1, (self.params["r"], self.params["c"])), *form) if self.large else form
