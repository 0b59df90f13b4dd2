"""spectral in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np
import torch

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Aᵀ Bᵀ + X Sᵀ [T, N] of tokens [T, K]."""
    (n_rows, n_cols), rank = w.shape, w.params["rank"]
    per = 1 if w.tensors()[0].dtype == torch.float32 else 2
    y = tokens
    for tiles, n, k, width in zip(w.tensors()[4:], (rank, n_rows), (n_cols, rank), (32, 4), strict=True):
        lanes = -(-k // per)
        stored = tiles.double().numpy().reshape(-1, lanes, width, per)  # tile, lane, output in it, item of the lane
        y = y @ stored.transpose(0, 2, 1, 3).reshape(-1, lanes * per)[:n, :k].T
    values = w.tensors()[0].double().numpy()
    masks, rows, starts = (part.numpy() for part in w.tensors()[1:4])
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little").reshape(-1, 64 * per)
    segment = group = 0
    for first_row in range(0, n_rows, 128):
        for first_col in range(0, n_cols, 64 * per):
            at = int(starts[group])
            for _ in range(min(128, n_rows - first_row)):
                cols = first_col + bits[segment].nonzero()[0]
                y[:, first_row + int(rows[segment])] += tokens[:, cols] @ values[at : at + len(cols)]
                at += len(cols)
                segment += 1
            group += 1
    return y


linear = reference_linear(product)
