"""The storage of dense factors for our own kernels: tiles of outputs, so that outputs lie in the lanes of a vector.

It knows neither PackedWeight nor kernels; csrc/linear/tile.inl reads the arrays.
"""

import torch
from torch import Tensor

__all__ = ["TILE", "pack_tiles", "tiles_damage", "unpack_tiles"]

TILE = 32
"""Outputs of a tile; part of the format."""


def pack_tiles(dense: Tensor, width: int = TILE) -> Tensor:
    """Store a dense matrix in tiles of `width` rows.

    A lane is 32 bits: one float32, or two bfloat16 that are neighbours in a row. Rows and an odd bfloat16 column are
    filled up with zeros.

    Args:
        dense: [N, K] float32 or bfloat16, any device.
        width: rows of a tile.

    Returns:
        [ceil(N / width) * lanes, width * items of a lane], dtype of `dense`: tile by tile, lane by lane, row by row.
    """
    n, k = dense.shape
    per = 2 if dense.dtype == torch.bfloat16 else 1
    tiles, lanes = -(-n // width), -(-k // per)
    padded = dense.new_zeros(tiles * width, lanes * per)
    padded[:n, :k] = dense
    return padded.view(tiles, width, lanes, per).permute(0, 2, 1, 3).reshape(tiles * lanes, width * per).contiguous()


def unpack_tiles(tiles: Tensor, shape: tuple[int, int], width: int = TILE) -> Tensor:
    """The dense matrix `shape` = (N, K) of what `pack_tiles` returned, contiguous, on its device."""
    n, k = shape
    per = tiles.shape[1] // width
    lanes = -(-k // per)
    dense = tiles.view(-1, lanes, width, per).permute(0, 2, 1, 3).reshape(-1, lanes * per)
    return dense[:n, :k].contiguous()


def tiles_damage(tiles: Tensor, shape: tuple[int, int], width: int = TILE) -> str | None:
    """What is wrong with what should be `pack_tiles` of a matrix `shape`, or None: what fills up is zero.

    Kernels multiply it, so that a large number there would overflow beside the matrix.
    """
    filled = torch.equal(pack_tiles(unpack_tiles(tiles, shape, width), width), tiles)
    return None if filled else "what fills up the tiles of its factors is not zero"
