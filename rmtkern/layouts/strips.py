"""The storage that `bitmask` and `block` share: strips of r rows with one 64-bit mask for each 64 columns.

It knows neither PackedWeight nor kernels; csrc/linear/strips.inl reads the arrays.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_ROWS", "pack_strips", "unpack_strips"]

BLOCK_ROWS = 128
"""Rows of a row block; part of the format."""

Arrays = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def pack_strips(dense: NDArray[np.float32], r: int) -> Arrays:
    """Store a weight: only columns of a strip that have a non-zero.

    A strip is r consecutive rows (the last one is filled up with zeros). A segment is a strip's 64 consecutive columns
    (the last one may be shorter). A group is the segments of one row block (BLOCK_ROWS rows) and one column block.
    Groups lie row block by row block, and in it column block by column block; in a group the segments with more columns
    come first, equal counts by row, which lets a kernel predict its loops.

    Args:
        dense: [N, K] float32.
        r: rows of a strip, a divisor of BLOCK_ROWS.

    Returns:
        values [stored, r] float32, segment by segment, by column in it; masks [segments] int64, bit j set where column
        j is stored; rows [segments] uint8, the segment's strip in its row block; starts [groups + 1] int64, where a
        group's values begin.
    """
    n_rows, n_cols = dense.shape
    strips, blocks, tall = -(-n_rows // r), -(-n_cols // 64), BLOCK_ROWS // r
    padded = np.zeros((strips * r, blocks * 64), np.float32)
    padded[:n_rows, :n_cols] = dense
    stored = (padded != 0) if r == 1 else (padded.reshape(strips, r, -1) != 0).any(1)
    masks = np.packbits(stored, axis=1, bitorder="little").view("<i8")  # [strips, blocks]
    counts = np.bitwise_count(masks.view(np.uint64)).astype(np.int64)
    strip, block = np.divmod(np.arange(strips * blocks), blocks)
    order = np.lexsort((strip, -counts.ravel(), block, strip // tall))
    strip, block = strip[order], block[order]
    masks, counts = masks.ravel()[order], counts.ravel()[order]
    segments = padded.reshape(strips, r, blocks, 64).transpose(0, 2, 3, 1).reshape(-1, 64, r)[order]
    values = segments[stored.reshape(-1, 64)[order]] + np.float32(0)  # -0.0 + 0.0 is 0.0
    group = strip // tall * blocks + block
    starts = np.zeros(group[-1] + 2, np.int64)
    np.add.at(starts, group + 1, counts)
    return values, masks, (strip % tall).astype(np.uint8), starts.cumsum()


def unpack_strips(shape: tuple[int, int], r: int, arrays: Arrays) -> NDArray[np.float32]:
    """The dense weight [N, K] of what `pack_strips` returned."""
    n_rows, n_cols = shape
    strips, blocks, tall = -(-n_rows // r), -(-n_cols // 64), BLOCK_ROWS // r
    values, masks, rows, _ = arrays
    bits = np.unpackbits(masks.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little").astype(bool)
    segments = np.zeros((*bits.shape, r), np.float32)
    segments[bits] = values
    index = np.arange(len(masks))
    row_block = index // (tall * blocks)  # exact: only the last row block is shorter
    height = np.minimum(strips - row_block * tall, tall)
    block = (index - row_block * tall * blocks) // height
    dense = np.empty((strips, blocks, 64, r), np.float32)
    dense[row_block * tall + rows, block] = segments
    return dense.transpose(0, 3, 1, 2).reshape(strips * r, -1)[:n_rows, :n_cols].copy()
