"""The linear with a live threshold in Triton, forward and backward: W is pruned in registers on its way into a product.

Each product reads W as it is and no mask is stored. It costs more instructions than a product of a weight that was
pruned once, so it is for training; masked_linear.py is the op and says what the gradients are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkern.layouts.gpu_configs import precision
from rmtkern.layouts.triton import DTYPES, FEATURES, GROUP, ROWS, finish, rows_at, run, tile_of
from rmtkern.triton_target import INTERPRETED, reason_against_device

__all__ = [
    "activation_gradient_kernel",
    "backward",
    "forward",
    "forward_kernel",
    "input_gradient_kernel",
    "reason_against",
    "weight_gradient_kernel",
]

BM, BN = 32, 128
"""Tile of the activation's gradient, on 4 warps."""


@triton.jit
def above(w, threshold, value):
    """The value where |w| is not below the threshold, else 0; where w is NaN, the value."""
    return tl.where(tl.abs(w.to(tl.float32)) < threshold, 0.0, value).to(value.dtype)


@triton.jit
def forward_kernel(
    x_ptr,
    w_ptr,
    threshold_ptr,
    bias_ptr,
    before_ptr,
    y_ptr,
    T,
    N,
    K,
    x_stride,
    w_stride,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of y = activation(x (W o [|W| >= threshold])ᵀ + bias); x [T, K], W [N, K], rows contiguous.

    What the activation is applied to goes to `before`, unless that is None. EVEN: K is a multiple of BK.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    x_ptrs = rows_at(x_ptr, tile_m * BM, T, x_stride, BM) + rk[None, :]
    w_ptrs = rows_at(w_ptr, tile_n * BN, N, w_stride, BN) + rk[None, :]
    threshold = tl.load(threshold_ptr)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = (rk < K - k * BK)[None, :]
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        acc = tl.dot(x, above(w, threshold, w).T, acc, input_precision=PRECISION)
        x_ptrs += BK
        w_ptrs += BK
    first = (tile_m * BM, tile_n * BN)
    if before_ptr is not None:
        finish(acc, (bias_ptr, None, None, before_ptr), first, T, N, N, y_stride, BM, BN, None, False)
    finish(acc, (bias_ptr, None, None, y_ptr), first, T, N, N, y_stride, BM, BN, ACTIVATION, False)


@triton.jit
def input_gradient_kernel(
    g_ptr,
    w_ptr,
    threshold_ptr,
    y_ptr,
    T,
    N,
    K,
    w_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of y [T, K] = g (W o [|W| >= threshold]); g [T, N] contiguous. EVEN: N is a multiple of BK."""
    tile_m, tile_n = tile_of(tl.program_id(0), T, K, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    columns = tile_n * BN + tl.arange(0, BN)
    here = (columns < K)[None, :]
    g_ptrs = rows_at(g_ptr, tile_m * BM, T, N, BM) + rk[None, :]
    w_ptrs = w_ptr + (rk * w_stride)[:, None] + columns[None, :]
    threshold = tl.load(threshold_ptr)
    acc = tl.zeros((BM, BN), tl.float32)
    for n in range(0, tl.cdiv(N, BK)):
        if EVEN:
            g = tl.load(g_ptrs)
            w = tl.load(w_ptrs, mask=here, other=0.0)
        else:
            inside = rk < N - n * BK
            g = tl.load(g_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None] & here, other=0.0)
        acc = tl.dot(g, above(w, threshold, w), acc, input_precision=PRECISION)
        g_ptrs += BK
        w_ptrs += BK * w_stride
    first = (tile_m * BM, tile_n * BN)
    finish(acc, (None, None, None, y_ptr), first, T, K, K, K, BM, BN, None, False)


@triton.jit
def weight_gradient_kernel(
    g_ptr,
    x_ptr,
    w_ptr,
    threshold_ptr,
    y_ptr,
    T,
    N,
    K,
    x_stride,
    w_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of y [N, K] = (gᵀ x) o [|W| >= threshold]; g [T, N] contiguous, x [T, K].

    EVEN: T is a multiple of BK.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), N, K, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    there = (rows < N)[None, :]
    here = (columns < K)[None, :]
    g_ptrs = g_ptr + (rk * N)[:, None] + rows[None, :]
    x_ptrs = x_ptr + (rk * x_stride)[:, None] + columns[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(0, tl.cdiv(T, BK)):
        if EVEN:
            g = tl.load(g_ptrs, mask=there, other=0.0)
            x = tl.load(x_ptrs, mask=here, other=0.0)
        else:
            inside = (rk < T - t * BK)[:, None]
            g = tl.load(g_ptrs, mask=inside & there, other=0.0)
            x = tl.load(x_ptrs, mask=inside & here, other=0.0)
        acc = tl.dot(g.T, x, acc, input_precision=PRECISION)
        g_ptrs += BK * N
        x_ptrs += BK * x_stride
    w = tl.load(rows_at(w_ptr, tile_m * BM, N, w_stride, BM) + columns[None, :], mask=here, other=0.0)
    acc = above(w, tl.load(threshold_ptr), acc)
    first = (tile_m * BM, tile_n * BN)
    finish(acc, (None, None, None, y_ptr), first, N, K, K, K, BM, BN, None, False)


@triton.jit
def activation_gradient_kernel(
    g_ptr, before_ptr, y_ptr, sums_ptr, T, N, BM: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One tile [BM, BN] of y [T, N] = g activation'(before), and its sums over the rows, [T / BM, N] float32."""
    first = tl.program_id(0)
    rows = tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < T - first * BM)[:, None] & (columns < N)[None, :]
    at = first.to(tl.int64) * BM * N + (rows * N)[:, None] + columns[None, :]
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        bell = tl.exp(-0.5 * z * z) * 0.3989422804014327  # density of the normal law, 1 / sqrt(2 pi)
        g *= 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * bell
    elif ACTIVATION == "gelu_tanh":
        half = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        g *= half + z * half * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        half = tl.sigmoid(z)
        g *= half * (1.0 + z * (1.0 - half))
    else:
        tl.static_assert(ACTIVATION == "relu", "an activation of activations.py")
        g = tl.where(z <= 0.0, 0.0, g)
    tl.store(y_ptr + at, g.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + first.to(tl.int64) * N + columns, tl.sum(g, 0), mask=columns < N)


def reason_against(x: Tensor, w: Tensor) -> str | None:
    """Why the kernels cannot compute x [T, K] times a thresholded W [N, K], or None if they can."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; cast to {' or '.join(str(dtype) for dtype in DTYPES)}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x is on {x.device}; move the model and x to cuda"
    if max(w.shape) >= FEATURES:
        return f"the weight is {tuple(w.shape)}; N and K must be less than 2^23"
    if x.shape[0] >= ROWS:
        return "tokens reach 2^31; split the call"
    return reason_against_device(x.device)


def forward(
    x: Tensor, w: Tensor, threshold: Tensor, bias: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """Result [T, N], and with `keep` what the activation was applied to [T, N], else [0]; as masked_linear.py says."""
    (tokens, k), n = x.shape, w.shape[0]
    y = x.new_empty(tokens, n)
    before = torch.empty_like(y) if keep else x.new_empty(0)

    def arguments(step: int, arch: str) -> dict[str, Any]:
        return {
            "x_ptr": x,
            "w_ptr": w,
            "threshold_ptr": threshold,
            "bias_ptr": bias,
            "before_ptr": before if keep else None,
            "y_ptr": y,
            "T": tokens,
            "N": n,
            "K": k,
            "x_stride": x.stride(0),
            "w_stride": w.stride(0),
            "y_stride": n,
            "GROUP": GROUP,
            "EVEN": k % step == 0,
            "ACTIVATION": activation,
            "PRECISION": precision(x.element_size(), arch),
        }

    run(forward_kernel, "masked", x, n, arguments)
    return y, before


def backward(
    grad: Tensor,
    before: Tensor,
    x: Tensor,
    w: Tensor,
    threshold: Tensor,
    activation: str | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [T, K], W [N, K] and the bias [N], each if needed; grad [T, N] contiguous, `before` of forward."""
    (tokens, k), n = x.shape, w.shape[0]
    to_x, to_w, to_bias = needed
    bias = None
    if activation is not None:
        g = torch.empty_like(grad)
        grid = (triton.cdiv(tokens, BM), triton.cdiv(n, BN))
        sums = grad.new_empty(grid[0], n, dtype=torch.float32)
        activation_gradient_kernel[grid](
            grad, before, g, sums, tokens, n, BM=BM, BN=BN, ACTIVATION=activation, num_warps=4
        )
        grad, bias = g, sums.sum(0).to(x.dtype)
    elif to_bias:
        bias = grad.sum(0, dtype=torch.float32).to(x.dtype)

    def arguments(result: Tensor, summed: int) -> Any:
        return lambda step, arch: {
            "g_ptr": grad,
            "w_ptr": w,
            "threshold_ptr": threshold,
            "y_ptr": result,
            "T": tokens,
            "N": n,
            "K": k,
            "w_stride": w.stride(0),
            "GROUP": GROUP,
            "EVEN": summed % step == 0,
            "PRECISION": precision(x.element_size(), arch),
        }

    of_x = torch.empty_like(x) if to_x else None
    if of_x is not None:
        run(input_gradient_kernel, "masked", grad, k, arguments(of_x, n))
    of_w = torch.empty_like(w) if to_w else None
    if of_w is not None:
        by_name = arguments(of_w, tokens)
        more = {"x_ptr": x, "x_stride": x.stride(0)}
        run(weight_gradient_kernel, "masked", grad.t(), k, lambda step, arch: by_name(step, arch) | more)
    return of_x, of_w, bias if to_bias else None
