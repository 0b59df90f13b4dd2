"""bitmask in NumPy float64, written from the format in weight.py and sharing no code with it."""

import numpy as np
import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import finish

__all__ = ["linear", "supports"]


def supports(w: PackedWeight, x: Tensor) -> str | None:
    """Why the reference cannot compute this, or None if it can: it needs tensors on the CPU."""
    return None if x.device.type == "cpu" else f"device {x.device}; the reference runs on the cpu"


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(x Wᵀ + bias) + residual in float64; a zero of W multiplies nothing, not even Inf.

    Args:
        x: [T, K], any float dtype.
        w: packed [N, K].
        bias: [N] or None.
        activation: see layouts/reference.py.
        residual: [T, N] or None.

    Returns:
        [T, N] in the dtype of x, rounded once.
    """
    n_rows, n_cols = w.shape
    values, masks, rows, starts = (part.numpy() for part in w.tensors())
    tokens = x.detach().double().numpy()
    y = np.zeros((len(tokens), n_rows))
    segment = group = 0
    with np.errstate(invalid="ignore"):
        for first_row in range(0, n_rows, 128):
            for first_col in range(0, n_cols, 64):
                at = int(starts[group])
                for _ in range(min(128, n_rows - first_row)):
                    mask = int(masks[segment]) % 2**64
                    cols = [first_col + j for j in range(64) if mask >> j & 1]
                    kept = values[at : at + len(cols)].astype(np.float64)
                    y[:, first_row + int(rows[segment])] += tokens[:, cols] @ kept
                    at += len(cols)
                    segment += 1
                group += 1
    out = finish(
        y,
        None if bias is None else bias.detach().double().numpy(),
        activation,
        None if residual is None else residual.detach().double().numpy(),
    )
    return torch.from_numpy(out).to(x.dtype)
