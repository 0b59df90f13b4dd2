"""How candidates are timed: interleaved rounds, medians. It knows nothing about what it calls."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

__all__ = ["Timer", "interleaved_ms", "interleaved_samples"]

Timer = Callable[[Mapping[str, Callable[[], object]], float], Mapping[str, float]]
"""(name -> call, budget_ms) -> (name -> ms)."""
WALL = time.perf_counter
SETTLE = 0.005
"""Seconds in which worker threads stop spinning."""


def interleaved_ms(calls: Mapping[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """Median time of each call in interleaved rounds.

    Args:
        calls: name -> function; each round runs all of them in turn, short ones several times.
        budget_ms: stop after about this long, but not before 5 rounds (3 if a round takes over a second).

    Returns:
        name -> ms: CPU time of this thread if torch uses one thread (steady on a busy machine), else wall time.
    """
    samples = interleaved_samples(calls, budget_ms, time.thread_time if torch.get_num_threads() == 1 else WALL)
    return {name: median(times) for name, times in samples.items()}


def interleaved_samples(
    calls: Mapping[str, Callable[[], object]], budget_ms: float, clock: Callable[[], float], settle: bool = False
) -> dict[str, list[float]]:
    """Times of each call in every round.

    Args:
        calls: as `interleaved_ms` takes them.
        budget_ms: as `interleaved_ms` takes it.
        clock: what is read [s].
        settle: before a call is timed, let the worker threads of the one before stop spinning, and run it once untimed
            to wake its own: for engines that bring their own threads.

    Returns:
        name -> ms of one call, in each round.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(2):  # the first call of a kernel also sets it up
            start = clock()
            call()
            taken = clock() - start
            if taken > 0.1:
                break
        repeats[name] = max(1, min(100, int(5e-4 / max(taken, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent, rounds, names = 0.0, 0, list(calls)
    while rounds < (3 if spent > 1000 * max(rounds, 1) else 5) or (spent < budget_ms and rounds < 200):
        for name in names if rounds % 2 == 0 else reversed(names):
            if settle:
                time.sleep(SETTLE)
                calls[name]()
            start = clock()
            for _ in range(repeats[name]):
                calls[name]()
            taken_ms = 1e3 * (clock() - start)
            spent += taken_ms
            samples[name].append(taken_ms / repeats[name])
        rounds += 1
    return samples
