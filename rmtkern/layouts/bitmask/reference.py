"""bitmask in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np
import torch

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Wᵀ [T, N] of tokens [T, K]."""
    n_rows, n_cols = w.shape
    words = 1 if w.tensors()[0].dtype == torch.float32 else 2
    values = w.tensors()[0].double().numpy()
    masks, rows, starts = (part.numpy() for part in w.tensors()[1:])
    y = np.zeros((len(tokens), n_rows))
    segment = group = 0
    for first_row in range(0, n_rows, 128):
        for first_col in range(0, n_cols, 64 * words):
            at = int(starts[group])
            for _ in range(min(128, n_rows - first_row)):
                mask = sum(int(masks[segment * words + i]) % 2**64 << 64 * i for i in range(words))
                cols = [first_col + j for j in range(64 * words) if mask >> j & 1]
                kept = values[at : at + len(cols)]
                y[:, first_row + int(rows[segment])] += tokens[:, cols] @ kept
                at += len(cols)
                segment += 1
            group += 1
    return y


linear = reference_linear(product)
