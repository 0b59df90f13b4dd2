"""How candidates are timed: interleaved rounds, medians. It knows nothing about what it calls."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

__all__ = ["Timer", "interleaved_ms"]

Timer = Callable[[Mapping[str, Callable[[], object]], float], Mapping[str, float]]
"""(name -> call, budget_ms) -> (name -> ms)."""


def interleaved_ms(calls: Mapping[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """Median time of each call in interleaved rounds.

    Args:
        calls: name -> function; each round runs all of them in turn, short ones several times.
        budget_ms: stop after about this long, but not before 5 rounds (3 if a round takes over a second).

    Returns:
        name -> ms: CPU time of this thread if torch uses one thread (steady on a busy machine), else wall time.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
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
            start = clock()
            for _ in range(repeats[name]):
                calls[name]()
            taken_ms = 1e3 * (clock() - start)
            spent += taken_ms
            samples[name].append(taken_ms / repeats[name])
        rounds += 1
    return {name: median(times) for name, times in samples.items()}
