"""block in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Wᵀ [T, N] of tokens [T, K]; a zero in a stored mini-block of bfloat16 multiplies nothing."""
    n_rows, n_cols = w.shape
    r, c = w.params["r"], w.params["c"]
    values, masks, rows = w.tensors()[0].double().numpy(), w.tensors()[1].numpy(), w.tensors()[2].numpy()
    strips, tall = -(-n_rows // r), 128 // r
    y = np.zeros((len(tokens), strips * r))
    tokens = np.pad(tokens, ((0, 0), (0, -n_cols % c)))
    at = segment = 0
    for first in range(0, strips, tall):
        for first_col in range(0, n_cols, 64 * c):
            for _ in range(min(tall, strips - first)):
                mask = int(masks[segment]) % 2**64
                top = (first + int(rows[segment])) * r
                for j in range(64):
                    if mask >> j & 1:
                        left, block = first_col + j * c, values[at].reshape(r, c)
                        if c == 2:
                            for row, col in np.argwhere(block):
                                y[:, top + row] += tokens[:, left + col] * block[row, col]
                        else:
                            y[:, top : top + r] += tokens[:, left : left + c] @ block.T
                        at += 1
                segment += 1
    return y[:, :n_rows]


linear = reference_linear(product)
