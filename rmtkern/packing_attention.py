"""Makes modules that call PyTorch's scaled_dot_product_attention use our kernel instead, and takes that back.

It finds who calls it by watching a forward pass, so it needs to know no model. packing.py decides who gets the kernel.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.attention import attention, reason_against

__all__ = ["AttentionCall", "disable", "enable", "enabled", "watch_attention"]


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

    def torch(self) -> Tensor:
        """PyTorch's own result."""
        return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask, scale=self.scale)

    def kernel(self) -> Tensor:
        """Our kernel's result."""
        return attention(self.q, self.k, self.v, mask=self.mask, scale=self.scale)

    def excess(self) -> float:
        """The kernel's error against float64 over what is allowed: 2x PyTorch's, plus 4 eps of the largest value.

        The values' scale, since an output is a mean of values that may cancel.
        """
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.double()
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        dense = float((self.torch() - exact).abs().max())
        error = float((self.kernel() - exact).abs().max())
        allowed = 2 * dense + 4 * torch.finfo(self.q.dtype).eps * float(self.v.abs().max())
        return error / allowed if error == error and allowed > 0 else float("inf")


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
        reason = "a gradient is wanted"
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


class _KernelForward:
    """Stands as a module's `forward`: its own one, with attention done by the kernel where it can."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Intercept(_run_kernel):
            return type(self.module).forward(self.module, *args, **kwargs)


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
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            watch.stack.pop()

    return type(base.__name__, (base,), {"forward": forward})


def enabled(model: nn.Module) -> list[nn.Module]:
    """The modules that use the kernel."""
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), _KernelForward)]


def enable(modules: Iterable[nn.Module]) -> None:
    """Make these modules use the kernel."""
    for module in modules:
        vars(module)["forward"] = _KernelForward(module)


def disable(modules: Iterable[nn.Module]) -> None:
    """Give modules their own forward back."""
    for module in modules:
        vars(module).pop("forward", None)
