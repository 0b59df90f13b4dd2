"""Makes modules that call PyTorch's scaled_dot_product_attention use our kernel instead, and takes that back.

It finds who calls it by watching a forward pass, so it needs to know no model; of PyTorch's modules it knows
nn.MultiheadAttention, whose fast path calls nothing. pack.py puts it in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.attention import attention, reason_against
from rmtkern.packing.sites import KernelForward

__all__ = ["AttentionCall", "AttentionForward", "MultiheadCall", "watch_attention"]

_GRADIENT = "a gradient is wanted"
_AUTOCAST = "autocast chooses the dtype"


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled_dot_product_attention that a forward pass made.

    Args:
        q: [B, H, Tq, d], as it was, also in its strides.
        k: [B, H, Tk, d].
        v: [B, H, Tk, d].
        mask: as it was, or None.
        scale: or None for the default.
        reason: why the kernel cannot compute it, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    reason: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a measurement depends on."""
        mask = None if self.mask is None else (tuple(self.mask.shape), self.mask.dtype)
        return tuple(self.q.shape), self.q.stride(), tuple(self.k.shape), self.q.dtype, mask

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q and k."""
        return tuple(self.q.shape), tuple(self.k.shape)

    def torch(self) -> Tensor:
        """PyTorch's own result."""
        return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask, scale=self.scale)

    def kernel(self) -> Tensor:
        """Our kernel's result."""
        return attention(self.q, self.k, self.v, mask=self.mask, scale=self.scale)

    def exact(self) -> tuple[Tensor, float]:
        """The result in float64, and the scale of its rounding: the values', as an output is a mean that may cancel."""
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.double()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return y, float(self.v.abs().max())

    def excess(self) -> float:
        """The kernel's error against float64 over what is allowed: 2x PyTorch's, plus 4 eps of the scale."""
        exact, scale = self.exact()
        dense = float((self.torch() - exact).abs().max())
        error = float((self.kernel() - exact).abs().max())
        allowed = 2 * dense + 4 * torch.finfo(self.q.dtype).eps * scale
        return error / allowed if error == error and allowed > 0 else float("inf")


