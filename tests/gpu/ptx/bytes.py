"""Bytes that threads read and write at many offsets at once. It checks nothing."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.types import RAW

Array = NDArray[Any]
WIDEST = 32  # bytes of the widest access


class Bytes:
    """A block of bytes; offsets are multiples of the access' width."""

    def __init__(self, size: int, fill: int = 0) -> None:
        self.data = np.full(-(-size // WIDEST) * WIDEST, fill, np.uint8)
        self._views: dict[int, Array] = {}

    def _view(self, width: int) -> Array:
        if width not in self._views:
            unit = min(width, 8)
            self._views[width] = self.data.view(RAW[unit]).reshape(-1, width // unit)
        return self._views[width]

    def get(self, offsets: Array, width: int) -> Array:
        """The bytes [n, width] at offsets [n]."""
        return self._view(width)[offsets // width].view(np.uint8)

    def put(self, offsets: Array, values: Array) -> None:
        """Store bytes [n, width] at offsets [n]; of equal offsets the last wins."""
        width = values.shape[1]
        self._view(width)[offsets // width] = np.ascontiguousarray(values).view(RAW[min(width, 8)])

    def fill(self, offsets: Array, width: int, byte: int) -> None:
        """Set `width` bytes at offsets [n]."""
        self._view(width)[offsets // width] = np.full(8, byte, np.uint8).view(np.uint64).astype(RAW[min(width, 8)])[0]

    def all_set(self, offsets: Array, width: int) -> Array:
        """Whether all bytes are 0xFF, for offsets [n]."""
        view = self._view(width)
        return (view[offsets // width] == np.iinfo(view.dtype).max).all(1)
