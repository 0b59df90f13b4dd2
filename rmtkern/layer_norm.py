"""layer_norm(): LayerNorm over the last dimension on the CPU in one kernel.

It checks a call once and knows no model; packing/norm.py decides who uses it.
"""

import torch
from torch import Tensor

from rmtkern.errors import KernelUnavailable, refuse_onnx
from rmtkern.layouts import cpu

__all__ = ["layer_norm", "reason_against"]

DTYPES = (torch.float32, torch.bfloat16)


def reason_against(x: Tensor) -> str | None:
    """Why the kernel cannot normalise the rows of x, or None if it can; its shape is not looked at."""
    if cpu.MISSING is not None:
        return cpu.MISSING
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; cast to torch.float32 or torch.bfloat16"
    if not x.is_cpu:
        return f"device {x.device}; move x to the cpu"
    return None


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = torch.empty_like(x)
    arrays = [None if t is None else cpu.as_array(t) for t in (x, weight, bias, y)]
    cpu.extension().layernorm(*arrays, eps, torch.get_num_threads())
    return y


_cpu_layer_norm = torch.library.custom_op("rmtkern::cpu_layer_norm", _run, mutates_args=(), device_types="cpu")


@_cpu_layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    refuse_onnx()
    return torch.empty_like(x)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalise each row: y = (x - mean) / sqrt(variance + eps) * weight + bias, in one CPU kernel.

    Args:
        x: [..., K] float32 or bfloat16; any strides, any leading dims, also none or an empty one.
        weight: [K], dtype of `x`; None for ones.
        bias: [K], dtype of `x`; None for zeros.
        eps: added to the variance, which is the mean square distance from the mean; >= 0.

    Returns:
        [..., K], dtype of `x`. Sums are in float32; a row whose mean is large beside its deviation is summed again
        around its mean, so rows far from zero keep their digits and a constant row gives the bias. NaN or Inf makes its
        row NaN. No gradient flows through it. Computed on torch.get_num_threads() threads.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: a shape, dtype, device or `eps` does not match.
        KernelUnavailable: no kernel runs this dtype or device.

    Source: Ba, Kiros & Hinton (2016); shifted sums as in Chan, Golub & LeVeque (1983).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor [..., K], got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., K >= 1], got {list(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected >= 0, got {eps}")
    k = x.shape[-1]
    for name, row in (("weight", weight), ("bias", bias)):
        if row is not None and (row.shape != (k,) or row.dtype != x.dtype):
            raise ValueError(f"{name}: expected [{k}] {x.dtype}, got {list(row.shape)} {row.dtype}")
        if row is not None and row.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {row.device}; move it")
    reason = reason_against(x)
    if reason is not None:
        raise KernelUnavailable(f"no layer norm kernel runs this call: {reason}")
    if x.numel() == 0:
        return torch.empty_like(x)
    weight, bias = (None if row is None else row.detach().contiguous() for row in (weight, bias))
    run = _run if cpu.unwatched(x) else torch.ops.rmtkern.cpu_layer_norm
    y: Tensor = run(x.detach().reshape(-1, k).contiguous(), weight, bias, eps)
    return y.reshape(x.shape)
