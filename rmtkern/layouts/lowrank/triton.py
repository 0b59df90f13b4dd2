"""lowrank in Triton: the shared product twice, with the middle x Aᵀ rounded to the dtype of x. It decides nothing."""

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
    """Write y [T, N] ([T, F] if gated); parts: `LowRankWeight.gpu_tensors`. All else as in `linear`."""
    a, b = parts
    middle = x.new_empty(x.shape[0], a.shape[0])
    product(middle, x, a, None, None, None, None, False)
    product(y, middle, b, bias, activation, residual, scale, gated)
