"""A product with a sparse weight in Triton, alone or with a product of low rank beside it: for bitmask and spectral.

W is loaded as masks and values, expanded in registers and multiplied as a dense tile: it saves memory traffic, not
products, so it can only pay for few tokens. An Inf in x meets the zeros of W, as in dense.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rmtkern.layouts.gpu_configs import precision
from rmtkern.layouts.triton import GROUP, finish, rows_at, run, tile_of

__all__ = ["strips_kernel", "strips_product"]


@triton.jit
def population(x):
    """Bits set in each uint32, as int32: the idiom that LLVM turns into one instruction where there is one."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def expand(values_ptr, mask, start):
    """Dense rows [BN, 64] from one int64 mask and the place of the first value of each row [BN]."""
    column = tl.arange(0, 64)[None, :]
    low = mask.to(tl.uint32)[:, None]
    high = (mask >> 32).to(tl.uint32)[:, None]
    word = tl.where(column < 32, low, high)
    bit = (column & 31).to(tl.uint32)
    below = word & ((tl.full((1, 64), 1, tl.uint32) << bit) - 1)
    rank = population(below) + tl.where(column < 32, 0, population(low))
    stored = ((word >> bit) & 1) != 0
    return tl.load(values_ptr + (start[:, None] + rank), mask=stored, other=0.0)


@triton.jit
def strips_kernel(
    x_ptr,
    values_ptr,
    masks_ptr,
    starts_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    T,
    N,
    F,
    K,
    x_stride,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of activation(x Wᵀ + bias) * scale + residual; x [T, K], masks and starts [ceil(K / 64), N].

    RANK > 0: W is B A + S with A [RANK, K] and B [N, RANK] row by row and S what the masks tell; x is read once, for
    S and for the middle x Aᵀ, which is rounded to the dtype of x.
    """
    tl.static_assert(BK == 64, "a mask has 64 columns")
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    x_ptrs = rows_at(x_ptr, tile_m * BM, T, x_stride, BM) + rk[None, :]
    rows = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1)
    mask_ptrs = masks_ptr + rows
    start_ptrs = starts_ptr + rows
    acc = tl.zeros((BM, BN), tl.float32)
    if RANK > 0:
        rr = tl.arange(0, RANK)
        a_ptrs = a_ptr + (rr * K)[:, None] + rk[None, :]
        middle = tl.zeros((BM, RANK), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=(rk < K - k * BK)[None, :], other=0.0)
        w = expand(values_ptr, tl.load(mask_ptrs), tl.load(start_ptrs))
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        if RANK > 0:
            a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=(rk < K - k * BK)[None, :], other=0.0)
            middle = tl.dot(x, a.T, middle, input_precision=PRECISION)
            a_ptrs += BK
        x_ptrs += BK
        mask_ptrs += N
        start_ptrs += N
    if RANK > 0:
        b = tl.load(b_ptr + (rows * RANK)[:, None] + rr[None, :])
        acc = tl.dot(middle.to(x_ptr.dtype.element_ty), b.T, acc, input_precision=PRECISION)
    first = (tile_m * BM, tile_n * BN)
    pointers = (bias_ptr, scale_ptr, residual_ptr, y_ptr)
    finish(acc, pointers, first, T, N, F, y_stride, BM, BN, ACTIVATION, GATED)


def strips_product(
    layout: str,
    y: Tensor,
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> None:
    """Write y [T, N] ([T, F] if gated); all but these as in triton.py's `linear`.

    Args:
        layout: whose table of tiles to use.
        y: contiguous, written.
        x: [T, K], rows contiguous.
        parts: values [nnz], masks and starts as `masks_by_row` returns them, and A [R, K], B [N, R] if there is a low
            rank beside them, R a power of two >= 16; contiguous.
        bias: [N] or None.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        residual: as `y`, or None.
        scale: [N] ([F] if gated) or None.
        gated: whether the rows of the weight and `bias` are a gate-up pair (pairs.py).
    """
    values, masks, starts, *factors = parts
    a, b = factors or (None, None)
    (tokens, k), n = x.shape, masks.shape[1]

    def arguments(step: int, arch: str) -> dict[str, Any]:
        return {
            "x_ptr": x,
            "values_ptr": values,
            "masks_ptr": masks,
            "starts_ptr": starts,
            "a_ptr": a,
            "b_ptr": b,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "residual_ptr": residual,
            "y_ptr": y,
            "T": tokens,
            "N": n,
            "F": y.shape[1],
            "K": k,
            "x_stride": x.stride(0),
            "y_stride": y.stride(0),
            "GROUP": GROUP,
            "EVEN_K": k % step == 0,
            "ACTIVATION": activation,
            "GATED": gated,
            "RANK": 0 if a is None else a.shape[0],
            "PRECISION": precision(x.element_size(), arch),
        }

    run(strips_kernel, layout, x, n, arguments)
