"""An older revision of the library against this one: both built, both in processes of their own, rounds alternating.

`ratio` runs a kernel case; the worker below is what each of the two processes is. The dense forms run in both, too:
their ratio says how much of a difference is noise.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import KernelCase
from benchmarks.record import ROOT, revision, stamped
from benchmarks.timing import clock_for, interleaved, quantiles

__all__ = ["KEYS", "SHOWN", "built", "measure"]

KEYS = ("layer", "T", "dtype", "activation", "form", "threads", "isa", "base_revision")
SHOWN = ("form", "base_p50_ms", "p50_ms", "ratio")


@contextmanager
def built(base: str) -> Iterator[Path]:
    """A checkout of a revision with its extension built and with this benchmarks/; removed at the end.

    Raises:
        ValueError: git does not know the revision.
        RuntimeError: its extension does not build.
    """
    known = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--verify", f"{base}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise ValueError(f"--base {base}: not a revision that git knows here")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), base], check=True)
        try:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            if done.returncode or not list(tree.glob("rmtkern/_C*")):
                raise RuntimeError(f"--base {base}: its extension does not build:\n{done.stderr[-2000:]}")
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


class _Worker:
    """A process that runs one case with the library of one tree, a round at a time."""

    def __init__(self, tree: Path, case: KernelCase) -> None:
        command = [sys.executable, "-m", "benchmarks.revisions", json.dumps(asdict(case))]
        self.process = subprocess.Popen(
            command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.start = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(
                f"the benchmark process ended with {self.process.wait()}; its message is above; a base must have the"
                " Python modules that the benchmarks import"
            )
        return dict(json.loads(line))

    def round(self) -> dict[str, float]:
        """Milliseconds of each form, once."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._read()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def measure(case: KernelCase, tree: Path, base: str, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The forms that both revisions have: medians, and time of the base over time of this tree.

    Args:
        case: of the kernel level.
        tree: of `built`.
        base: the revision, for the rows.
        rounds: of each; a first one warms up.
        say: prints a line about what only one of them has.
    """
    samples: dict[str, list[dict[str, float]]] = {"base": [], "now": []}
    with _Worker(tree, case) as old, _Worker(ROOT, case) as new:
        workers = {"base": old, "now": new}
        for name, worker in workers.items():
            for line in worker.start["skipped"]:
                say(f"{name}: {line}")
        for index in range(rounds + 1):
            for name in workers if index % 2 else reversed(workers):
                taken = workers[name].round()
                if index:
                    samples[name].append(taken)
    rows = []
    for form in samples["now"][0]:
        if form not in samples["base"][0]:
            continue
        before, after = (np.array([taken[form] for taken in samples[name]]) for name in ("base", "now"))
        row = {
            "layer": case.layer,
            "T": case.tokens,
            "dtype": case.dtype,
            "form": form,
            "activation": case.activation,
            "threads": case.threads,
            "clock": clock_for(case.threads).name,
            "base": base,
            "base_revision": revision(tree),
            **{f"base_{name}": value for name, value in quantiles(before).items()},
            **quantiles(after),
            "ratio": float(np.median(before) / np.median(after)),
        }
        rows.append(stamped(row, isa=new.start["isa"]))
    return rows


def _work(case: KernelCase) -> None:
    """Answer every line of the input with one round in JSON; nothing else may be printed."""
    from benchmarks.kernel import Layer  # the library under test
    from rmtkern.layouts.cpu import isas

    skipped: list[str] = []
    with torch.no_grad():
        layer = Layer(case, skipped.append)
        print(json.dumps({"skipped": skipped, "isa": (isas() or ["none"])[0]}), flush=True)
        for _ in sys.stdin:
            times = interleaved(layer.calls, clock_for(case.threads), 1, layer.inner, warm_up=0)
            print(json.dumps({name: float(taken[0]) for name, taken in times.items()}), flush=True)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    _work(KernelCase(**{**fields, "contenders": tuple(fields["contenders"])}))
