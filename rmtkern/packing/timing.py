"""How candidates are timed: interleaved rounds, medians. It knows nothing about what it calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

__all__ = ["Timer", "in_rounds", "interleaved_ms", "interleaved_samples", "repeats_of"]

Timer = Callable[[Mapping[str, Callable[[], object]], float], Mapping[str, float]]
"""(name -> call, budget_ms) -> (name -> ms). A call that has a method `prepare` wants it run, untimed, before it."""
WALL = time.perf_counter
ROUND_MS = 0.5
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
        repeats[name] = repeats_of(1e3 * taken)

    def measure(name: str) -> tuple[float, float]:
        begin = clock()
        if prepare := getattr(calls[name], "prepare", None):
            prepare()
        prepared_ms = 1e3 * (clock() - begin)
        if settle:
            time.sleep(SETTLE)
            calls[name]()
        start = clock()
        for _ in range(repeats[name]):
            calls[name]()
        taken_ms = 1e3 * (clock() - start)
        return taken_ms / repeats[name], taken_ms + prepared_ms

    return in_rounds(list(calls), measure, budget_ms)


def repeats_of(ms: float) -> int:
    """How often a round runs a call that takes so long: short ones until they have taken about ROUND_MS, 1..100."""
    return max(1, min(100, int(ROUND_MS / max(ms, 1e-4))))


def in_rounds(
    names: Sequence[str], measure: Callable[[str], tuple[float, float]], budget_ms: float
) -> dict[str, list[float]]:
    """Measure everything in turn, in every other round backwards.

    Args:
        names: what there is to measure.
        measure: name -> ms of one call, and ms that this took of the budget.
        budget_ms: stop after about this long, but not before 5 rounds (3 if a round takes over a second) nor after 200.

    Returns:
        name -> ms of one call, in each round.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent, rounds = 0.0, 0
    while rounds < (3 if spent > 1000 * max(rounds, 1) else 5) or (spent < budget_ms and rounds < 200):
        for name in names if rounds % 2 == 0 else reversed(names):
            ms, taken_ms = measure(name)
            spent += taken_ms
            samples[name].append(ms)
        rounds += 1
    return samples
