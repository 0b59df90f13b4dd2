"""dense on the CPU: PyTorch's `F.linear`, oneDNN's linear with its activation, or our own. It decides nothing."""

import torch
from torch import Tensor

from rmtkern.layouts.base import CPU_DTYPES
from rmtkern.layouts.cpu import MISSING
from rmtkern.layouts.cpu import linear as own_linear
from rmtkern.layouts.dense.library import finish, gate, library_linear
from rmtkern.layouts.dense.weight import FORMS, NO_ONEDNN, DenseWeight
from rmtkern.layouts.refusals import reason_against

__all__ = ["linear", "supports"]

_ONEDNN = {  # activation -> (attr, algorithm) of mkldnn._linear_pointwise
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


def supports(w: DenseWeight, x: Tensor) -> str | None:
    """Why the form's dense linear cannot compute x [T, K] times this weight, or None if they can."""
    if (reason := reason_against(w.stored, x, CPU_DTYPES, "cpu")) is not None:
        return reason
    form = FORMS[w.params["form"]]
    return MISSING if form == "own" else NO_ONEDNN if form != "torch" else None


def linear(
    x: Tensor,
    w: DenseWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
) -> Tensor:
    """Apply a dense weight: y = activation(x Wᵀ + bias) * scale + residual, with the call that `w.label` names.

    A gate-up pair (`gated` = F > 0, as in layouts/cpu.py) takes one kernel in our own form; the libraries compute both
    products at once, and the activation and the product of the two in more passes.

    Args:
        x: [T, K] float32 or bfloat16, contiguous.
        w: DenseWeight [N, K].
        bias: [N] or None, dtype of `x` as all others.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu"; a second pass in `F.linear`, else fused.
        residual: [T, N] ([T, F] if gated) or None, added last.
        scale: [N] ([F] if gated) or None, multiplied after the activation.
        gated: F, or 0.

    Returns:
        [T, N] ([T, F] if gated).
    """
    form = FORMS[w.params["form"]]
    if form == "own":
        return own_linear(x, w, bias, activation, residual, scale, gated)
    if form == "torch":
        return library_linear(x, w.stored, bias, activation, residual, scale, gated)
    attr, algorithm = _ONEDNN[None if gated else activation]
    y = torch.ops.mkldnn._linear_pointwise.default(x, w.stored, bias, attr, [], algorithm)
    return finish(gate(y, activation, gated) if gated else y, scale, residual)
