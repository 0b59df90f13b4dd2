"""The dense product with tiles that the copy engine fetches by tensor descriptors (TMA): sm_90 and later.

A descriptor holds address, sizes and strides of a matrix, so that a thread computes no address and no mask; what lies
outside reads as zero. It knows no weight; triton_product.py decides when it runs.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rmtkern.layouts.gpu_configs import precision
from rmtkern.layouts.triton import GROUP, finish, run, tile_of

__all__ = ["descriptor_kernel", "descriptor_product", "fits"]

ALIGNMENT = 16  # bytes of the address and of the stride of the rows


@triton.jit
def descriptor_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    T,
    N,
    F,
    K,
    y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of activation(x Wᵀ + bias) * scale + residual; x [T, K] by [BM, BK], W [N, K] by [BN, BK]."""
    tile_m, tile_n = tile_of(tl.program_id(0), T, N, BM, BN, GROUP)
    first = (tile_m * BM, tile_n * BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = x_desc.load([first[0], k])
        w = w_desc.load([first[1], k])
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    pointers = (bias_ptr, scale_ptr, residual_ptr, y_ptr)
    finish(acc, pointers, first, T, N, F, y_stride, BM, BN, ACTIVATION, GATED)


def fits(*matrices: Tensor) -> bool:
    """Whether descriptors can hold these matrices: rows contiguous, address and row stride multiples of 16 bytes."""
    return all(
        matrix.stride(1) == 1
        and matrix.data_ptr() % ALIGNMENT == 0
        and matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0
        for matrix in matrices
    )


def _shape_tiles(named: dict[str, Any]) -> None:
    """Give the descriptors the tile that a launch has."""
    named["x_desc"].block_shape = [named["BM"], named["BK"]]
    named["w_desc"].block_shape = [named["BN"], named["BK"]]


def descriptor_product(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> None:
    """Write y; all as in triton_product.product, for matrices that `fits` takes."""
    tokens, n = len(x), len(w)

    def arguments(step: int, arch: str) -> dict[str, Any]:
        return {
            "x_desc": TensorDescriptor.from_tensor(x, [16, 16]),  # the tile comes with the config
            "w_desc": TensorDescriptor.from_tensor(w, [16, 16]),
            "bias_ptr": bias,
            "scale_ptr": scale,
            "residual_ptr": residual,
            "y_ptr": y,
            "T": tokens,
            "N": n,
            "F": y.shape[1],
            "K": x.shape[1],
            "y_stride": y.stride(0),
            "GROUP": GROUP,
            "ACTIVATION": activation,
            "GATED": gated,
            "PRECISION": precision(x.element_size(), arch),
        }

    run(descriptor_kernel, "descriptor", x, n, arguments, prepare=_shape_tiles)
