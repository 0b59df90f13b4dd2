"""block in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Wᵀ [T, N] of tokens [T, K]."""
    n_rows, n_cols = w.shape
    r = w.params["r"]
    values, masks, rows, _ = (part.numpy() for part in w.tensors())
    strips, tall = -(-n_rows // r), 128 // r
    y = np.zeros((len(tokens), strips * r))
    at = segment = 0
    for first in range(0, strips, tall):
        for first_col in range(0, n_cols, 64):
            for _ in range(min(tall, strips - first)):
                mask = int(masks[segment]) % 2**64
                cols = [first_col + j for j in range(64) if mask >> j & 1]
                top = (first + int(rows[segment])) * r
                y[:, top : top + r] += tokens[:, cols] @ values[at : at + len(cols)].astype(np.float64)
                at += len(cols)
                segment += 1
    return y[:, :n_rows]


linear = reference_linear(product)
