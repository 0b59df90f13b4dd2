"""nofm in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Wᵀ [T, N] of tokens [T, K]."""
    n_rows, n_cols = w.shape
    values, masks = (part.numpy() for part in w.tensors())
    y = np.zeros((len(tokens), n_rows))
    for row in range(n_rows):
        cols = [col for col in range(n_cols) if int(masks[row, col // 64]) >> (col % 64) & 1]
        y[:, row] = tokens[:, cols] @ values[row].astype(np.float64)
    return y


linear = reference_linear(product)
