"""dense on the CPU: PyTorch's `F.linear`, oneDNN's linear with its activation, or our own. It decides nothing."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.activations import apply_activation
from rmtkern.layouts.base import CPU_DTYPES
from rmtkern.layouts.cpu import MISSING
from rmtkern.layouts.dense.weight import FORMS, NO_ONEDNN, DenseWeight
from rmtkern.layouts.pairs import CHUNK

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
    if x.dtype not in CPU_DTYPES:
        return f"x is {x.dtype}; cast to {' or '.join(str(dtype) for dtype in CPU_DTYPES)}"
    weight = w.stored
    if weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}; cast one to the other's dtype"
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"x is on {x.device}, the weight on {weight.device}; move both to the cpu"
    form = FORMS[w.params["form"]]
    return MISSING if form == "own" else NO_ONEDNN if form != "torch" else None


def _finish(y: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    if scale is not None:
        y = y.mul_(scale)
    return y if residual is None else y.add_(residual)


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
        features = gated or w.shape[0]
        return torch.ops.rmtkern.cpu_linear(
            "dense", x, features, [w.stored], [], bias, activation, residual, scale, gated > 0
        )
    if gated:
        both = linear(x, w, bias, None, None).unflatten(-1, (-1, 2, CHUNK))
        gate, up = (both.select(-2, part).flatten(-2)[:, :gated] for part in range(2))
        y = apply_activation(gate, activation) * up
        return _finish(y, scale, residual)
    if form != "torch":
        attr, algorithm = _ONEDNN[activation]
        y = torch.ops.mkldnn._linear_pointwise(x, w.stored, bias, attr, [], algorithm)
    else:
        y = F.linear(x, w.stored, bias)
        if activation in ("gelu", "gelu_tanh"):
            y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        elif activation is not None:
            y = F.relu_(y) if activation == "relu" else F.silu(y, inplace=True)
    return _finish(y, scale, residual)
