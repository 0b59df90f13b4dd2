"""BlockWeight: how a weight of r x c mini-blocks is stored. It knows no kernel; csrc/linear/block.inl reads it."""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.strips import pack_strips, unpack_strips

__all__ = ["BlockWeight"]

SIZES = {torch.float32: ((2, 1), (4, 1), (8, 1)), torch.bfloat16: ((1, 2), (4, 2))}
"""The mini-blocks (r rows, c columns) that kernels run for each dtype."""
WASTE = 0.1
"""Share of stored entries that may be zero in a weight that is offered this layout without being asked."""


def _check(params: Mapping[str, int], dtype: torch.dtype) -> tuple[int, int]:
    size = (params["r"], params["c"]) if set(params) == {"r", "c"} else None
    if size not in SIZES[dtype]:
        wanted = ", ".join(str(valid) for valid in SIZES[dtype])
        raise ValueError(f"block: params (r, c) must be one of {wanted} for {dtype}, got {dict(params)}")
    return size


class BlockWeight(PackedWeight):
    """Mini-blocks of r rows and c columns, stored whole if they have a non-zero.

    float32: patterns "2x1", "4x1", "8x1"; bfloat16: "1x2", "4x2". Any weight can be stored; a zero beside a non-zero
    in its mini-block is stored too (in float32 it multiplies like any entry: Inf times it is NaN). In bfloat16 "1x2"
    also holds unstructured weights: more bytes than `bitmask` (at 50 % 0.78 of the dense ones instead of 0.57), but
    entries that lie in pairs already, which is faster. The storage of strips.py with strips of r rows and units of c
    columns.

    Parts:
        values: [stored, r * c] float32 or bfloat16, segment by segment, by unit in it, row by row in a mini-block.
        masks: [segments] int64; bit j of a segment is set where its unit j is stored.
        rows: [segments] uint8, the segment's strip in its row block.
        starts: [groups + 1] int64, where a group's mini-blocks begin.
    """

    layout = "block"
    parts = ("values", "masks", "rows", "starts")
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
        """Each (r, c) whose mini-blocks are nearly full here, so that it was pruned in that pattern or wider.

        (1, 2) whatever the pattern, as its pairs are worth a zero in each.
        """
        kept = dense.detach() != 0
        (n_rows, n_cols), total = kept.shape, int(kept.sum())
        if total == kept.numel():
            return []
        found = []
        for r, c in SIZES.get(dense.dtype, ()):
            padded = torch.nn.functional.pad(kept, (0, -n_cols % c, 0, -n_rows % r))
            filled = padded.view(padded.shape[0] // r, r, -1, c)
            if (r, c) == (1, 2) or 0 < total >= (1 - WASTE) * r * c * int(filled.any(3).any(1).sum()):
                found.append({"r": r, "c": c})
        return found

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32 or bfloat16, finite.
            params: r and c, rows and columns of a mini-block, as the class says; they need not divide N and K.

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
