"""Makes LayerNorm modules use our kernel instead of PyTorch's, and takes that back.

It finds them by watching a forward pass: a module whose whole forward is one call of F.layer_norm with its own
parameters. pack.py decides who gets the kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.layer_norm import layer_norm, reason_against
from rmtkern.packing.sites import KernelForward
from rmtkern.packing.watch import is_altered
from rmtkern.testing import excess_over

__all__ = ["NormCall", "NormForward", "watch_norms"]


@dataclass(frozen=True)
class NormCall:
    """One call of a LayerNorm module that a forward pass made.

    Args:
        module: the module.
        x: [..., K], as it was.
        reason: why the kernel cannot compute it, or None.
    """

    module: nn.LayerNorm
    x: Tensor
    reason: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a measurement depends on."""
        module = self.module
        affine = (module.weight is None, module.bias is None)
        return tuple(self.x.shape), self.x.stride(), self.x.dtype, affine, module.eps, self.reason

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the input."""
        return (tuple(self.x.shape),)

    def torch(self) -> Tensor:
        """PyTorch's own result."""
        y: Tensor = type(self.module).forward(self.module, self.x)
        return y

    def kernel(self) -> Tensor:
        """Our kernel's result."""
        return layer_norm(self.x, self.module.weight, self.module.bias, eps=self.module.eps)

    def excess(self) -> float:
        """The kernel's error against float64 over what is allowed: 2x PyTorch's, plus 4 eps of the scale."""
        module = self.module
        weight, bias = (None if p is None else p.double() for p in (module.weight, module.bias))
        exact = F.layer_norm(self.x.double(), module.normalized_shape, weight, bias, module.eps)
        return excess_over(self.kernel(), self.torch(), exact)


def _reason(module: nn.LayerNorm, x: Any) -> str | None:
    """Why the kernel cannot compute this call of the module, or None."""
    if not isinstance(x, Tensor):
        return "its input is no tensor"
    rows = [p for p in (module.weight, module.bias) if p is not None]
    reason = reason_against(x)
    if len(module.normalized_shape) != 1:
        reason = f"it normalises {len(module.normalized_shape)} dimensions; the kernel has the last one"
    elif x.ndim == 0 or x.shape[-1:] != module.normalized_shape or x.numel() == 0:
        reason = f"its input {list(x.shape)} is empty or does not end in {module.normalized_shape[0]}"
    elif any(p.dtype != x.dtype or p.device != x.device for p in rows):
        reason = "its parameters have another dtype or device than its input"
    elif torch.is_autocast_enabled("cpu"):
        reason = "autocast chooses the dtype"
    elif torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in rows)):
        reason = "a gradient is wanted"
    return reason


class NormForward(KernelForward):
    """Stands as a LayerNorm's `forward`: the kernel where it can compute the call, else the module's own."""

    module: nn.LayerNorm

    def __call__(self, x: Tensor) -> Tensor:
        """As the module's class says."""
        module = self.module
        if _reason(module, x) is None:
            return layer_norm(x, module.weight, module.bias, eps=module.eps)
        y: Tensor = type(module).forward(module, x)
        return y


class _Calls(TorchFunctionMode):
    """Notes calls of F.layer_norm: input, parameters, eps, result."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Any, ...] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is F.layer_norm:
            self.last = (*_arguments(*args, **(kwargs or {})), y)
        return y


def _arguments(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    return input, weight, bias, eps


@contextmanager
def watch_norms(model: nn.Module) -> Iterator[dict[str, list[NormCall]]]:
    """Which LayerNorm modules run in the forward passes inside the block, and on what.

    Args:
        model: what will run; while it lasts, its LayerNorms have a subclass of their class.
    """
    calls: dict[str, list[NormCall]] = {}
    seen: dict[tuple[Any, ...], NormCall] = {}
    mode = _Calls()
    originals: list[tuple[nn.Module, type]] = []

    def watched(base: type, name: str) -> type:
        def forward(self: nn.LayerNorm, x: Any, *args: Any, **kwargs: Any) -> Any:
            mode.last = None
            y = base.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
            reason = _reason(self, x)
            own = (x, self.weight, self.bias, y)
            if args or kwargs or mode.last is None:
                reason = "its forward is not one call of F.layer_norm"
            elif any(got is not want for got, want in zip((*mode.last[:3], mode.last[4]), own, strict=True)):
                reason = "its forward does more than F.layer_norm"
            elif mode.last[3] != self.eps:
                reason = "its forward has another eps"
            if isinstance(x, Tensor):  # calls that would be measured alike share one, so that its input is kept once
                call = NormCall(self, x.detach(), reason)
                calls.setdefault(name, []).append(seen.setdefault((base, *call.key), call))
            mode.last = None
            return y

        return type(base.__name__, (base,), {"forward": forward})

    try:
        for name, module in model.named_modules():
            if name and isinstance(module, nn.LayerNorm) and not is_altered(module):
                originals.append((module, type(module)))
                module.__class__ = watched(type(module), name)
        with mode:
            yield calls
    finally:
        for module, original in originals:
            module.__class__ = original
