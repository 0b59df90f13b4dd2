"""block in Triton: large blocks by the index of their rows, mini-blocks by the shared product of masks and values."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rmtkern.layouts import triton as shared
from rmtkern.layouts.block.weight import BlockWeight
from rmtkern.layouts.gpu_configs import precision
from rmtkern.layouts.pairs import rows_of
from rmtkern.layouts.triton import GROUP, ROWS, finish, linear, rows_at, run, tile_of
from rmtkern.layouts.triton_strips import strips_product

__all__ = ["blocks_kernel", "launch", "linear", "supports"]


@triton.jit
def blocks_kernel(
    x_ptr,
    values_ptr,
    begins_ptr,
    columns_ptr,
    places_ptr,
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
    R: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of activation(x Wᵀ + bias) * scale + residual; x [T, K], rows contiguous.

    W is blocks [R, C], values [stored, R, C]: strip n has those from begins[n] to begins[n + 1] of columns, which say
    where they lie in W, and of places, which say where in values. A tile has rows of one strip, a step columns of one
    block; blocks that are not stored cost nothing.
    EVEN_K: K is a multiple of C, so that no step needs a mask.
    """
    tl.static_assert(R % BN == 0 and C % BK == 0, "a tile lies in one block")
    STEPS: tl.constexpr = C // BK
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    x_ptrs = rows_at(x_ptr, tile_m * BM, T, x_stride, BM) + rk[None, :]
    row = tile_n * BN
    w_ptrs = values_ptr + ((row % R + tl.arange(0, BN)) * C)[:, None] + rk[None, :]
    begin = tl.load(begins_ptr + row // R)
    end = tl.load(begins_ptr + row // R + 1)
    column = tl.load(columns_ptr + begin, mask=begin < end, other=0)
    place = tl.load(places_ptr + begin, mask=begin < end, other=0)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(begin * STEPS, end * STEPS):
        part = step % STEPS * BK
        first_k = column * C + part
        w = tl.load(w_ptrs + (place.to(tl.int64) * (R * C) + part))
        if EVEN_K:
            x = tl.load(x_ptrs + first_k)
        else:
            x = tl.load(x_ptrs + first_k, mask=(rk < K - first_k)[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        following = tl.minimum((step + 1) // STEPS, end - 1)  # read a step ahead, so that no tile waits for its address
        column = tl.load(columns_ptr + following)
        place = tl.load(places_ptr + following)
    first = (tile_m * BM, row)
    pointers = (bias_ptr, scale_ptr, residual_ptr, y_ptr)
    finish(acc, pointers, first, T, N, F, y_stride, BM, BN, ACTIVATION, GATED)


def supports(w: BlockWeight, x: Tensor) -> str | None:
    """Why the Triton kernels cannot compute x [T, K] times this weight, or None if they can."""
    if not w.large and w.values.numel() >= ROWS:
        return "stored values reach 2^31; pack a part of the rows at a time"
    return shared.supports(w, x)


def launch(
    y: Tensor,
    x: Tensor,
    parts: Sequence[Tensor],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> None:
    """Write y [T, N] ([T, F] if gated); parts: `BlockWeight.gpu_tensors`. All else as in `linear`."""
    if parts[0].ndim == 1:
        strips_product("bitmask", y, x, parts, bias, activation, residual, scale, gated)
        return
    values, begins, columns, places = parts
    _, r, c = values.shape
    (tokens, k), features = x.shape, y.shape[1]
    n = rows_of(features) if gated else features

    def arguments(step: int, arch: str) -> dict[str, Any]:
        return {
            "x_ptr": x,
            "values_ptr": values,
            "begins_ptr": begins,
            "columns_ptr": columns,
            "places_ptr": places,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "residual_ptr": residual,
            "y_ptr": y,
            "T": tokens,
            "N": n,
            "F": features,
            "K": k,
            "x_stride": x.stride(0),
            "y_stride": y.stride(0),
            "R": r,
            "C": c,
            "GROUP": GROUP,
            "EVEN_K": k % c == 0,
            "ACTIVATION": activation,
            "GATED": gated,
            "PRECISION": precision(x.element_size(), arch),
        }

    run(blocks_kernel, "block", x, n, arguments, block=(r, c))
