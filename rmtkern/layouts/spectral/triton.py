"""spectral in Triton: low rank and sparse remainder in one kernel, x read once. It decides which ranks."""

from collections.abc import Sequence

from torch import Tensor

from rmtkern.layouts import triton as shared
from rmtkern.layouts.spectral.weight import SpectralWeight
from rmtkern.layouts.triton import linear
from rmtkern.layouts.triton_strips import strips_product

__all__ = ["launch", "linear", "supports"]

RANK = 64  # the middle [tokens of a tile, rank] stays in registers


def supports(w: SpectralWeight, x: Tensor) -> str | None:
    """Why the Triton kernel cannot compute x [T, K] times this weight, or None if it can."""
    if w.params["rank"] > RANK:
        return f"the rank is {w.params['rank']}, more than {RANK}; use lowrank, or dense"
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
    """Write y [T, N] ([T, F] if gated); parts: `SpectralWeight.gpu_tensors`."""
    strips_product("spectral", y, x, parts, bias, activation, residual, scale, gated)
