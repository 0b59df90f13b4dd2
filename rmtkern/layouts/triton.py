"""What the Triton kernels share: the custom op, what it supports, the order of tiles and the epilogue.

It knows no layout by name: a kernel is `launch` in layouts/<layout>/triton.py. Importing this file imports triton.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkern.errors import refuse_onnx
from rmtkern.gpu import FEATURES, ROWS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.gpu_configs import candidates, choose, shape_class
from rmtkern.triton_target import INTERPRETED, reason_against_device, target

__all__ = ["DTYPES", "FEATURES", "GROUP", "ROWS", "finish", "linear", "rows_at", "run", "supports", "target", "tile_of"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP = 8  # tiles of tokens that are computed before the next columns of W are read


@triton.jit
def tile_of(pid, T, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Output tile (row, column) of a program: GROUP tiles of tokens share the columns of W while these are in L2."""
    rows = tl.cdiv(T, BM)
    columns = tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def rows_at(ptr, first, count, stride, BLOCK: tl.constexpr):
    """Pointers [BLOCK, 1] to rows first, first + 1, ... of a matrix; past its last row, to the last row once more.

    Only the first row's offset is counted in 64 bits (a scalar); within a tile 32 bits do, as FEATURES promises.
    """
    rows = tl.minimum(tl.arange(0, BLOCK), count - 1 - first)
    return ptr + first.to(tl.int64) * stride + (rows * stride)[:, None]


@triton.jit
def finish(
    acc,
    pointers,
    first,
    T,
    N,
    F,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """Store activation(acc + bias) * scale + residual [BM, BN] at `first`, computed in float32.

    GATED: the columns of acc are 8 of a gate, the same 8 of the up (pairs.py); activation(gate) * up [BM, BN / 2] takes
    the place of the activation's result, and y has F columns.
    pointers: (bias, scale, residual, y); first: (row, column).
    """
    bias_ptr, scale_ptr, residual_ptr, y_ptr = pointers
    first_row, first_column = first
    columns = first_column + tl.arange(0, BN)
    inside = columns < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        chunks = acc.reshape(BM, BN // 16, 2, 8).permute(0, 1, 3, 2)
        acc, up = chunks.split()
        acc = acc.reshape(BM, BN // 2)
        columns = first_column // 2 + tl.arange(0, BN // 2)
        inside = columns < F
    if ACTIVATION == "gelu":
        acc = acc * 0.5 * (1.0 + tl.erf(acc * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))  # = x / 2 (1 + tanh(..))
    elif ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    elif ACTIVATION == "relu":
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN
    if GATED:
        acc *= up.reshape(BM, BN // 2)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    start = first_row.to(tl.int64) * y_stride
    rows = tl.arange(0, BM)
    offsets = (rows * y_stride)[:, None] + columns[None, :]
    mask = (rows < T - first_row)[:, None] & inside[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


def supports(w: PackedWeight, x: Tensor) -> str | None:
    """Why the Triton kernels cannot compute x [T, K] times this weight, or None if they can."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; cast to {' or '.join(str(dtype) for dtype in DTYPES)}"
    parts = w.tensors()
    if (held := next(part.dtype for part in parts if part.is_floating_point())) != x.dtype:
        return f"x is {x.dtype}, the weight {held}; cast one to the other's dtype"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x is on {x.device}; move the model and x to cuda"
    if any(part.device != x.device for part in parts):
        return f"x is on {x.device}, the weight on {parts[0].device}; move both to one device"
    if max(w.shape) >= FEATURES:
        return f"the weight is {w.shape}; N and K must be less than 2^23"
    if max(x.numel() // w.shape[1], *(part.numel() for part in parts if part.ndim == 1), 0) >= ROWS:
        return "tokens or stored values reach 2^31; split the call"
    return reason_against_device(x.device)


_tuned: dict[Any, Any] = {}


def run(
    kernel: Any,
    layout: str,
    x: Tensor,
    features: int,
    arguments: Callable[[int, str], dict[str, Any]],
    block: tuple[int, int] | None = None,
    prepare: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Launch a tile kernel with the table's config, or with the fastest of the table if RMTKERN_AUTOTUNE is 1.

    Args:
        kernel: a `triton.jit` function with constexprs BM, BN, BK and a grid of one program per output tile.
        layout: whose table to use.
        x: [T, K].
        features: N, rows of W.
        arguments: (a multiple of every BK that may run, architecture) -> the kernel's other arguments by name.
        block: rows and columns of a block of W, within which a tile must lie; None: W has no blocks.
        prepare: changes those arguments that depend on the tile, given all by name; None: none does.
    """
    arch = target()
    (tokens, k), itemsize = x.shape, x.element_size()
    aligned = features % 16 == 0 and k % 16 == 0
    config = choose(layout, itemsize, arch, tokens, aligned, block)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(tokens, meta["BM"]) * triton.cdiv(features, meta["BN"]),)

    if os.environ.get("RMTKERN_AUTOTUNE") == "1" and not INTERPRETED:
        tiles = candidates(layout, itemsize, arch, aligned, block)
        key = (kernel, x.dtype, arch, tiles, shape_class(tokens))
        if key not in _tuned:
            configs = [
                triton.Config(
                    {"BM": c.bm, "BN": c.bn, "BK": c.bk}, num_warps=c.warps, num_stages=c.stages, pre_hook=prepare
                )
                for c in tiles
            ]
            _tuned[key] = triton.autotune(configs=configs, key=["N", "K"])(kernel)
        step = max(c.bk for c in tiles)  # powers of two: a multiple of each
        _tuned[key][grid](**arguments(step, arch))
        return
    named = {**arguments(config.bk, arch), "BM": config.bm, "BN": config.bn, "BK": config.bk}
    if prepare is not None:
        prepare(named)
    kernel[grid](**named, num_warps=config.warps, num_stages=config.stages)


@torch.library.custom_op("rmtkern::triton_linear", mutates_args=())
def _triton_linear(
    layout: str,
    x: Tensor,
    features: int,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    y = x.new_empty(x.shape[0], features)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        importlib.import_module(f"rmtkern.layouts.{layout}.triton").launch(
            y, x, parts, bias, activation, residual, scale, gated
        )
    return y


@_triton_linear.register_fake
def _(
    layout: str,
    x: Tensor,
    features: int,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    refuse_onnx()
    return x.new_empty(x.shape[0], features)


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
) -> Tensor:
    """Apply a packed weight in one Triton kernel: y = activation(x Wᵀ + bias) * scale + residual.

    With `gated` = F > 0 the rows of `w` and `bias` are a gate-up pair (pairs.py): y [T, F] = activation(x Wgᵀ + bg) *
    (x Wuᵀ + bu) * scale + residual.

    Args:
        x: [T, K] float32, float16 or bfloat16, contiguous.
        w: packed [N, K], dtype and device of `x`.
        bias: [N] or None, dtype and device of `x` as all others.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        residual: [T, N] ([T, F] if gated) or None, contiguous, added last.
        scale: [N] ([F] if gated) or None, multiplied after the activation.
        gated: F, or 0.

    Returns:
        [T, N] ([T, F] if gated), dtype of `x`; summed in float32, rounded once.

    Raises:
        ValueError: a tensor is on another device than `x`.
        KernelUnavailable: the device's architecture is not supported.
    """
    for name, tensor in (("bias", bias), ("residual", residual), ("scale", scale)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {tensor.device}; move it")
    features = gated or w.shape[0]
    return torch.ops.rmtkern.triton_linear(
        w.layout, x, features, list(w.gpu_tensors()), bias, activation, residual, scale, gated > 0
    )
