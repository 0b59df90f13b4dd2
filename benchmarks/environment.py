"""The environment that every result row carries: CPU, instruction sets, threads, versions, date; no host and no path."""

import datetime
import platform
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["cpu_model", "environment", "results_file"]

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """CPU name with family and model, as the kernel reports it."""
    fields = dict(
        (key.strip(), value.strip())
        for key, _, value in (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    )
    return f"{fields.get('model name', platform.machine())} family {fields.get('cpu family')} model {fields.get('model')}"


def environment() -> dict[str, str | int]:
    """Columns for a CSV row."""
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "date": datetime.date.today().isoformat(),
    }


def results_file(kind: str) -> Path:
    """benchmarks/results/<kind>-<cpu>.csv for this CPU."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in cpu_model().lower()).split())
    return RESULTS / f"{kind}-{slug}.csv"
