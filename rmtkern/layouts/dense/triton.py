"""dense in Triton: the shared product. It decides nothing."""

from collections.abc import Sequence

from torch import Tensor

from rmtkern.layouts import triton as shared
from rmtkern.layouts.dense.weight import DenseWeight
from rmtkern.layouts.triton import supports
from rmtkern.layouts.triton_product import product

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
    """Write y [T, N] ([T, F] if gated); parts: (W [N, K],). All else as in `linear`."""
    product(y, x, parts[0], bias, activation, residual, scale, gated)


def linear(
    x: Tensor,
    w: DenseWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
) -> Tensor:
    """Apply a dense weight; see `rmtkern.layouts.triton.linear`."""
    return shared.linear(x, w, w.tensors(), bias, activation, residual, scale, gated)
