"""bitmask in Triton: the shared product of masks and values. It decides nothing."""

from collections.abc import Sequence

from torch import Tensor

from rmtkern.layouts import triton as shared
from rmtkern.layouts.bitmask.weight import BitmaskWeight
from rmtkern.layouts.triton import supports
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
    """Write y [T, N] ([T, F] if gated); parts: the values and what `BitmaskWeight.gpu_form` returns."""
    strips_product("bitmask", y, x, parts, bias, activation, residual, scale, gated)


def linear(
    x: Tensor,
    w: BitmaskWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
) -> Tensor:
    """Apply a bitmask weight; see `rmtkern.layouts.triton.linear`."""
    return shared.linear(x, w, (w.values, *w.gpu_tensors()), bias, activation, residual, scale, gated)
