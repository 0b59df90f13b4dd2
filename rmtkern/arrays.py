"""The only place that tells NumPy, CuPy and torch arrays apart.

Everything in `spectrum` is written against the array API and asks here for its namespace. Arrays on the CPU are
computed by NumPy whatever library holds them: its LAPACK is faster than torch's on AMD, and the memory is shared.
"""

import math
from typing import Any

import array_api_compat
import numpy as np
import torch

__all__ = ["Array", "as_computable", "cast", "check_finite", "like", "namespace", "to_numpy"]

Array = Any  # a NumPy, CuPy, torch or array-api-strict array


def namespace(*arrays: Array) -> Any:
    """Array-API namespace of the arrays; TypeError names what is not an array."""
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError:
        kinds = ", ".join(type(array).__name__ for array in arrays)
        raise TypeError(f"expected a NumPy, CuPy or torch array, got {kinds}; convert it first") from None


def as_computable(array: Array) -> Array:
    """The same data where it is fastest to compute on: a torch CPU tensor becomes a NumPy view, bf16/fp16 float32."""
    namespace(array)
    if isinstance(array, torch.Tensor):
        if array.is_meta:
            raise ValueError("expected a tensor with data, got a meta tensor; load the weights first")
        array = array.detach()
        if array.dtype in (torch.bfloat16, torch.float16):
            array = array.float()
        return array.numpy() if array.device.type == "cpu" else array
    xp = namespace(array)
    return xp.astype(array, xp.float32) if str(array.dtype).endswith("float16") else array


def like(result: Array, original: Array) -> Array:
    """The result as the kind and dtype of array that the caller gave."""
    if isinstance(original, torch.Tensor):
        tensor = result if isinstance(result, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(result))
        return tensor.to(original.dtype)
    return cast(result, original.dtype)


def cast(array: Array, dtype: Any) -> Array:
    """The array in another dtype, without a copy if it has it already."""
    return namespace(array).astype(array, dtype, copy=False)


def to_numpy(array: Array) -> np.ndarray:
    """Host copy (or view) as NumPy float64."""
    if isinstance(array, torch.Tensor):
        return array.detach().to("cpu", torch.float64).numpy()
    if array_api_compat.is_cupy_array(array):
        return array.get().astype(np.float64)
    return np.asarray(array, dtype=np.float64)


def check_finite(array: Array, name: str) -> None:
    """Refuse NaN and Inf by name."""
    xp = namespace(array)
    ends = (float(xp.max(array)), float(xp.min(array))) if 0 not in array.shape else ()  # NaN propagates
    if not all(map(math.isfinite, ends)):
        raise ValueError(f"{name} has NaN or Inf entries; expected finite weights: repair or reload the checkpoint")
