"""The benchmarks on a GPU: its description, the time that a run may take, and the loop over the cases of both levels.

gpu_kernel.py and gpu_model.py measure one case each. Without a device everything here but `find` can be run with a
`Gpu` of one's own, as the tests do.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from benchmarks import cases, gpu_kernel, gpu_model
from benchmarks.cases import KernelCase, ModelCase
from benchmarks.contenders import Unavailable
from benchmarks.record import results_file, stamped, write_rows
from rmtkern.environment import version
from rmtkern.packing.events import Clock, CudaClock

__all__ = ["BUDGET_S", "CASES", "Gpu", "OutOfTime", "Ran", "find", "main", "run", "select"]

BUDGET_S = 540.0
"""Wall time of a run; what is not measured then is left out and named. With the start of Python below ten minutes."""
SHARE = {"kernel": 0.4, "model": 1.0}
"""Share of the run after which no case of the level starts, so that the next level gets its time; in this order."""

CASES: dict[str, Callable[[], Iterator[KernelCase] | Iterator[ModelCase]]] = {
    "kernel": cases.gpu_kernel_cases,
    "model": cases.gpu_model_cases,
}
LEVELS: dict[str, Any] = {"kernel": gpu_kernel, "model": gpu_model}

Rows = Sequence[Mapping[str, Any]]


class OutOfTime(BaseException):
    """The run's time is over; nothing on the way may take it for an error of its own."""


@dataclass(frozen=True)
class Gpu:
    """A device to measure on.

    Args:
        device: of the tensors.
        clock: that times there.
        facts: columns of every row that say what it is: gpu, capability, driver, cuda, triton.
    """

    device: torch.device
    clock: Clock
    facts: Mapping[str, Any]


def find() -> Gpu | str:
    """The current CUDA or ROCm device, or why there is none."""
    if not torch.cuda.is_available():
        return "no CUDA device: this PyTorch sees none; run it on a machine with a GPU, its driver and PyTorch for CUDA"
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip
    facts = {
        "gpu": properties.name,
        "capability": properties.gcnArchName if hip else f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": hip or torch.version.cuda,
        "triton": version("triton"),
    }
    return Gpu(device, CudaClock(device), facts)


def _driver() -> str | None:
    """Version of NVIDIA's driver, if its tool is there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split("\n")[0].strip() or None


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this (the main) thread once the seconds are over."""
    if seconds <= 0:
        raise OutOfTime

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Ran:
    """What a run did.

    Args:
        rows: number of them.
        failed: "<case>: <why>", where a result was wrong or a call failed.
        cut: names of the cases for which there was no time.
    """

    rows: int = 0
    failed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


def select(level: str, args: argparse.Namespace) -> list[KernelCase | ModelCase]:
    """The cases of a level that the options leave, in order."""
    found = []
    for case in CASES[level]():
        batch = case.batch if isinstance(case, ModelCase) else case.tokens // cases.IMAGE
        left = cases.only(case, args.only)
        if left is not None and (case.quick or not args.quick) and (not args.batches or batch in args.batches):
            found.append(left)
    return found


def run(
    args: argparse.Namespace,
    gpu: Gpu,
    say: Callable[[str], None],
    show: Callable[[str, Rows, Sequence[str]], None],
) -> Ran:
    """Measure what the options ask for, within the time that they give.

    Args:
        args: level (None: both), only, quick, batches and budget [s].
        gpu: the device.
        say: gets a line about what is left out.
        show: prints the rows of one case under a title.
    """
    start, ran = time.monotonic(), Ran()
    for level in (level for level in SHARE if args.level in (None, level)):
        module, longest = LEVELS[level], 0.0
        share = args.budget * (SHARE[level] if args.level is None else 1.0)
        for number, case in enumerate(select(level, args)):
            began = time.monotonic()
            if number and began - start + longest > share:
                ran.cut.append(case.name)
                continue
            try:
                with limited(args.budget - (began - start)):
                    rows = module.measure(case, gpu, say)
            except OutOfTime:
                ran.cut.append(case.name)
                continue
            except Unavailable as reason:
                say(f"skip {case.name}: {reason}")
                continue
            except torch.OutOfMemoryError:
                say(f"skip {case.name}: the device has too little memory")
                continue
            except (RuntimeError, ValueError) as error:
                ran.failed.append(f"{case.name}: {error}")
                continue
            longest = max(longest, time.monotonic() - began)
            rows = [stamped({**row, **gpu.facts}) for row in rows]
            if rows:
                show(case.name, rows, module.SHOWN)
                ran.rows += len(rows)
                if not args.quick:
                    write_rows(results_file(f"gpu-{level}", gpu.facts["gpu"]), rows, module.KEYS)
    return ran


def main(args: argparse.Namespace, say: Callable[[str], None], show: Callable[[str, Rows, Sequence[str]], None]) -> int:
    """Run on the device that is there; 0: all well, 1: a case failed or none was measured, 2: there is no device."""
    gpu = find()
    if isinstance(gpu, str):
        print(gpu, file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in gpu.facts.items()) + f", torch {torch.__version__}")
    ran = run(args, gpu, say, show)
    for line in ran.failed:
        print(f"FAILED {line}")
    if ran.cut:
        print(f"no time was left of {args.budget:g} s for: {', '.join(ran.cut)}")
    print(f"\n{ran.rows} rows" + ("" if args.quick else " in benchmarks/results"))
    return 1 if ran.failed or not ran.rows else 0
