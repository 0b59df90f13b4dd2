"""nofm in Triton: 2:4 from its kept entries, or by PyTorch's sparse kernels where they run; other n:m as bitmask.

Triton has no product on sparse tensor cores: its kernel reads half of the weight and multiplies all of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkern.layouts import triton as shared
from rmtkern.layouts.gpu_configs import Config, precision, shape_class
from rmtkern.layouts.nofm.semi_structured import fits, runs, transposed_product
from rmtkern.layouts.nofm.weight import NofMWeight
from rmtkern.layouts.triton import FEATURES, GROUP, ROWS, finish, linear, rows_at, run, tile_of
from rmtkern.layouts.triton_strips import strips_product

__all__ = ["EPILOGUE", "epilogue_kernel", "launch", "linear", "pairs_kernel", "supports"]

EPILOGUE = Config(32, 64, 0, 4, 1)
"""The tile of `epilogue_kernel`, which has no steps."""


@triton.jit
def expand_pairs(pairs, picks, BN: tl.constexpr, BK: tl.constexpr):
    """Dense rows [BN, BK] of the kept entries [BN, BK / 2]; picks [BN, BK / 4]: two of its lowest four bits are set."""
    low, high = pairs.reshape(BN, BK // 4, 2).split()
    nothing = tl.zeros_like(low)
    e0 = tl.where((picks & 1) != 0, low, nothing)
    e1 = tl.where((picks & 2) != 0, tl.where((picks & 1) != 0, high, low), nothing)
    e2 = tl.where((picks & 4) != 0, tl.where((picks & 3) != 0, high, low), nothing)
    e3 = tl.where((picks & 8) != 0, high, nothing)
    return tl.join(tl.join(e0, e2), tl.join(e1, e3)).reshape(BN, BK)


@triton.jit
def pairs_kernel(
    x_ptr,
    pairs_ptr,
    picks_ptr,
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
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of activation(x Wᵀ + bias) * scale + residual; x [T, K], rows contiguous.

    pairs [N, K / 2]: the two kept entries of each four columns; picks [N, 2 ceil(K / 64)] int32: bits of 32 columns.
    """
    tl.static_assert(BK == 32 or BK == 64, "a step has one or two words of picks")
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    rk = tl.arange(0, BK)
    rp = tl.arange(0, BK // 2)
    group = tl.arange(0, BK // 4)[None, :]
    x_ptrs = rows_at(x_ptr, tile_m * BM, T, x_stride, BM) + rk[None, :]
    pair_ptrs = rows_at(pairs_ptr, tile_n * BN, N, K // 2, BN) + rp[None, :]
    pick_ptrs = rows_at(picks_ptr, tile_n * BN, N, tl.cdiv(K, 64) * 2, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            pairs = tl.load(pair_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(rk < K - k * BK)[None, :], other=0.0)
            pairs = tl.load(pair_ptrs, mask=(rp < (K - k * BK) // 2)[None, :], other=0.0)
        picks = tl.load(pick_ptrs)
        if BK == 64:
            picks = tl.where(group < 8, picks, tl.load(pick_ptrs + 1))
        w = expand_pairs(pairs, picks >> (group & 7) * 4, BN, BK)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        x_ptrs += BK
        pair_ptrs += BK // 2
        pick_ptrs += BK // 32
    first = (tile_m * BM, tile_n * BN)
    pointers = (bias_ptr, scale_ptr, residual_ptr, y_ptr)
    finish(acc, pointers, first, T, N, F, y_stride, BM, BN, ACTIVATION, GATED)


@triton.jit
def epilogue_kernel(
    product_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    T,
    N,
    F,
    product_stride,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """One tile [BM, BN] of activation(productᵀ) * scale + residual; product [N, T' >= T], rows contiguous."""
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    token = tile_m * BM + tl.arange(0, BM)
    pointers = rows_at(product_ptr, tile_n * BN, N, product_stride, BN) + token[None, :]
    acc = tl.load(pointers, mask=(token < T)[None, :], other=0.0).to(tl.float32).T
    first = (tile_m * BM, tile_n * BN)
    finish(acc, (None, scale_ptr, residual_ptr, y_ptr), first, T, N, F, y_stride, BM, BN, ACTIVATION, GATED)


def supports(w: NofMWeight, x: Tensor) -> str | None:
    """Why the Triton kernels cannot compute x [T, K] times this weight, or None if they can."""
    if not w.halved and w.values.numel() >= ROWS:
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
    """Write y [T, N] ([T, F] if gated); parts: `NofMWeight.gpu_tensors`. All else as in `linear`.

    PyTorch's kernels take more than a few tokens; what follows the bias is then a second kernel.
    """
    kept, masks, *rest = parts
    few = shape_class(len(x)) == "row"
    if kept.ndim == 1:
        strips_product("bitmask", y, x, parts, bias, activation, residual, scale, gated)
    elif rest and fits((len(kept), x.shape[1]), x.dtype) and not few and len(x) < FEATURES and runs(x.device):
        # T is a stride of the product
        finish_product(y, transposed_product(x, kept, rest[0], bias), activation, residual, scale, gated)
    else:
        _expanded_product(y, x, kept, masks, bias, activation, residual, scale, gated)


def finish_product(
    y: Tensor, product: Tensor, activation: str | None, residual: Tensor | None, scale: Tensor | None, gated: bool
) -> None:
    """Write y [T, N] ([T, F] if gated) = activation(productᵀ) * scale + residual; product [N, T' >= T] contiguous."""
    tokens, n = len(y), len(product)
    grid = (triton.cdiv(tokens, EPILOGUE.bm) * triton.cdiv(n, EPILOGUE.bn),)
    epilogue_kernel[grid](
        product_ptr=product,
        scale_ptr=scale,
        residual_ptr=residual,
        y_ptr=y,
        T=tokens,
        N=n,
        F=y.shape[1],
        product_stride=product.stride(0),
        y_stride=y.stride(0),
        GROUP=GROUP,
        BM=EPILOGUE.bm,
        BN=EPILOGUE.bn,
        ACTIVATION=activation,
        GATED=gated,
        num_warps=EPILOGUE.warps,
    )


def _expanded_product(
    y: Tensor,
    x: Tensor,
    pairs: Tensor,
    masks: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> None:
    (tokens, k), n = x.shape, len(pairs)

    def arguments(step: int, arch: str) -> dict[str, Any]:
        return {
            "x_ptr": x,
            "pairs_ptr": pairs,
            "picks_ptr": masks.view(dtype=torch.int32),
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
            "PRECISION": precision(x.element_size(), arch),
        }

    run(pairs_kernel, "nofm", x, n, arguments)
