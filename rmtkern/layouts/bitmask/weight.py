"""BitmaskWeight: how a weight with any zero pattern is stored. It knows no kernel; csrc/linear/bitmask.inl reads it."""

from typing import Self

import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.strips import masks_by_row, pack_strips, rows_damage, unpack_strips

__all__ = ["BitmaskWeight"]

WORDS = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2}
"""64-bit words of a segment's mask: 64 columns, or 128 of bfloat16, which the CPU kernels take in pairs."""


class BitmaskWeight(PackedWeight):
    """Non-zero values and a bit for every entry.

    The storage of strips.py with strips of one row and units of one column.

    Parts:
        values: [nnz] float32, bfloat16 or float16 (the last on a GPU only), segment by segment, by column in it.
        masks: [segments * words] int64; bit j of a segment is set where its column j is not zero.
        rows: [segments] uint8, the segment's row in its row block.
        starts: [groups + 1] int64, where a group's values begin.

    On a GPU the masks are also held in the order of the rows (`gpu_form`). The values are not moved.

    On a CPU a call in bfloat16 with more tokens than a panel (96 with AVX-512) first writes the pairs as `block` 1x2
    stores them, at most 4 bytes for each value and 1 bit for each pair of columns, into memory of the calling thread
    that all weights share.
    """

    layout = "bitmask"
    parts = ("values", "masks", "rows", "starts")
    streamed = ("values",)
    gpu_stored = ("values",)
    gpu_parts = ("row_masks", "row_starts")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    values: Tensor
    masks: Tensor
    rows: Tensor
    starts: Tensor

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, bfloat16 or float16, finite.
            params: none; the layout has no choices.

        Returns:
            The packed weight, on the device of `dense`.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape or dtype, NaN or Inf, or params.
        """
        if params:
            raise ValueError(f"bitmask takes no params, got {sorted(params)}")
        check_dense(dense, cls.dtypes, cls.layout)
        values, *rest = pack_strips(dense, 1, words=WORDS[dense.dtype])
        return cls((dense.shape[0], dense.shape[1]), {}, (values[:, 0], *rest))

    def unpack(self) -> Tensor:
        """The dense weight [N, K] in the packed dtype, bit for bit (-0.0 has become 0.0)."""
        parts = (self.values[:, None], self.masks, self.rows, self.starts)
        return unpack_strips(self.shape, 1, parts, words=len(self.masks) // len(self.rows))

    def damage(self) -> str | None:
        """Rows that are not each strip of a group once."""
        return rows_damage(self.shape, self.rows, 1, words=len(self.masks) // len(self.rows))

    def gpu_form(self) -> tuple[Tensor, ...]:
        """The masks in the order of the rows, 12 bytes for 64 entries.

        Returns:
            row_masks [C, N] int64, bit j of [c, n] set where W[n, 64 c + j] is not zero, and row_starts [C, N] int32,
            where in `values` the first entry of that mask lies. C >= ceil(K / 64).
        """
        return masks_by_row(self.shape, self.masks, self.rows)