@dataclass(frozen=True)
class MultiheadCall(AttentionCall):
    """One call of an nn.MultiheadAttention, projections included.

    Args:
        q: the input, only for its shape [B, H, T, d]; so are `k` and `v`.
        module: the nn.MultiheadAttention.
        x: [B, T, H d], its input.
    """

    module: nn.MultiheadAttention
    x: Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        """What a measurement depends on."""
        return *super().key, self.module.in_proj_bias is None

    def torch(self) -> Tensor:
        """PyTorch's own result."""
        return nn.MultiheadAttention.forward(self.module, self.x, self.x, self.x, need_weights=False)[0]

    def kernel(self) -> Tensor:
        """The projections of PyTorch around our kernel."""
        return self._compute(self.x, attention)

    def exact(self) -> tuple[Tensor, float]:
        """The result in float64, and its scale."""
        y = self._compute(self.x.double(), F.scaled_dot_product_attention)
        return y, float(y.abs().max())

    def _compute(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        module, out = self.module, self.module.out_proj
        w_in, b_in, w_out, b_out = (
            None if p is None else p.to(x.dtype)
            for p in (module.in_proj_weight, module.in_proj_bias, out.weight, out.bias)
        )
        qkv = F.linear(x, w_in, b_in).unflatten(-1, (3, module.num_heads, module.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.linear(attend(q, k, v).transpose(1, 2).flatten(2), w_out, b_out)


def _parse_multihead(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> MultiheadCall:
    """A call as PyTorch's signature has it, with the reason why `MultiheadCall.kernel` cannot take it."""
    x, weight = query, module.in_proj_weight
    heads = x
    reason = reason_against(x, x, x)
    if need_weights:
        reason = "the attention weights are asked for"
    elif query is not key or key is not value:
        reason = "q, k and v are not one tensor"
    elif key_padding_mask is not None or attn_mask is not None or is_causal:
        reason = "it has a mask"
    elif not module.batch_first or x.ndim != 3 or x.shape[-1] != module.embed_dim:
        reason = "its input is not [B, T, features], batch first"
    elif weight is None or module.bias_k is not None or module.add_zero_attn:
        reason = "it has separate projections, bias_k or add_zero_attn"
    elif module.training and module.dropout > 0:
        reason = "it has dropout"
    elif torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        reason = _GRADIENT
    elif torch.is_autocast_enabled("cpu") or weight.dtype != x.dtype:
        reason = _AUTOCAST
    elif 0 in x.shape:
        reason = "the input is empty"
    else:
        heads = x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
    return MultiheadCall(heads, heads, heads, None, None, reason, module, x)


def _parse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """A call as PyTorch's signature has it, with the reason why the kernel cannot take it."""
    reason = reason_against(query, key, value, attn_mask)
    if dropout_p or is_causal or enable_gqa:
        reason = "dropout, is_causal and enable_gqa are not in the kernel"
    elif query.ndim != 4 or key.shape != value.shape or key.shape[:2] != query.shape[:2]:
        reason = f"q {list(query.shape)}, k {list(key.shape)}, v {list(value.shape)}; the kernel has [B, H, T, d]"
    elif key.shape[3] != query.shape[3] or key.dtype != query.dtype or value.dtype != query.dtype or 0 in key.shape:
        reason = "q, k and v differ in head size or dtype, or are empty"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        reason = _GRADIENT
    elif torch.is_autocast_enabled("cpu"):
        reason = _AUTOCAST
    return AttentionCall(query, key, value, attn_mask, scale, reason)


class _Intercept(TorchFunctionMode):
    def __init__(self, handle: Callable[[AttentionCall], Tensor | None]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            y = self.handle(_parse(*args, **(kwargs or {})))
            if y is not None:
                return y
        return func(*args, **(kwargs or {}))


def _run_kernel(call: AttentionCall) -> Tensor | None:
    return call.kernel() if call.reason is None else None


class AttentionForward(KernelForward):
    """Stands as a module's `forward`: its own one, with attention done by the kernel where it can."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's class says."""
        module = self.module
        if type(module) is nn.MultiheadAttention:
            call = _parse_multihead(module, *args, **kwargs)
            # a mode would end PyTorch's fast path, so there is none around a call that stays PyTorch's
            return (call.kernel(), None) if call.reason is None else type(module).forward(module, *args, **kwargs)
        with _Intercept(_run_kernel):
            return type(module).forward(module, *args, **kwargs)


@dataclass
class _Watch:
    calls: dict[str, list[AttentionCall]] = field(default_factory=dict)
    seen: dict[tuple[Any, ...], AttentionCall] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)

    def note(self, call: AttentionCall) -> None:
        if self.stack:  # calls that would be measured alike share one, so that its tensors are kept once
            call = self.seen.setdefault((*call.key, call.reason), call)
            self.calls.setdefault(self.stack[-1], []).append(call)


@contextmanager
def watch_attention(model: nn.Module) -> Iterator[dict[str, list[AttentionCall]]]:
    """Which module calls scaled_dot_product_attention, and with what, in the forward passes inside the block.

    Args:
        model: what will run; while it lasts, its composite modules have a subclass of their class.
    """
    watch = _Watch()
    originals: list[tuple[nn.Module, type]] = []
    try:
        for name, module in model.named_modules():
            if name and next(module.children(), None) is not None and "forward" not in vars(module):
                originals.append((module, type(module)))
                module.__class__ = _named(type(module), name, watch)
        with _Intercept(watch.note):
            yield watch.calls
    finally:
        for module, original in originals:
            module.__class__ = original


def _named(base: type, name: str, watch: _Watch) -> type:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch.stack.append(name)
        try:
            if base is nn.MultiheadAttention:
                watch.note(_parse_multihead(self, *args, **kwargs))  # type: ignore[arg-type]
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            watch.stack.pop()

    return type(base.__name__, (base,), {"forward": forward})
