"""What speaks against a call whatever the layout: dtypes and devices that do not fit. It knows no kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["reason_against"]


def reason_against(weight: Tensor, x: Tensor, dtypes: Sequence[torch.dtype], kind: str) -> str | None:
    """Why x [T, K] does not fit a weight [N, K] or a kind of device, or None.

    Args:
        weight: a floating-point part of it, as it is stored.
        x: the input.
        dtypes: what is computed there.
        kind: "cpu" or "cuda".
    """
    if x.dtype not in dtypes:
        return f"x is {x.dtype}; cast to {' or '.join(str(dtype) for dtype in dtypes)}"
    if weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}; cast one to the other's dtype"
    if x.device.type != kind or weight.device != x.device:
        there = "the cpu" if kind == "cpu" else "one CUDA device"
        return f"x is on {x.device}, the weight on {weight.device}; move both to {there}"
    return None
