"""The only place that tells NumPy, CuPy and torch arrays apart.

Everything in `spectrum` is written against the array API and asks here for its namespace. Arrays on the CPU are
computed by NumPy whatever library holds them: its LAPACK is faster than torch's on AMD, and the memory is shared.
Tensors on a GPU are computed by CuPy or by torch (`computing`), again in the memory where they are.
"""

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import array_api_compat
import numpy as np
import torch

__all__ = [
    "ROUTES",
    "Array",
    "as_computable",
    "cast",
    "check_finite",
    "computing",
    "gpu_route",
    "like",
    "namespace",
    "returned",
    "shares_with_torch",
    "through_torch",
    "to_numpy",
]

Array = Any  # a NumPy, CuPy, torch or array-api-strict array

ROUTES = ("cupy", "torch")
"""What can compute tensors that lie on a GPU."""

_route: ContextVar[str] = ContextVar("route", default="torch")


def namespace(*arrays: Array) -> Any:
    """Array-API namespace of the arrays; TypeError names what is not an array."""
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError:
        kinds = ", ".join(type(array).__name__ for array in arrays)
        raise TypeError(f"expected a NumPy, CuPy or torch array, got {kinds}; convert it first") from None


def as_computable(array: Array, name: str = "the array") -> Array:
    """The same data where it is fastest to compute on; floats of fewer than 32 bits become float32, else no copy.

    A torch CPU tensor becomes a NumPy view; a CUDA tensor stays, or becomes a CuPy view inside `computing`.

    Raises:
        TypeError: no array, or one that does not hold a real number for each entry; it is called `name`.
        ValueError: a meta tensor.
    """
    xp = namespace(array)
    if (reason := _no_numbers(array)) is not None:
        raise TypeError(f"{name}: expected a dense array of real numbers, got {reason}")
    if isinstance(array, torch.Tensor):
        if array.is_meta:
            raise ValueError(f"{name}: expected a tensor with data, got a meta tensor; load the weights first")
        array = array.detach()
        if array.dtype.is_floating_point and array.dtype.itemsize < 4:
            array = array.float()
        if array.device.type == "cuda" and _route.get() == "cupy":
            return _cupy().from_dlpack(array)
        return array.numpy(force=True) if array.device.type == "cpu" else array
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # np.matrix multiplies otherwise
    return xp.astype(array, xp.float32) if str(array.dtype).endswith("float16") else array


def _no_numbers(array: Array) -> str | None:
    """What an array holds that is no real number for each entry, and what to do; None if it holds those."""
    if isinstance(array, torch.Tensor):
        if array.layout != torch.strided:
            return f"layout {array.layout}; call .to_dense()"
        if array.is_quantized:
            return f"dtype {array.dtype}; call .dequantize()"
        return f"dtype {array.dtype}; take .abs() or .real" if array.is_complex() else None
    if isinstance(array, np.ma.MaskedArray):
        return "a masked array; call .filled(0.0), or leave the masked rows out"
    if getattr(array.dtype, "kind", "") in tuple("cOSUMm"):
        return f"dtype {array.dtype}; convert it first"
    return None


def like(result: Array, original: Array) -> Array:
    """The result as the kind and dtype of array that the caller gave."""
    if isinstance(original, torch.Tensor):
        result = returned(result, original)
        tensor = result if isinstance(result, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(result))
        return tensor.to(original.dtype)
    return cast(result, original.dtype)


def returned(result: Array, original: Array) -> Array:
    """The result, as a torch view where CuPy only computed for a torch tensor."""
    if isinstance(original, torch.Tensor) and array_api_compat.is_cupy_array(result):
        return torch.from_dlpack(result)
    return result


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


def _cupy() -> Any:
    import cupy

    return cupy


def gpu_route() -> str:
    """What computes tensors on a GPU: the environment's RMTKERN_SPECTRA, else CuPy where it can run, else torch.

    Raises:
        ValueError: RMTKERN_SPECTRA is none of ROUTES, or "cupy" where CuPy is missing or sees no device.
    """
    asked = os.environ.get("RMTKERN_SPECTRA") or None
    if asked not in (None, *ROUTES):
        raise ValueError(f"RMTKERN_SPECTRA is {asked!r}; valid: {', '.join(ROUTES)}")
    if asked == "torch":
        return asked
    if importlib.util.find_spec("cupy") is None:
        reason = "the package cupy is not installed; install rmtkern[gpu-cuda13] or rmtkern[gpu-cuda12]"
    elif not _cupy().cuda.is_available():
        reason = "cupy sees no device; install the one of this machine's CUDA"
    else:
        return "cupy"
    if asked == "cupy":
        raise ValueError(f"RMTKERN_SPECTRA is 'cupy', but {reason}, or unset it to compute by torch")
    return "torch"


@contextmanager
def computing(arrays: Iterable[Array]) -> Iterator[None]:
    """Inside, `as_computable` gives CUDA tensors to the library that `gpu_route` names; float32 products are not TF32.

    CuPy then works on torch's current device and stream and takes its memory from torch, so that neither library waits
    for the other nor keeps memory from it.

    Args:
        arrays: what will be computed on, all on one device; without a torch tensor on a GPU nothing is changed.

    Raises:
        ValueError: as `gpu_route`, wherever the arrays are.
    """
    device = next((a.device for a in arrays if isinstance(a, torch.Tensor) and a.device.type == "cuda"), None)
    if device is None:
        if os.environ.get("RMTKERN_SPECTRA"):
            gpu_route()
        yield
        return
    route = gpu_route()
    with ExitStack() as stack:
        stack.enter_context(_exact_products())
        stack.enter_context(torch.cuda.device(device))
        if route == "cupy":
            cuda, stream = _cupy().cuda, torch.cuda.current_stream().cuda_stream
            stack.enter_context(cuda.Device(torch.cuda.current_device()))
            stack.enter_context(cuda.ExternalStream(stream))
            stack.enter_context(cuda.using_allocator(cuda.PythonFunctionAllocator(_allocate, _free).malloc))
        token = _route.set(route)
        try:
            yield
        finally:
            _route.reset(token)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Inside, torch's float32 products on a GPU are not rounded to TF32, whatever the user has set."""
    matmul: Any = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _allocate(size: int, device: int) -> int:
    """Address of `size` bytes of torch's memory pool, for work on torch's current stream."""
    return torch.cuda.caching_allocator_alloc(size, device, torch.cuda.current_stream(device))


def _free(address: int, device: int) -> None:
    torch.cuda.caching_allocator_delete(address)


def shares_with_torch(array: Array) -> bool:
    """Whether it is a CuPy array whose memory this torch can use, as `through_torch` does."""
    return bool(array_api_compat.is_cupy_array(array)) and torch.cuda.is_available()


def through_torch(function: str, array: Array) -> Any:
    """The result of a function of torch.linalg on another library's array, as that library's arrays; nothing is copied.

    Args:
        function: a name in torch.linalg, such as "eigh".
        array: floating point, NumPy or CuPy.

    Returns:
        An array, or a tuple of arrays where the function returns several.
    """
    xp = namespace(array)
    found = getattr(torch.linalg, function)(torch.from_dlpack(array))
    if isinstance(found, torch.Tensor):
        return xp.from_dlpack(found)
    return tuple(xp.from_dlpack(part) for part in found)
