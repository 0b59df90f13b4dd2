"""Repairs Triton's CPU interpreter, which is silently wrong for bfloat16 and TF32, and adds bounds checks to it.

Written for triton 3.8; needs TRITON_INTERPRET=1 before triton is imported. `test_interpreter.py` has a canary that
fails when Triton repairs its interpreter itself. It knows no kernel of ours.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gpu.rounding import bfloat16_to_float32, float32_to_bfloat16, round_to_tf32, truncate_to_tf32

Array = NDArray[Any]


class OutOfBounds(Exception):
    """A kernel read or wrote outside the tensors that it was given."""


# ---------------------------------------------------------------- numbers


def _scalar(dtype: Any) -> Any:
    return getattr(dtype, "scalar", dtype)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return _scalar(handle.dtype) == tl.bfloat16


def _values(handle: TensorHandle) -> Array:
    return bfloat16_to_float32(handle.data) if _is_bfloat16(handle) else handle.data


def _bfloat16(values: Array) -> TensorHandle:
    return TensorHandle(float32_to_bfloat16(values), tl.bfloat16)


def _product(x: Array, y: Array, precision: Any) -> Array:
    """x @ y of float32 as the tensor cores form it (Triton emits cvt.rna for the high part of tf32x3 only)."""
    if precision == ir.INPUT_PRECISION.TF32:
        return np.matmul(truncate_to_tf32(x), truncate_to_tf32(y))
    if precision != ir.INPUT_PRECISION.TF32x3:
        return np.matmul(x, y)
    with np.errstate(invalid="ignore"):
        return _three_products(x, y)


def _three_products(x: Array, y: Array) -> Array:
    """tf32x3: each operand as the sum of two TF32 numbers; low times low is left out."""
    x_high, y_high = round_to_tf32(x), round_to_tf32(y)
    x_low, y_low = truncate_to_tf32(x - x_high), truncate_to_tf32(y - y_high)
    correction = np.matmul(x_low, y_high) + np.matmul(x_high, y_low)
    return np.where(np.isnan(correction), 0, correction) + np.matmul(x_high, y_high)  # Inf - Inf; Triton does the same


def repair_numbers() -> None:
    """bfloat16 is computed in float32 and rounded to nearest; tf32 and tf32x3 drop the bits that the hardware drops."""
    builder = InterpreterBuilder
    stock_cast, stock_convert = builder.cast_impl, builder.create_fp_to_fp
    stock_binary, stock_unary = builder.binary_op, builder.unary_op

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        to = _scalar(target)
        if _scalar(source.dtype) == to:
            return TensorHandle(source.data, to)
        if to == tl.bfloat16:
            return _bfloat16(source.data.astype(np.float32))
        if _is_bfloat16(source):
            source = TensorHandle(_values(source), tl.float32)
            return source if to == tl.float32 else stock_cast(self, source, target)
        return stock_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        if _is_bfloat16(source) or _scalar(target) == tl.bfloat16:
            return cast_impl(self, source, target)
        return stock_convert(self, source, target, rounding)

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Callable[..., Array]) -> TensorHandle:
        if not (_is_bfloat16(left) and _is_bfloat16(right)):
            return stock_binary(self, left, right, op)
        result = op(_values(left), _values(right))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _bfloat16(result)

    def unary_op(self: Any, value: TensorHandle, op: Callable[..., Array]) -> TensorHandle:
        return _bfloat16(op(_values(value))) if _is_bfloat16(value) else stock_unary(self, value, op)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        # one rounding, as on the hardware: through float64
        result = _values(x).astype(np.float64) * _values(y) + _values(z)
        if _is_bfloat16(z):
            return _bfloat16(result.astype(np.float32))
        return TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: int
    ) -> TensorHandle:
        x, y = (_values(operand).astype(np.float32) for operand in (a, b))
        is_float32 = _scalar(a.dtype) == tl.float32
        product = _product(x, y, precision if is_float32 else None)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_fma, builder.create_dot = create_fma, create_dot
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(builder, f"create_{name}", cast_impl)


# ---------------------------------------------------------------- bounds

_extents: list[tuple[int, int]] = []  # [begin, end) in bytes of every tensor of the running kernel


def _extent(tensor: Any) -> tuple[int, int]:
    """The bytes of a view, not of its storage: a read beyond a slice is an error too."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check(pointers: TensorHandle, mask: Array, what: str) -> None:
    itemsize = max(1, _scalar(pointers.get_element_ty()).primitive_bitwidth // 8)
    addresses = np.asarray(pointers.data).astype(np.int64)
    active = addresses[np.broadcast_to(np.asarray(mask, bool), addresses.shape)]
    inside = np.zeros(active.shape, bool)
    for begin, end in _extents:
        inside |= (active >= begin) & (active + itemsize <= end)
    if inside.all():
        return
    first = int(active[~inside][0])
    begin, end = min(_extents, key=lambda extent: min(abs(first - extent[0]), abs(first - extent[1])))
    raise OutOfBounds(
        f"{what} of {itemsize} bytes out of bounds in {int((~inside).sum())} lanes; the first is {first - begin:+d}"
        f" bytes from a tensor of {end - begin} bytes; program {interpreter.interpreter_builder.grid_idx}"
    )


def check_bounds() -> None:
    """Every load, store and atomic must lie inside a tensor that the kernel was given, or OutOfBounds is raised."""
    builder = InterpreterBuilder
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_atomic, stock_arguments = builder.create_atomic_rmw, GridExecutor._init_args_hst

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any) -> TensorHandle:
        _check(pointers, mask.data, "load")
        return stock_load(self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        _check(pointers, mask.data, "store")
        return stock_store(self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointers: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> TensorHandle:
        _check(pointers, mask.data, "atomic")
        return stock_atomic(self, op, pointers, value, mask, *rest)

    def arguments(self: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        on_host, named = stock_arguments(self, args, kwargs)
        given = [value.base if isinstance(value, TensorDescriptor) else value for value in (*on_host, *named.values())]
        tensors = [value for value in given if hasattr(value, "untyped_storage")]
        _extents[:] = [_extent(tensor) for tensor in tensors]
        return on_host, named

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw = atomic
    GridExecutor._init_args_hst = arguments


def install() -> None:
    """Repair the interpreter of this process and check bounds; once."""
    if getattr(InterpreterBuilder, "_repaired", False):
        return
    repair_numbers()
    check_bounds()
    InterpreterBuilder._repaired = True
