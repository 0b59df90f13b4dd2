"""Runs a float32 model in another dtype behind its own interface, and takes that back.

It knows no layout and no kernel; packing.py decides when.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["DTYPES", "cast_", "is_cast", "uncast_"]

DTYPES = (torch.float32, torch.bfloat16)
"""What a model can be packed in."""


def _cast(value: Any, source: tuple[torch.dtype, ...], target: torch.dtype) -> Any:
    return value.to(target) if isinstance(value, Tensor) and value.dtype in source else value


class _Interface:
    """The forward hooks of a cast model: floating inputs to `inside`, outputs of that dtype back to `outside`.

    `names` are the parameters and buffers that were cast.
    """

    def __init__(self, inside: torch.dtype, outside: torch.dtype, names: tuple[str, ...]) -> None:
        self.inside, self.outside, self.names = inside, outside, names


class _Enter(_Interface):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map(lambda value: _cast(value, (torch.float32, torch.float64), self.inside), (args, kwargs))


class _Leave(_Interface):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map(lambda value: _cast(value, (self.inside,), self.outside), output)


def is_cast(model: nn.Module) -> bool:
    """Whether `cast_` changed this model (or the one it is a copy of)."""
    return any(isinstance(hook, _Interface) for hook in model._forward_hooks.values())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def cast_(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Turn the float32 parameters and buffers into `dtype`; inputs are cast on the way in and outputs on the way out.

    Args:
        model: changed in place.
        dtype: torch.bfloat16.

    Returns:
        A function that puts every tensor back as it was, bit for bit, as long as nothing else replaced it.
    """
    saved = {name: tensor.data for name, tensor in _tensors(model).items() if tensor.dtype == torch.float32}
    for name, tensor in _tensors(model).items():
        if name in saved:
            tensor.data = tensor.data.to(dtype)
    names = tuple(saved)
    handles = [
        model.register_forward_pre_hook(_Enter(dtype, torch.float32, names), with_kwargs=True, prepend=True),
        model.register_forward_hook(_Leave(dtype, torch.float32, names)),
    ]

    def restore() -> None:
        for handle in handles:
            handle.remove()
        for name, tensor in _tensors(model).items():
            if name in saved:
                tensor.data = saved[name]

    return restore


def uncast_(model: nn.Module) -> bool:
    """Turn a cast model's tensors back into float32 (with the precision they have now) and drop the casts.

    Args:
        model: what `cast_` changed, or a copy of it; changed in place.

    Returns:
        Whether there was anything to do.
    """
    found = [hook for hook in list(model._forward_hooks.values()) if isinstance(hook, _Leave)]
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Interface)]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for interface in found:
        for name, tensor in _tensors(model).items():
            if name in interface.names and tensor.dtype == interface.inside:
                tensor.data = tensor.data.to(interface.outside)
    return bool(found)
