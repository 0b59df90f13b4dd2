"""dense in NumPy float64: the product of the definition."""

import numpy as np

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.reference import Float, reference_linear, supports

__all__ = ["linear", "supports"]


def product(tokens: Float, w: PackedWeight) -> Float:
    """X Wᵀ [T, N] of tokens [T, K]."""
    return np.asarray(tokens @ w.tensors()[0].detach().double().numpy().T)


linear = reference_linear(product)
