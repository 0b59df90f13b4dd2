"""Modules of a model that are visited as one, because a batch's pass through the model can stop between them.

It must not know what is done with them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from rmtkern.models import PrunableWeight

__all__ = ["Call", "Stage", "before_each", "find_stages", "refuse_other_order"]


@dataclass(frozen=True, eq=False)
class Stage:
    """A module that is called as one, and the weights inside it.

    Args:
        name: the module's path.
        module: the module.
        weights: those of the weights asked for that it owns; at least one.
    """

    name: str
    module: nn.Module
    weights: tuple[PrunableWeight, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """What one batch calls a stage with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_stages(model: nn.Module, weights: Sequence[PrunableWeight]) -> list[Stage]:
    """Divide weights into stages: the innermost list item (ModuleList, Sequential) with two or more of the weights.

    A weight outside of any such item is a stage of its own: the module that owns it.

    Args:
        model: owns the weights.
        weights: from models.prunable_weights(model, ...).

    Returns:
        In the order of the first weight; together they hold each weight once.
    """
    modules = dict(model.named_modules())
    paths = [_chain(modules, weight.name.rpartition(".")[0]) for weight in weights]
    inside: dict[str, int] = {}
    for chain in paths:
        for path in chain:
            inside[path] = inside.get(path, 0) + 1
    found: dict[str, list[PrunableWeight]] = {}
    for weight, chain in zip(weights, paths, strict=True):
        items = [path for path in chain if inside[path] > 1 and _is_item(modules, path)]
        found.setdefault(items[-1] if items else chain[-1], []).append(weight)
    return [Stage(name, modules[name], tuple(owned)) for name, owned in found.items()]


def _chain(modules: dict[str, nn.Module], owner: str) -> list[str]:
    """The paths from the model to the module that owns a weight, or that calls it by its parameters (attention)."""
    chain, path = [owner], owner
    while path:
        path = path.rpartition(".")[0]
        chain.append(path)
    chain.reverse()
    return chain[:-1] if len(chain) > 1 and isinstance(modules[chain[-2]], nn.MultiheadAttention) else chain


def _is_item(modules: dict[str, nn.Module], path: str) -> bool:
    return bool(path) and isinstance(modules[path.rpartition(".")[0]], nn.ModuleList | nn.Sequential)


@contextmanager
def before_each(stages: Sequence[Stage], reached: Callable[[Stage, Call], None]) -> Iterator[None]:
    """While it lasts, every call of a stage calls `reached` first, before other hooks."""

    def hook_of(stage: Stage) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached(stage, Call(args, kwargs))

        return hook

    handles = [stage.module.register_forward_pre_hook(hook_of(stage), prepend=True, with_kwargs=True)
               for stage in stages]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_other_order(reached: Iterable[Stage | None]) -> None:
    """Raise if batches have come to different stages, or some to the end (None).

    Raises:
        ValueError: they have.
    """
    names = sorted({stage.name if stage else "the end" for stage in reached})
    if len(names) > 1:
        raise ValueError(
            "calibration: expected every batch to run the layers in one order, but some came to "
            f"{' and others to '.join(names)}; give batches that the model treats alike"
        )
