"""Stages that hand on what they return: each one's inputs are the outputs of the one before, and inputs of that one.

Then no batch needs the rest of the model: one call for each is held, and replaced by the next stage's batch by batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.pruning.memory import give_memory_back
from rmtkern.pruning.stages import Call, Stage, before_each, refuse_other_order

__all__ = ["Chain", "find_chain", "visit_chain"]

_Path = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Chain:
    """Stages in the order in which a model runs them.

    Args:
        stages: at least one.
        links: for each but the last, the next one's arguments, with where each comes from in their place: a path into
            (args, kwargs, output) of this one.
    """

    stages: tuple[Stage, ...]
    links: tuple[Any, ...]

    def after(self, at: int, call: Call, output: Any) -> Call:
        """What the stage after the one at a place is called with, by what that one was called with and returned."""
        args, kwargs = _build(self.links[at], (call.args, call.kwargs, output))
        return Call(args, kwargs)


@dataclass(frozen=True, eq=False)
class _Event:
    stage: Stage
    call: Call
    output: Any


def find_chain(stages: Sequence[Stage], run: Callable[[], Any]) -> Chain | None:
    """The stages as a chain, by watching one forward pass; None if they are none.

    They are if each runs once and no two at once, no stage uses a weight that belongs to another, and the arguments of
    each are tensors (the same objects) that the one before returned or was given, and other values that it was given.

    Args:
        stages: of the model.
        run: one forward pass of the model; runs to its end.
    """
    events = _watch(stages, run)
    if events is None or len(events) != len(stages) or len({event.stage.name for event in events}) != len(stages):
        return None
    owners = {id(weight.parameter): stage for stage in stages for weight in stage.weights}
    uses = [(stage, owners.get(id(parameter), stage)) for stage in stages for parameter in stage.module.parameters()]
    if any(owner is not stage for stage, owner in uses):
        return None
    links = []
    for before, after in pairwise(events):
        try:
            links.append(_link(before, after))
        except _Unknown:
            return None
    return Chain(tuple(event.stage for event in events), tuple(links))


def visit_chain(
    chain: Chain,
    runs: Iterable[Callable[[], Any]],
    visit: Callable[[Stage, list[Call]], Sequence[Any] | None],
    leave: Callable[[Stage], None],
) -> None:
    """Visit the stages in order; each batch goes on by running the stage alone, and the last stage is not run.

    Args:
        chain: found by one of the runs; the others are taken to be alike.
        runs: one forward pass of the model for each batch; each is ended at the first stage.
        visit: gets the stage and one call for each batch; see visit.visit_stages.
        leave: gets the stage when all batches are past it.

    Raises:
        ValueError: a batch that reaches another stage first, or none.
        Exception: whatever the model, `visit` or `leave` raises. No hook is left behind.
    """
    calls = []
    with before_each(chain.stages, _end):
        for run in runs:  # one at a time, so that a loader's batches need not all be in memory
            stage, call = _first(run)
            refuse_other_order([chain.stages[0], stage])
            calls.append(call)
    del call
    give_memory_back()
    for at, stage in enumerate(chain.stages):
        outputs = deque(visit(stage, calls) or ())
        if at == len(chain.links):
            calls.clear()
            outputs.clear()
        give_memory_back()
        for i in range(len(calls)):
            calls[i] = chain.after(at, calls[i], outputs.popleft() if outputs else _run(stage, calls[i]))
        leave(stage)
        give_memory_back()


def _run(stage: Stage, call: Call) -> Any:
    return stage.module(*call.args, **call.kwargs)


def _watch(stages: Sequence[Stage], run: Callable[[], Any]) -> list[_Event] | None:
    """The calls of the stages in a pass, in order; None if one began before another had ended."""
    events: list[_Event] = []
    inside, nested = 0, False

    def before(*_: Any) -> None:
        nonlocal inside, nested
        nested, inside = nested or inside > 0, inside + 1

    def after_of(stage: Stage) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal inside
            inside -= 1
            events.append(_Event(stage, Call(args, kwargs), output))

        return after

    handles = [stage.module.register_forward_pre_hook(before, prepend=True) for stage in stages]
    handles += [stage.module.register_forward_hook(after_of(stage), with_kwargs=True) for stage in stages]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return None if nested else events


class _Unknown(Exception):
    """An argument that comes from elsewhere."""


def _link(before: _Event, after: _Event) -> Any:
    """The arguments of a stage with paths into (args, kwargs, output) of the one before in place of their values."""
    given = (before.call.args, before.call.kwargs)
    tensors = {id(leaf): path for path, leaf in _leaves((*given, before.output)) if isinstance(leaf, Tensor)}

    def paths_of(value: Any, path: _Path) -> Any:
        if type(value) in (tuple, list):
            return type(value)(paths_of(part, (*path, i)) for i, part in enumerate(value))
        if type(value) is dict:
            return {key: paths_of(part, (*path, key)) for key, part in value.items()}
        if isinstance(value, Tensor):
            if id(value) not in tensors:
                raise _Unknown
            return _Source(tensors[id(value)])
        if not _same(value, _at(given, path)):
            raise _Unknown
        return _Source(path)

    return paths_of((after.call.args, after.call.kwargs), ())


@dataclass(frozen=True)
class _Source:
    path: _Path


def _build(paths: Any, values: Any) -> Any:
    if isinstance(paths, _Source):
        return _at(values, paths.path)
    if isinstance(paths, dict):
        return {key: _build(part, values) for key, part in paths.items()}
    return type(paths)(_build(part, values) for part in paths)


def _at(values: Any, path: _Path) -> Any:
    for step in path:
        try:
            values = values[step]
        except (IndexError, KeyError, TypeError) as error:
            raise _Unknown from error
    return values


def _leaves(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """What is in tuples, lists and mappings, with the path to it; of equal places the last is the output's."""
    if isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _leaves(part, (*path, i))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*path, key))
    else:
        yield path, value


def _same(one: Any, other: Any) -> bool:
    plain = (bool, int, float, str, bytes, torch.dtype, torch.device)
    return one is other or (type(one) is type(other) and isinstance(one, plain) and one == other)


class _Reached(BaseException):
    """Ends a forward pass at a stage."""

    def __init__(self, stage: Stage, call: Call) -> None:
        super().__init__()
        self.stage, self.call = stage, call


def _first(run: Callable[[], Any]) -> tuple[Stage | None, Call]:
    """The first stage that a pass comes to, and what it calls it with."""
    try:
        run()
    except _Reached as reached:
        return reached.stage, reached.call
    return None, Call((), {})


def _end(stage: Stage, call: Call) -> None:
    """Every stage ends the pass that calls it."""
    raise _Reached(stage, call)
