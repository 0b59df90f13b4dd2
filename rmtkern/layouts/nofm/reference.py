"""nofm in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np
import torch

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Wᵀ [T, N] of tokens [T, K]."""
    n_rows, n_cols = w.shape
    y = np.zeros((len(tokens), n_rows))
    values, masks = w.tensors()[0].double().numpy(), w.tensors()[1].numpy()
    if "r" in w.params:
        line = word = 0
        for first in range(0, -(-n_rows // 4), 32):
            for before in range(0, n_cols // 4, 16):
                for strip in range(first, min(first + 32, -(-n_rows // 4))):
                    for group in range(before, min(before + 16, n_cols // 4)):
                        code = int(masks[word]) >> 4 * (group - before) & 15
                        for i, column in enumerate(((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))[code]):
                            for row in range(4 * strip, min(4 * strip + 4, n_rows)):
                                y[:, row] += tokens[:, 4 * group + column] * values[line, 2 * (row % 4) + i]
                        line += 1
                    word += 1
        return y
    if w.tensors()[0].dtype == torch.bfloat16:
        groups = n_cols // 4
        for row in range(n_rows):
            for group in range(groups):
                line, lane = row // 16 * groups + group, row % 16
                for i in range(2):
                    byte = int(masks[row // 16 * -(-groups // 2) + group // 2, 4 * lane + 2 * i])
                    column = (byte >> 4 * (group % 2) & 15) // 2
                    y[:, row] += tokens[:, 4 * group + column] * values[line, 2 * lane + i]
        return y
    for row in range(n_rows):
        cols = [col for col in range(n_cols) if int(masks[row, col // 64]) >> (col % 64) & 1]
        y[:, row] = tokens[:, cols] @ values[row]
    return y


linear = reference_linear(product)
