"""lowrank in NumPy float64, written from the format in weight.py and sharing no code with it."""

import torch

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Aᵀ Bᵀ [T, N] of tokens [T, K]."""
    rank, per = w.params["rank"], 1 if w.tensors()[0].dtype == torch.float32 else 2
    for tiles, n, k in zip(w.tensors(), (rank, w.shape[0]), (w.shape[1], rank), strict=True):
        lanes = -(-k // per)
        stored = tiles.double().numpy().reshape(-1, lanes, 32, per)  # tile, lane, output in it, item of the lane
        factor = stored.transpose(0, 2, 1, 3).reshape(-1, lanes * per)
        tokens = tokens @ factor[:n, :k].T
    return tokens


linear = reference_linear(product)
