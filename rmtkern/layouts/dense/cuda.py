"""dense on a CUDA device by PyTorch's `F.linear` (cuBLAS), which form `torch` names; the other forms are Triton's."""

from torch import Tensor

from rmtkern.layouts.dense.library import library_linear
from rmtkern.layouts.dense.weight import FORMS, DenseWeight
from rmtkern.layouts.refusals import reason_against

__all__ = ["linear", "supports"]


def supports(w: DenseWeight, x: Tensor) -> str | None:
    """Why F.linear shall or can not compute x [T, K] times this weight on a CUDA device, or None."""
    if (reason := reason_against(w.stored, x, w.dtypes, "cuda")) is not None:
        return reason
    form = FORMS[w.params["form"]]
    return None if form == "torch" else f"form {form} is not PyTorch's; it is for triton"


def linear(
    x: Tensor,
    w: DenseWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
) -> Tensor:
    """Apply a dense weight on a CUDA device: y = activation(x Wᵀ + bias) * scale + residual.

    Args, returns: as `linear` of layouts/triton.py; the activation and all after it take passes of their own.
    """
    return library_linear(x, w.stored, bias, activation, residual, scale, gated)
