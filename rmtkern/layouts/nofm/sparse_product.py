"""How the CUDA C++ product of 2:4 on sparse tensor cores, sparse_product.cu, is built and launched. It runs nothing.

It knows no layout class and imports no GPU package.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rmtkern.layouts.gpu_configs import Config

__all__ = ["ARGUMENTS", "NAME", "NARROW", "WIDE", "grid", "options", "pieces", "shared_bytes", "source"]

NAME = "sparse_product_kernel"
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
"""In the order of the numbers in the source."""
WIDE, NARROW = (16, 16), (8, 4)
"""Bytes of one copy of x and of the kept entries: where rows and addresses are multiples of 16, and elsewhere."""
ARGUMENTS = ("x", "kept", "meta", "bias", "scale", "residual", "y", "T", "N", "F", "K")
"""The kernel's parameters, in order."""


def source() -> str:
    """CUDA C++ of the kernel."""
    return Path(__file__).with_name("sparse_product.cu").read_text()


def pieces(x: Tensor, kept: Tensor) -> tuple[int, int] | None:
    """Bytes of one copy of x [T, K] and of the kept entries [N, K / 2], which rows and addresses are multiples of.

    None if an address is not even a multiple of the narrowest copies: 8 and 4 bytes.
    """
    row = x.shape[1]  # bytes of a row of `kept`; one of x has twice as many
    for both in (WIDE, NARROW):
        if row % both[1] == 0 and x.data_ptr() % both[0] == 0 and kept.data_ptr() % both[1] == 0:
            return both
    return None


def options(
    config: Config, bfloat16: bool, activation: str | None, gated: bool, widths: tuple[int, int]
) -> tuple[str, ...]:
    """The compiler's options for a tile, a dtype (bfloat16 or float16), an epilogue, and `pieces`."""
    numbers = {
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "WARPS": config.warps,
        "STAGES": config.stages,
        "BF16": int(bfloat16),
        "ACTIVATION": ACTIVATIONS.index(activation),
        "GATED": int(gated),
        "X_PIECE": widths[0],
        "W_PIECE": widths[1],
    }
    return ("-std=c++17", *(f"-D{name}={number}" for name, number in numbers.items()))


def shared_bytes(config: Config) -> int:
    """Shared memory of a block: the stages, or the turned tile of results that takes their place."""
    words = config.bk // 32 * config.bn  # of metadata
    stage = 2 * config.bm * config.bk + config.bn * config.bk + 4 * words
    return max(config.stages * stage, 4 * config.bm * (config.bn + 4))


def grid(config: Config, shape: Sequence[int]) -> tuple[int, int, int]:
    """Blocks for y [T, N]."""
    tokens, features = shape
    return (-(-tokens // config.bm) * -(-features // config.bn), 1, 1)
