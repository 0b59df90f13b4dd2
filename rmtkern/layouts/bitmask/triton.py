"""bitmask in Triton: the shared product of masks and values. It decides nothing."""

from collections.abc import Sequence

from torch import Tensor

from rmtkern.layouts.triton import linear, supports
from rmtkern.layouts.triton_strips import strips_product

__all__ = ["launch", "linear", "supports"]


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
    """Write y [T, N] ([T, F] if gated); parts: `BitmaskWeight.gpu_tensors`."""
    strips_product("bitmask", y, x, parts, bias, activation, residual, scale, gated)
