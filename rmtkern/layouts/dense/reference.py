"""NumPy float64 reference of the layout `dense`: y = act(x Wᵀ + b) + r from the definition."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import PackedWeight

__all__ = ["linear", "supports"]

_erf = np.vectorize(math.erf, otypes=[np.float64])
_ACTIVATIONS = {
    None: lambda z: z,
    "gelu": lambda z: z * 0.5 * (1.0 + _erf(z / math.sqrt(2.0))),
    "gelu_tanh": lambda z: 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: np.maximum(z, 0.0),
    "silu": lambda z: z / (1.0 + np.exp(-z)),
}
