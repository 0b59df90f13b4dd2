"""The tiled dense product in Triton, with the whole epilogue in the same kernel; dense and factored layouts call it.

By tensor descriptors (triton_descriptor.py) where the architecture has them and the matrices fit, else by pointers. It
decides no tile (gpu_configs.py) and knows no weight.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rmtkern.layouts.gpu_configs import DESCRIBING, precision
from rmtkern.layouts.triton import GROUP, finish, rows_at, run, target, tile_of
from rmtkern.layouts.triton_descriptor import descriptor_product, fits

__all__ = ["product", "product_kernel"]


@triton.jit
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    T,
    N,
    F,
    K,
    x_stride,
    w_stride,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of activation(x Wᵀ + bias) * scale + residual; x [T, K], W [N, K], rows contiguous.

    EVEN_K: K is a multiple of BK, so that no step needs a mask.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    x_ptrs = rows_at(x_ptr, tile_m * BM, T, x_stride, BM) + rk[None, :]
    w_ptrs = rows_at(w_ptr, tile_n * BN, N, w_stride, BN) + rk[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = (rk < K - k * BK)[None, :]
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        x_ptrs += BK
        w_ptrs += BK
    first = (tile_m * BM, tile_n * BN)
    pointers = (bias_ptr, scale_ptr, residual_ptr, y_ptr)
    finish(acc, pointers, first, T, N, F, y_stride, BM, BN, ACTIVATION, GATED)


def product(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> None:
    """Write y [T, N] = activation(x Wᵀ + bias) * scale + residual, or [T, F] of a gate-up pair.

    Args:
        y: [T, N] ([T, F] if gated) contiguous, written.
        x: [T, K], rows contiguous; dtype of `y` as all others.
        w: [N, K], rows contiguous.
        bias: [N] or None.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        residual: as `y`, or None.
        scale: [N] ([F] if gated) or None.
        gated: whether the rows of `w` and `bias` are a gate-up pair (pairs.py).
    """
    if target() in DESCRIBING and fits(x, w):
        descriptor_product(y, x, w, bias, activation, residual, scale, gated)
        return
    (tokens, k), n = x.shape, w.shape[0]

    def arguments(step: int, arch: str) -> dict[str, Any]:
        return {
            "x_ptr": x,
            "w_ptr": w,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "residual_ptr": residual,
            "y_ptr": y,
            "T": tokens,
            "N": n,
            "F": y.shape[1],
            "K": k,
            "x_stride": x.stride(0),
            "w_stride": w.stride(0),
            "y_stride": y.stride(0),
            "GROUP": GROUP,
            "EVEN_K": k % step == 0,
            "ACTIVATION": activation,
            "GATED": gated,
            "PRECISION": precision(x.element_size(), arch),
        }

    run(product_kernel, "dense", x, n, arguments)
