"""One forward pass over several batches that stops at each block of the model, where the block's weights may change.

Every batch runs in a thread that waits at the next block, so any model will do and nothing is computed twice; only one
thread runs at a time. It must not know what is done with the blocks.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import torch
from torch import nn

from rmtkern.models import PrunableWeight

__all__ = ["Call", "Stage", "find_stages", "give_memory_back", "visit_stages"]


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


class _Stopped(BaseException):
    """Ends a forward pass that is not needed any more."""


class _Forward:
    """One batch's forward pass, in a thread that waits where a stage is called."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._answers: SimpleQueue[bool] = SimpleQueue()
        self._started, self._ended = False, False
        self.thread = Thread(target=self._work, args=(run,), name="calibration", daemon=True)

    def _work(self, run: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():  # the mode belongs to the thread
                run()
            self._events.put(("end", None))
        except _Stopped:
            self._events.put(("end", None))
        except BaseException as error:
            self._events.put(("error", error))

    def pause(self, stage: Stage, call: Call) -> None:
        """Called by the thread: wait until the pass may go on."""
        self._events.put(("stage", (stage, call)))
        del call
        if not self._answers.get():
            raise _Stopped

    def advance(self) -> tuple[Stage, Call] | None:
        """Run to the next stage; None at the end; raises what the model raised."""
        if self._started:
            self._answers.put(True)
        else:
            self._started = True
            self.thread.start()
        kind, value = self._events.get()
        give_memory_back()  # what this thread took
        self._ended = kind != "stage"
        if kind == "error":
            raise value
        return value

    def stop(self) -> None:
        """End the thread, wherever it is."""
        if self._started and not self._ended:
            self._answers.put(False)
        if self._started:
            self.thread.join()


def give_memory_back() -> None:
    """To the system, what the allocator keeps of it: glibc's keeps some for every thread, several times a model's size.

    Nothing happens with another C library, or where it cannot be reached.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def visit_stages(
    stages: Sequence[Stage],
    runs: Iterable[Callable[[], Any]],
    visit: Callable[[Stage, list[Call]], None],
) -> None:
    """Run all batches stage by stage; before they pass a stage, `visit` may use it and change its weights.

    A stage that a pass calls again is not visited again.

    Args:
        stages: from `find_stages`; their modules run in one order, the same for every batch.
        runs: one forward pass of the model for each batch, at least one.
        visit: gets the stage and one call for each batch; it may run `stage.module(*call.args, **call.kwargs)`.

    Raises:
        ValueError: a stage that no batch reaches, or batches that reach different ones.
        Exception: whatever the model or `visit` raises. No thread and no hook is left behind.
    """
    forwards: list[_Forward] = []
    left = {stage.name for stage in stages}
    with _hooks(stages, forwards):
        try:
            found = []
            for run in runs:  # one at a time, so that a loader's batches need not all be in memory
                forwards.append(_Forward(run))
                found.append(forwards[-1].advance())
            while (stage := _same_stage(found)) is not None:
                calls = [event[1] for event in found if event]
                found.clear()
                left.discard(stage.name)
                visit(stage, calls)
                calls.clear()
                give_memory_back()  # what visit took
                found = [forward.advance() for forward in forwards]
        finally:
            for forward in forwards:
                forward.stop()
            give_memory_back()
    if left:
        names = [weight.name for stage in stages if stage.name in left for weight in stage.weights]
        raise ValueError(
            f"calibration: no image reached {names[0]}; add it to ignore=, or use a method without calibration"
        )


def _same_stage(found: Sequence[tuple[Stage, Call] | None]) -> Stage | None:
    """The stage that all passes have come to; None at their end."""
    reached = {event[0] if event else None for event in found}
    if len(reached) > 1:
        names = sorted(stage.name if stage else "the end" for stage in reached)
        raise ValueError(
            "calibration: expected every batch to run the layers in one order, but some came to "
            f"{' and others to '.join(names)}; give batches that the model treats alike"
        )
    return reached.pop()


@contextmanager
def _hooks(stages: Sequence[Stage], forwards: Sequence[_Forward]) -> Iterator[None]:
    """Every stage pauses the pass that calls it for the first time; other callers are let through."""
    seen: set[tuple[Thread, str]] = set()

    def hook_of(stage: Stage) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            thread = current_thread()
            forward = next((one for one in forwards if one.thread is thread), None)
            if forward is not None and (thread, stage.name) not in seen:
                seen.add((thread, stage.name))
                forward.pause(stage, Call(args, kwargs))

        return hook

    handles = [stage.module.register_forward_pre_hook(hook_of(stage), prepend=True, with_kwargs=True)
               for stage in stages]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
