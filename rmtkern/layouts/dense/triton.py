"""dense in Triton: the shared product. It decides nothing."""

from collections.abc import Sequence

from torch import Tensor

from rmtkern.layouts.triton import linear, supports
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
