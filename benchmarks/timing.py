"""How calls are timed: in interleaved rounds, on CPU time for one thread and wall time for several.

It knows nothing about what it calls.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Clock", "clock_for", "interleaved", "quantiles", "threads_used"]

Calls = Mapping[str, Callable[[], Any]]
SETTLE = 0.005
"""Seconds that worker threads of the call before get to stop spinning, where wall time counts."""


@dataclass(frozen=True)
class Clock:
    """A clock and its name for the results."""

    name: str
    read: Callable[[], float]


WALL = Clock("wall", time.perf_counter)


def clock_for(threads: int, own_threads: bool = False) -> Clock:
    """CPU time for one thread, so that a busy machine does not count; wall time for several.

    Args:
        threads: that the calls use.
        own_threads: whether a call may run on another thread than the caller's, as other engines do; then it is the
            CPU time of the whole process.
    """
    if threads > 1:
        return WALL
    return Clock("process CPU", time.process_time) if own_threads else Clock("thread CPU", time.thread_time)


def interleaved(calls: Calls, clock: Clock, rounds: int, inner: int = 1, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Milliseconds per call [rounds] of each.

    Args:
        calls: name -> function. Each round runs all of them, every second one in reverse order; where wall time counts,
            each once untimed before, so that its threads are awake, as they are within a model.
        clock: what is read.
        rounds: that count.
        inner: calls of one function in a round.
        warm_up: rounds before them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(-warm_up, rounds):
        for name in names if round_ % 2 else reversed(names):
            if clock is WALL:
                time.sleep(SETTLE)
                calls[name]()  # which wakes its own threads
            start = clock.read()
            for _ in range(inner):
                calls[name]()
            taken = clock.read() - start
            if round_ >= 0:
                samples[name].append(1e3 * taken / inner)
    return {name: np.array(taken) for name, taken in samples.items()}


def quantiles(samples: np.ndarray) -> dict[str, float]:
    """p20_ms, p50_ms and p80_ms of milliseconds."""
    return {f"p{q}_ms": float(np.quantile(samples, q / 100)) for q in (20, 50, 80)}


def threads_used(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """CPU time of all threads over that of the busiest one while `call` runs for some seconds; 1.0: one thread."""

    def ticks() -> dict[str, int]:
        found = {}
        for stat in Path("/proc/self/task").glob("*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # the thread has ended
                continue
            found[stat.parent.name] = int(fields[11]) + int(fields[12])  # user and system time
        return found

    call()
    before, start = ticks(), time.process_time()
    while time.process_time() - start < seconds:
        call()
    gained = [after - before.get(thread, 0) for thread, after in ticks().items()]
    return sum(gained) / max(1, *gained) if gained else 1.0
