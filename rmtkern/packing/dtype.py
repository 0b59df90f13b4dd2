"""Runs a float32 model in another dtype behind its own interface, and takes that back.

It knows no layout and no kernel; pack.py decides when.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from rmtkern.errors import PackedModelError

__all__ = ["DTYPES", "CastRecord", "cast_", "cast_record", "is_cast", "resume_cast_", "uncast_"]

DTYPES = (torch.float32, torch.bfloat16)
"""What a model can be packed in."""


def _cast(value: Any, source: tuple[torch.dtype, ...], target: torch.dtype) -> Any:
    return value.to(target) if isinstance(value, Tensor) and value.dtype in source else value


@dataclass(frozen=True)
class CastRecord:
    """How a model was cast: floating inputs to `inside`, outputs of that dtype back to `outside`.

    Args:
        inside: dtype of the cast tensors.
        outside: dtype of the interface, and of these tensors before.
        names: of the parameters and buffers that were cast.
    """

    inside: torch.dtype
    outside: torch.dtype
    names: tuple[str, ...]


class _Interface:
    """A forward hook of a cast model."""

    def __init__(self, record: CastRecord) -> None:
        self.record = record


class _Enter(_Interface):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        inside = self.record.inside
        if not torch.compiler.is_compiling():
            name, first = next(module.named_parameters(), ("", None))
            if first is not None and first.dtype != inside and name in self.record.names:
                raise PackedModelError(
                    f"the model was packed in {inside} behind a {self.record.outside} interface and has been cast to"
                    f" {first.dtype} since; call rmtkern.unpack_(model) first, cast it, then pack_ again"
                )
        return pytree.tree_map(lambda value: _cast(value, (torch.float32, torch.float64), inside), (args, kwargs))


class _Leave(_Interface):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        record = self.record
        return pytree.tree_map(lambda value: _cast(value, (record.inside,), record.outside), output)


def is_cast(model: nn.Module) -> bool:
    """Whether `cast_` changed this model (or the one it is a copy of)."""
    return cast_record(model) is not None


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
    handles = resume_cast_(model, CastRecord(dtype, torch.float32, tuple(saved)))

    def restore() -> None:
        for handle in handles:
            handle.remove()
        for name, tensor in _tensors(model).items():
            if name in saved:
                tensor.data = saved[name]

    return restore


def resume_cast_(model: nn.Module, record: CastRecord) -> tuple[RemovableHandle, RemovableHandle]:
    """Give a model the inside and the interface that a record says.

    Args:
        model: gets two hooks; what the record names and is not of the inner dtype yet is cast.
        record: how it was cast.

    Returns:
        The handles of the hooks.
    """
    for name, tensor in _tensors(model).items():
        if name in record.names and tensor.dtype == record.outside:
            tensor.data = tensor.data.to(record.inside)
    return (
        model.register_forward_pre_hook(_Enter(record), with_kwargs=True, prepend=True),
        model.register_forward_hook(_Leave(record)),
    )


def cast_record(model: nn.Module) -> CastRecord | None:
    """How `cast_` changed this model, or None."""
    return next((hook.record for hook in model._forward_hooks.values() if isinstance(hook, _Leave)), None)


def uncast_(model: nn.Module) -> bool:
    """Turn a cast model's tensors back into float32 (with the precision they have now) and drop the casts.

    Args:
        model: what `cast_` changed, or a copy of it; changed in place.

    Returns:
        Whether there was anything to do.
    """
    record = cast_record(model)
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Interface)]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if record is None:
        return False
    for name, tensor in _tensors(model).items():
        if name in record.names and tensor.dtype == record.inside:
            tensor.data = tensor.data.to(record.outside)
    return True
