"""What can be checked of the GPU kernels without a GPU, in as many processes as there are cores: `make gpu-static`.

First the interpreted and the compiled tests, each in shards, then the compile matrix, whose processes take the cores by
themselves. A step's output comes when it ends, with its CPU time; kernels that were compiled by one are there for the
others, in a folder that goes with the run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Step:
    """A command and what it adds to the environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """Exit status, CPU time of the process and all that it started [s], wall time [s] and output of a step."""

    status: int
    cpu_s: float
    wall_s: float
    output: str


def tests(jobs: int) -> list[Step]:
    """The steps that may run beside each other."""
    steps = []
    for kind, environment in (("compiled", {}), ("interpreted", {"TRITON_INTERPRET": "1"})):
        for i in range(1, jobs + 1):
            command = ["-m", "pytest", "-q", "tests/gpu", "-m", kind, "--durations=5"]
            steps.append(Step(f"{kind} {i}/{jobs}", command, {**environment, "RMTKERN_GPU_SHARD": f"{i}/{jobs}"}))
    return steps


def run(step: Step, cache: str) -> Ran:
    """Run a step to its end."""
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **one_thread, "TRITON_CACHE_DIR": cache, **step.environment}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    return Ran(process.returncode, usage.ru_utime + usage.ru_stime, time.perf_counter() - began, text)


def main(jobs: int) -> int:
    """Run all steps and print what each says; 0 if none failed."""
    began, total, failed = time.perf_counter(), 0.0, []

    def note(step: Step, ran: Ran) -> None:
        nonlocal total
        total += ran.cpu_s
        print(f"{ran.output}== {step.name}: exit {ran.status}, CPU {ran.cpu_s:.0f} s, {ran.wall_s:.0f} s\n", flush=True)
        if ran.status:
            failed.append(step.name)

    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        steps = tests(jobs)
        for step, ran in zip(steps, pool.map(lambda step: run(step, cache), steps), strict=True):
            note(step, ran)
        matrix = Step("matrix", ["-m", "tests.gpu.matrix", "--jobs", str(jobs)])
        note(matrix, run(matrix, cache))
    wall = time.perf_counter() - began
    print(f"{jobs} processes, CPU {total:.0f} s, {wall:.0f} s; failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    sys.exit(main(parser.parse_args().jobs))
