"""The storage that `bitmask` and `block` share: strips of r rows with a bit for each column or pair of columns.

It knows neither PackedWeight nor kernels; csrc/linear/strips.inl reads the arrays.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmtkern.layouts.base import INTEGERS, as_integers

__all__ = ["BLOCK_ROWS", "blocks_by_strip", "masks_by_row", "pack_strips", "rows_damage", "unpack_strips"]

BLOCK_ROWS = 128
"""Rows of a row block; part of the format."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def pack_strips(dense: Tensor, r: int, c: int = 1, words: int = 1) -> Parts:
    """Store a weight: only the units of a strip that have a non-zero.

    A strip is r consecutive rows, a unit c consecutive columns of it (the last ones are filled up with zeros). A
    segment is a strip's 64 * words consecutive units (the last one may be shorter). A group is the segments of one row
    block (BLOCK_ROWS rows) and one column block. Groups lie row block by row block, and in it column block by column
    block; in a group the segments that cost more come first, equal ones by row, which lets a kernel predict its loops.
    The cost is the number of units, and with two words (bfloat16 entries that a kernel pairs up) that of their pairs.

    Args:
        dense: [N, K] float32, bfloat16 or float16, any device.
        r: rows of a strip, a divisor of BLOCK_ROWS.
        c: columns of a unit.
        words: 64-bit words of a segment's mask.

    Returns:
        values [stored, r * c] in the dtype of `dense`, segment by segment, by unit in it, row by row in a unit; masks
        [segments * words] int64, bit j set where unit j is stored; rows [segments] uint8, the segment's strip in its
        row block; starts [groups + 1] int64, where a group's units begin.
    """
    n_rows, n_cols = dense.shape
    bits = as_integers(dense)
    width = 64 * words
    strips, blocks, tall = -(-n_rows // r), -(-n_cols // (width * c)), BLOCK_ROWS // r
    padded = np.zeros((strips * r, blocks * width * c), bits.dtype)
    padded[:n_rows, :n_cols] = bits
    units = padded.reshape(strips, r, blocks, width, c)
    stored = (units != 0).any((1, 4))  # [strips, blocks, width]
    costs = stored.sum(-1) if words == 1 else stored.reshape(strips, blocks, width // 2, 2).any(-1).sum(-1)
    strip, block = np.divmod(np.arange(strips * blocks), blocks)
    order = np.lexsort((strip, -costs.ravel(), block, strip // tall))
    strip, block = strip[order], block[order]
    stored = stored.reshape(-1, width)[order]
    masks = np.packbits(stored, axis=1, bitorder="little").view("<i8")
    values = units.transpose(0, 2, 3, 1, 4).reshape(-1, width, r * c)[order][stored]
    group = strip // tall * blocks + block
    starts = np.zeros(group[-1] + 2, np.int64)
    np.add.at(starts, group + 1, stored.sum(-1))
    arrays = (values, masks.ravel(), (strip % tall).astype(np.uint8), starts.cumsum())
    parts = [torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in arrays]
    return parts[0].view(dense.dtype), parts[1], parts[2], parts[3]


def _places(rows: NDArray[Any], strips: int, blocks: int, tall: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The strip and the column block of each segment."""
    index = np.arange(len(rows))
    row_block = index // (tall * blocks)  # exact: only the last row block is shorter
    height = np.minimum(strips - row_block * tall, tall)
    return row_block * tall + rows, (index - row_block * tall * blocks) // height


def rows_damage(shape: tuple[int, int], rows: Tensor, r: int, c: int = 1, words: int = 1) -> str | None:
    """What is wrong with `rows` of `pack_strips`, or None: the segments of a group are one of each of its strips.

    A strip that stood there twice would be summed by a kernel and overwritten by `unpack_strips`.

    Args:
        shape: (N, K).
        rows: [segments] uint8; as many as the shape has.
        r: rows of a strip.
        c: columns of a unit.
        words: 64-bit words of a segment's mask.
    """
    strips, blocks, tall = -(-shape[0] // r), -(-shape[1] // (64 * words * c)), BLOCK_ROWS // r
    strip, block = _places(rows.cpu().numpy(), strips, blocks, tall)
    counts = np.bincount(strip * blocks + block, minlength=strips * blocks)
    return None if len(counts) == strips * blocks and bool((counts == 1).all()) else "rows do not have each strip once"


def masks_by_row(shape: tuple[int, int], masks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The masks of strips of one row and units of one column in the order of rows, and where each one's values begin.

    Args:
        shape: (N, K).
        masks: [segments * words] int64 of `pack_strips`, 1 or 2 words.
        rows: [segments] uint8.

    Returns:
        masks [C, N] int64 and places [C, N] int32 in `values`, for each 64 columns of W; C is ceil(K / 64), rounded up
        to a multiple of the words. On the device of `masks`.
    """
    n, k = shape
    words = len(masks) // len(rows)
    blocks = -(-k // (64 * words))
    segments = masks.cpu().numpy().reshape(-1, words)
    counts = np.bitwise_count(segments.view(np.uint64)).astype(np.int64).ravel()
    begin = (counts.cumsum() - counts).reshape(-1, words)  # values lie segment by segment, by column in it
    row, block = _places(rows.cpu().numpy(), n, blocks, BLOCK_ROWS)
    ordered, places = np.empty((blocks, words, n), np.int64), np.empty((blocks, words, n), np.int32)
    ordered[block, :, row], places[block, :, row] = segments, begin
    return tuple(torch.from_numpy(array.reshape(-1, n)).to(masks.device) for array in (ordered, places))  # type: ignore[return-value]


def blocks_by_strip(
    shape: tuple[int, int], r: int, c: int, masks: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The stored units of each strip by column: the index of block compressed rows (BSR), whose values stay in place.

    Args:
        shape: (N, K).
        r: rows of a strip.
        c: columns of a unit.
        masks: [segments] int64 of `pack_strips`, one word.
        rows: [segments] uint8.

    Returns:
        begins [ceil(N / r) + 1] int32, where a strip's units begin in the next two; columns [stored] int32, which unit
        of the strip it is (its first column is c times that); places [stored] int32, its row in `values`. On the
        device of `masks`.
    """
    n, k = shape
    strips, blocks, tall = -(-n // r), -(-k // (64 * c)), BLOCK_ROWS // r
    bits = np.unpackbits(masks.cpu().numpy().view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    segment, unit = bits.nonzero()  # in the order of the values
    strip, block = _places(rows.cpu().numpy(), strips, blocks, tall)
    owner, column = strip[segment], 64 * block[segment] + unit
    places = np.lexsort((column, owner))
    begins = np.zeros(strips + 1, np.int64)
    np.bincount(owner, minlength=strips).cumsum(out=begins[1:])
    arrays = (begins, column[places], places)
    return tuple(torch.from_numpy(array.astype(np.int32)).to(masks.device) for array in arrays)  # type: ignore[return-value]


def unpack_strips(shape: tuple[int, int], r: int, parts: Parts, c: int = 1, words: int = 1) -> Tensor:
    """The dense weight [N, K] of what `pack_strips` returned, on its device."""
    n_rows, n_cols = shape
    width = 64 * words
    strips, blocks, tall = -(-n_rows // r), -(-n_cols // (width * c)), BLOCK_ROWS // r
    values, masks, rows = parts[0].cpu(), parts[1].cpu().numpy(), parts[2].cpu().numpy()
    bits = np.unpackbits(masks.view(np.uint8).reshape(-1, 8 * words), axis=1, bitorder="little").astype(bool)
    entries = values.view(INTEGERS[values.dtype]).numpy()
    segments = np.zeros((*bits.shape, r * c), entries.dtype)
    segments[bits] = entries
    strip, block = _places(rows, strips, blocks, tall)
    units = np.empty((strips, blocks, width, r, c), entries.dtype)
    units[strip, block] = segments.reshape(-1, width, r, c)
    dense = units.transpose(0, 3, 1, 2, 4).reshape(strips * r, -1)[:n_rows, :n_cols]
    return torch.from_numpy(np.ascontiguousarray(dense)).view(values.dtype).to(parts[0].device)
