"""How candidates are timed on a GPU: by its events, in interleaved rounds, medians. It knows nothing of what it calls.

What is bound by launches, as single images are, is timed under CUDA graphs, so that kernels count and not Python.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

import torch

from rmtkern.packing.timing import Timer, in_rounds, repeats_of

__all__ = ["Clock", "CudaClock", "EventTimer", "how", "interleaved"]

Call = Callable[[], object]
LAUNCH_BOUND = 0.8
"""Share of a call's time on the device that giving it the work takes, from which the device is taken to wait for it."""


class Clock(Protocol):
    """A device that times what it is given; the only thing here that waits for it."""

    def ms(self, call: Call, repeats: int) -> tuple[float, float]:
        """Time of one call [ms] on the device, and how long giving it the work took, averaged over the repeats."""

    def capture(self, calls: Mapping[str, Call]) -> dict[str, Call]:
        """The work of each call as a graph that is launched whole; RuntimeError, with the reason, if that fails."""


class CudaClock:
    """Times by CUDA events, and captures CUDA graphs.

    Args:
        device: a CUDA or ROCm device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def ms(self, call: Call, repeats: int) -> tuple[float, float]:
        """As `Clock` says; one more call runs before, so that the device has work when the first timed one comes."""
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            call()
            begin.record()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            host = time.perf_counter() - start
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / repeats, 1e3 * host / repeats

    def capture(self, calls: Mapping[str, Call]) -> dict[str, Call]:
        """As `Clock` says; the graphs share their memory, so that no result of one may be read after another ran.

        A capture that fails may leave PyTorch's generator and allocator in a bad state, so calls that wait for the
        device, the usual cause, are found before it begins.
        """
        with torch.cuda.device(self.device):
            pool, replays = torch.cuda.graph_pool_handle(), {}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            mode = torch.cuda.get_sync_debug_mode()
            try:
                torch.cuda.set_sync_debug_mode("error")
                with torch.cuda.stream(side):  # libraries set up what they need for a stream at its first call
                    for call in calls.values():
                        call()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.stream(torch.cuda.current_stream()):  # which a failing capture does not put back
                for name, call in calls.items():
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=side):
                        call()
                    replays[name] = graph.replay
            return replays  # type: ignore[return-value]


def interleaved(clock: Clock, calls: Mapping[str, Call], budget_ms: float) -> dict[str, list[float]]:
    """Times of calls that have run before, in interleaved rounds.

    Args:
        clock: of the device.
        calls: name -> function; each round times all of them in turn, short ones several times.
        budget_ms: stop after about this long on the device, but not before 5 rounds (3 if a round takes over a second),
            nor after 200.

    Returns:
        name -> ms of one call on the device, in each round.
    """
    repeats = {name: repeats_of(clock.ms(call, 1)[0]) for name, call in calls.items()}

    def measure(name: str) -> tuple[float, float]:
        taken, _ = clock.ms(calls[name], repeats[name])
        return taken, taken * (repeats[name] + 1)

    return in_rounds(list(calls), measure, budget_ms)


class EventTimer:
    """A `Timer` for a GPU.

    Calls of which any is bound by launches are all timed under CUDA graphs, if all of them can be captured, else all of
    them as they come. `how` says what was done last.

    Args:
        clock: of the device.
        graphs: whether CUDA graphs may be used; without them times hold for code that launches kernel by kernel.
    """

    def __init__(self, clock: Clock, *, graphs: bool = True) -> None:
        self.clock = clock
        self.graphs = graphs
        self.how = ""

    def __call__(self, calls: Mapping[str, Call], budget_ms: float) -> dict[str, float]:
        """Median time of each call [ms on the device]; arguments as `interleaved` has them."""
        return {name: median(times) for name, times in self.samples(calls, budget_ms).items()}

    def samples(self, calls: Mapping[str, Call], budget_ms: float) -> dict[str, list[float]]:
        """The times of which a call of this object gives the medians."""
        self.how = "kernel by kernel"
        bound = False
        for call in calls.values():
            self.clock.ms(call, 1)  # the first call of a kernel also compiles it
            device, host = self.clock.ms(call, 1)
            bound |= host >= LAUNCH_BOUND * device
        if bound and self.graphs:
            try:
                calls = self.clock.capture(calls)
                self.how = "under CUDA graphs"
            except RuntimeError as error:
                self.how = f"kernel by kernel, as CUDA graphs failed: {str(error).partition(chr(10))[0]}"
        return interleaved(self.clock, calls, budget_ms)


def how(timer: Timer) -> str:
    """How a timer took its last times, in words for a report; empty where there is only one way."""
    return str(getattr(timer, "how", ""))
