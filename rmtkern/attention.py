"""attention(): softmax(q kᵀ scale + mask) v on the CPU in one kernel, with the arguments of PyTorch's own function.

It checks a call once and knows no model; packing/attention.py decides who uses it.
"""

import math

import torch
from torch import Tensor

from rmtkern.errors import KernelUnavailable, refuse_onnx
from rmtkern.layouts import cpu

__all__ = ["DTYPES", "attention", "reason_against"]

DTYPES = (torch.float32, torch.bfloat16)


def reason_against(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why the kernel cannot compute these, or None if it can; shapes are not looked at."""
    if cpu.MISSING is not None:
        return cpu.MISSING
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; cast to torch.float32 or torch.bfloat16"
    for tensor in (q, k, v) if mask is None else (q, k, v, mask):
        if not tensor.is_cpu:
            return f"device {tensor.device}; move q, k, v and the mask to the cpu"
    return None


def _run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, tokens, d = q.shape
    y = torch.empty(batch, tokens, heads, d, dtype=q.dtype)
    arrays = [None if t is None else cpu.as_array(t) for t in (q, k, v, mask, y)]
    cpu.extension().attention(*arrays, scale, torch.get_num_threads())
    return y


_cpu_attention = torch.library.custom_op("rmtkern::cpu_attention", _run, mutates_args=(), device_types="cpu")


@_cpu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    refuse_onnx()
    batch, heads, tokens, d = q.shape
    return q.new_empty(batch, tokens, heads, d)


def _rows(x: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension; any other strides stay."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention in one CPU kernel: softmax(q kᵀ scale + mask) v.

    Args:
        q: [B, H, Tq, d] float32 or bfloat16; views of one fused projection need no copy.
        k: [B, H, Tk, d], dtype of `q`.
        v: [B, H, Tk, d], dtype of `q`.
        mask: None; boolean (True takes part) or added to the scores, broadcastable to [B, H, Tq, Tk].
        scale: default 1 / sqrt(d).

    Returns:
        [B, H, Tq, d], dtype of `q`: a view of a contiguous [B, Tq, H, d], so that merging the heads costs nothing. Sums
        are in float32; a query that may see no key gives zeros. No gradient flows through it. Computed on
        torch.get_num_threads() threads.

    Raises:
        TypeError: `q`, `k` or `v` is no tensor.
        ValueError: shapes or dtypes do not match.
        KernelUnavailable: no kernel runs this dtype or device.

    Source: running maxima of Milakov & Gimelshein (2018), blocks of keys as in Dao et al. (2022).
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor [B, H, T, d], got {type(tensor).__name__}")
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, H, Tq, d], got {list(q.shape)}")
    batch, heads, tokens, d = q.shape
    keys = k.shape[2] if k.ndim == 4 else 0
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (batch, heads, keys, d) or keys == 0 or d == 0:
            raise ValueError(
                f"{name}: expected [{batch}, {heads}, Tk >= 1, {d}] as q and k say, got {list(tensor.shape)}"
            )
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} as q is, got {tensor.dtype}")
    reason = reason_against(q, k, v, mask)
    if reason is not None:
        raise KernelUnavailable(f"no attention kernel runs this call: {reason}")
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        try:
            mask = _rows(mask.to(q.dtype)).expand(batch, heads, tokens, keys)
        except RuntimeError as error:
            wanted = [batch, heads, tokens, keys]
            raise ValueError(f"mask: expected a shape broadcastable to {wanted}, got {list(mask.shape)}") from error
        if mask.stride(-1) != 1 and keys > 1:  # one value for all keys
            mask = mask.contiguous()
    if 0 in (batch, heads, tokens):
        return torch.empty_like(q)
    run = _run if cpu.unwatched(q) else torch.ops.rmtkern.cpu_attention
    y: Tensor = run(_rows(q), _rows(k), _rows(v), mask, 1 / math.sqrt(d) if scale is None else scale)
    return y.transpose(1, 2)
