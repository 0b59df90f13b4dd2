"""Batches that wait at each stage, each in a thread of its own: any model will do, and nothing is computed twice.

Only one thread runs at a time. What a model holds on to until its end, such as the inputs of its first block, is held.
"""

from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import torch

from rmtkern.pruning.memory import give_memory_back, give_thread_buffers_back
from rmtkern.pruning.stages import Call, Stage, before_each, refuse_other_order

__all__ = ["visit_waiting"]


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
        give_thread_buffers_back()
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


def visit_waiting(
    stages: Sequence[Stage],
    runs: Iterable[Callable[[], Any]],
    visit: Callable[[Stage, list[Call]], object],
    leave: Callable[[Stage], None],
) -> list[Stage]:
    """Visit the stages in the order in which the batches come to them; `leave` them all once the passes have ended.

    A stage that a pass calls again is not visited again, and runs as it was left.

    Args:
        stages: of the model.
        runs: one forward pass of the model for each batch, at least one.
        visit: gets the stage and one call for each batch.
        leave: gets the stages.

    Returns:
        The stages that were visited.

    Raises:
        ValueError: batches that reach different stages.
        Exception: whatever the model, `visit` or `leave` raises. No thread and no hook is left behind.
    """
    forwards: list[_Forward] = []
    visited: list[Stage] = []
    with before_each(stages, _pausing(forwards)):
        try:
            found = []
            for run in runs:  # one at a time, so that a loader's batches need not all be in memory
                forwards.append(_Forward(run))
                found.append(forwards[-1].advance())
            while True:
                reached = [event[0] if event else None for event in found]
                refuse_other_order(reached)
                if reached[0] is None:
                    break
                calls = [event[1] for event in found if event]
                found.clear()
                visit(reached[0], calls)
                visited.append(reached[0])
                calls.clear()
                give_memory_back()  # what visit took
                found = [forward.advance() for forward in forwards]
        finally:
            for forward in forwards:
                forward.stop()
            give_memory_back()
    for stage in visited:
        leave(stage)
    return visited


def _pausing(forwards: Sequence[_Forward]) -> Callable[[Stage, Call], None]:
    """Every stage pauses the pass that calls it for the first time; other callers are let through."""
    seen: set[tuple[Thread, str]] = set()

    def reached(stage: Stage, call: Call) -> None:
        thread = current_thread()
        forward = next((one for one in forwards if one.thread is thread), None)
        if forward is not None and (thread, stage.name) not in seen:
            seen.add((thread, stage.name))
            forward.pause(stage, call)

    return reached
