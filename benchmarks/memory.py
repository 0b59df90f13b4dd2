"""Peak memory of a model that runs, in a process of its own that holds nothing else, and of a call in this one.

The peak is VmHWM and not ru_maxrss, because that one starts at the peak of the process that started this one.
"""

import copy
import ctypes
import gc
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.record import ROOT
from rmtkern import load, save, unpack_
from rmtkern.packing import is_packed

__all__ = ["peak_beyond", "peak_mib", "status_mib", "weights_mib"]

Result = TypeVar("Result")


def peak_mib(model: nn.Module, images: Tensor, threads: int) -> float:
    """MiB at the highest, over loading the model and running it twice on the images; torch itself is in it.

    Args:
        model: that pickles, or packed: then it is loaded from its file into a model without weights.
        images: what it is called with.
        threads: of torch.

    Raises:
        RuntimeError: the other process failed; with its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        if is_packed(model):
            save(model, path.with_suffix(".safetensors"))
            model = _without_weights(model)
        torch.save((model, images), path)
        command = [sys.executable, "-m", "benchmarks.memory", str(path), str(threads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the peak memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def peak_beyond(call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call returns, and the peak of the resident set while it ran beyond what was held before it [MiB].

    Memory that was freed before is given back to the system first, so that the call cannot use it unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = status_mib("VmRSS")
    result = call()
    return result, status_mib("VmHWM") - before


def weights_mib(model: nn.Module) -> float:
    """Of all parameters, each once [MiB]."""
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def status_mib(field: str) -> float:
    """VmRSS (resident now) or VmHWM (at the highest) of this process [MiB]."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"no {field} in /proc/self/status: peak memory needs Linux")
    return int(match[1]) / 1024


def _without_weights(packed: nn.Module) -> nn.Module:
    """The model as it was before it was packed, its parameters on the meta device."""
    model = copy.deepcopy(packed)
    unpack_(model)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return model


def _main(path: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model, images = torch.load(path, weights_only=False)
    if (packed := Path(path).with_suffix(".safetensors")).exists():
        load(packed, model)
    with torch.no_grad():
        for _ in range(2):
            model(images)
    print(status_mib("VmHWM"))


if __name__ == "__main__":
    _main(*sys.argv[1:])
