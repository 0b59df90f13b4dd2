"""Modules that run one of our kernels in place of PyTorch's function: measuring, putting in, taking out.

It knows no kernel: attention.py, norm.py and mlp.py find the calls and say what to run.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmtkern.nn import NotPickled
from rmtkern.packing.report import SiteReport
from rmtkern.packing.timing import Timer
from rmtkern.progress import progress

__all__ = ["Call", "KernelForward", "disable", "enable", "measure_sites"]


class Call(Protocol):
    """One call of PyTorch's function that a forward pass made, or of several modules that one kernel may compute."""

    @property
    def reason(self) -> str | None:
        """Why the kernel cannot compute it, or None."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its inputs."""

    def torch(self) -> Tensor:
        """Without the kernel."""

    def kernel(self) -> Tensor:
        """Our kernel's result."""

    def excess(self) -> float:
        """The kernel's error against float64 over what is allowed."""


class KernelForward(NotPickled):
    """Stands as a module's `forward`: its own one, with the kernel where it can compute the call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's class says; the subclass says how."""
        raise NotImplementedError

    def start(self) -> None:
        """Stand in its module."""
        vars(self.module)["forward"] = self

    def stop(self) -> None:
        """Give its module its own forward back."""
        vars(self.module).pop("forward", None)

    @classmethod
    def of(cls, model: nn.Module) -> list["KernelForward"]:
        """Those that stand in a model."""
        found = (vars(module).get("forward") for module in model.modules())
        return [forward for forward in found if isinstance(forward, cls)]


def enable(forwards: Iterable[KernelForward]) -> None:
    """Make their modules use the kernel."""
    for forward in forwards:
        forward.start()


def disable(forwards: Iterable[KernelForward]) -> None:
    """Give their modules their own forward back."""
    for forward in forwards:
        forward.stop()


def measure_sites(
    kernel: str,
    calls: Mapping[str, Sequence[Call]],
    margin: float,
    budget_ms: float,
    timer: Timer,
    show_progress: bool | None = False,
    *,
    rival: str = "PyTorch's",
) -> list[SiteReport]:
    """Check and time our kernel against what it stands for on the calls that each module made.

    Args:
        kernel: its name, as the timer gets it: "attention" is timed as "attention/torch" and "attention/kernel".
        calls: module name -> its calls; one object for calls that would be measured alike.
        margin: by what fraction the kernel must be faster, [0, 1).
        budget_ms: time spent on each distinct call [ms].
        timer: as `pack_` takes it.
        show_progress: show a bar; None: only on a terminal.
        rival: whose time it is compared with, in the words of a report.

    Returns:
        One entry for each module; `used` says whether the kernel won all of its calls.
    """
    theirs, ours = f"{kernel}/torch", f"{kernel}/kernel"
    ms: dict[int, Mapping[str, float]] = {}
    why: dict[int, str] = {}
    distinct = {id(call): call for found in calls.values() for call in found}
    for call in progress(distinct.values(), f"timing {kernel}", total=len(distinct), show=show_progress):
        if call.reason is not None:
            why[id(call)] = call.reason
            continue
        with torch.no_grad():
            if (excess := call.excess()) > 1:
                why[id(call)] = f"the kernel misses the accuracy rule by a factor {excess:.2g}"
                continue
            ms[id(call)] = times = timer({theirs: call.torch, ours: call.kernel}, budget_ms)
        if times[ours] > (1 - margin) * times[theirs]:
            gain = times[theirs] / times[ours]
            why[id(call)] = f"{gain:.2f}x {rival}, short of the margin ({100 * margin:g} % less time)"
    reports = []
    for name, found in calls.items():
        measured = [ms[id(call)] for call in found if id(call) in ms]
        slowest = max(measured, key=lambda times: times[theirs], default=None)
        against = [why[id(call)] for call in found if id(call) in why]
        gains = sorted({f"{times[theirs] / times[ours]:.2f}x" for times in measured})
        reports.append(
            SiteReport(
                name,
                tuple(dict.fromkeys(call.shapes for call in found)),
                None if slowest is None else slowest[theirs],
                None if slowest is None else slowest[ours],
                not against,
                "; ".join(dict.fromkeys(against)) or f"{' and '.join(gains)} {rival}",
            )
        )
    return reports
