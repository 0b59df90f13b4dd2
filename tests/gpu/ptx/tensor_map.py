"""A tensor map: what the copy engine (TMA) knows of a matrix in global memory and of the tile that it fetches."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
PIECE = 16  # bytes that stay together under every swizzle


@dataclass(frozen=True)
class TensorMap:
    """A matrix with contiguous rows, and a box of it.

    Args:
        tensor: [rows, columns].
        box: rows and columns of a copy.
        swizzle: 0 none, 1 to 3 for spans of 32, 64 and 128 bytes (CUtensorMapSwizzle).
    """

    tensor: Tensor
    box: tuple[int, int]
    swizzle: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.tensor.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of a box."""
        return self.box[0] * self.box[1] * self.itemsize

    def source(self, row: int, column: int) -> tuple[Array, Array, Array]:
        """(row in the box, first byte in the box's row, offset in the matrix) of the elements that lie inside it."""
        rows = np.arange(row, row + self.box[0])[:, None]
        columns = np.arange(column, column + self.box[1])[None, :]
        inside = (rows >= 0) & (rows < self.tensor.shape[0]) & (columns >= 0) & (columns < self.tensor.shape[1])
        offsets = (rows * self.tensor.stride(0) + columns) * self.itemsize
        in_row, in_column = np.nonzero(inside)
        return in_row, in_column * self.itemsize, offsets[inside]

    def target(self, address: int) -> Array:
        """Addresses [pieces] in shared memory of the pieces of 16 bytes of a box that begins at `address`."""
        ends = address + np.arange(0, self.nbytes, PIECE)
        exchanged = (0, 1, 3, 7)[self.swizzle]
        return np.asarray(ends ^ (ends >> 7 & exchanged) << 4)


class MappedTensor(NamedTuple):
    """A tensor map as a kernel gets it, and where its tensor begins in global memory."""

    map: TensorMap
    address: int
