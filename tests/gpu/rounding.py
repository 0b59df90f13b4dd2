"""Numbers that NumPy has no type for, as a GPU rounds them: bfloat16 as uint16 bit patterns, TF32 as float32.

The repaired interpreter and the executor of PTX both use it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def bfloat16_to_float32(bits: Array) -> Array:
    """uint16 bit patterns -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """float32 -> uint16 bit patterns, rounded to nearest even as cvt.rn does."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def truncate_to_tf32(values: Array) -> Array:
    """float32 as a tensor core reads it: the low 13 bits are dropped."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return np.where(np.isfinite(values), (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), values)


def round_to_tf32(values: Array) -> Array:
    """float32 rounded to 10 bits of mantissa, ties away from zero, as cvt.rna.tf32 does."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)
