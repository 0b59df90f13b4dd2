"""Where a number was measured: CPU, threads and versions; no host name and no path."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu_model", "environment", "environment_line", "version"]


def cpu_model() -> str:
    """CPU name with family and model as the kernel reports them; the bare machine type where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """CPU, threads and the versions that matter, JSON-safe."""
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }


def environment_line() -> str:
    """`environment` in one line, for people."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())
