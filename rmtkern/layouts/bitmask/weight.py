"""BitmaskWeight: how a weight with any zero pattern is stored. It knows no kernel; csrc/linear/bitmask.inl reads it."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense

__all__ = ["BLOCK_ROWS", "BitmaskWeight"]

BLOCK_ROWS = 128
"""Rows of a row block; part of the format."""


class BitmaskWeight(PackedWeight):
    """Non-zero values and a bit for every entry.

    A segment is a row's 64 consecutive columns (the last one may be shorter). A group is the segments of one row block
    (BLOCK_ROWS rows) and one column block. Groups lie row block by row block, and in it column block by column block;
    in a group the segments with more values come first, equal counts by row, which lets a kernel predict its loops.

    Parts:
        values: [nnz] float32, segment by segment, by column in it.
        masks: [segments] int64; bit j of a segment is set where its column j is not zero.
        rows: [segments] uint8, the segment's row in its row block.
        starts: [groups + 1] int64, where a group's values begin.
    """

    layout = "bitmask"
    parts = ("values", "masks", "rows", "starts")
    values: Tensor
    masks: Tensor
    rows: Tensor
    starts: Tensor

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, finite.
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
        n_rows, n_cols = dense.shape
        blocks = -(-n_cols // 64)
        padded = np.zeros((n_rows, blocks * 64), np.float32)
        padded[:, :n_cols] = dense.detach().cpu().numpy()
        masks = np.packbits(padded != 0, axis=1, bitorder="little").view("<i8")  # [N, blocks]
        counts = np.bitwise_count(masks.view(np.uint64)).astype(np.int64)
        row, block = np.divmod(np.arange(n_rows * blocks), blocks)
        order = np.lexsort((row, -counts.ravel(), block, row // BLOCK_ROWS))
        row, block = row[order], block[order]
        masks, counts = masks.ravel()[order], counts.ravel()[order]
        segments = padded.reshape(-1, 64)[order]
        group = row // BLOCK_ROWS * blocks + block
        starts = np.zeros(group[-1] + 2, np.int64)
        np.add.at(starts, group + 1, counts)
        arrays = (segments[segments != 0], masks, (row % BLOCK_ROWS).astype(np.uint8), starts.cumsum())
        tensors = tuple(torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in arrays)
        return cls((n_rows, n_cols), {}, tensors)

    def unpack(self) -> Tensor:
        """The dense weight [N, K] float32, bit for bit (-0.0 has become 0.0)."""
        n_rows, n_cols = self.shape
        blocks = -(-n_cols // 64)
        values, masks, rows, _ = (part.cpu().numpy() for part in self.tensors())
        bits = np.unpackbits(masks.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little").astype(bool)
        segments = np.zeros(bits.shape, np.float32)
        segments[bits] = values
        row_block = np.arange(len(masks)) // (BLOCK_ROWS * blocks)  # exact: only the last row block is shorter
        height = np.minimum(n_rows - row_block * BLOCK_ROWS, BLOCK_ROWS)
        block = (np.arange(len(masks)) - row_block * BLOCK_ROWS * blocks) // height
        dense = np.empty((n_rows, blocks, 64), np.float32)
        dense[row_block * BLOCK_ROWS + rows, block] = segments
        return torch.from_numpy(dense.reshape(n_rows, -1)[:, :n_cols].copy()).to(self.values.device)
