"""Device: where a model lies, as pack_ must know it: what may run there, how it is timed, what the times depend on.

It knows no model beyond where its tensors are, and chooses nothing.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmtkern.environment import version
from rmtkern.errors import KernelUnavailable
from rmtkern.examples import Example
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.dense.weight import FORMS
from rmtkern.ops import linear
from rmtkern.packing.dtype import DTYPES
from rmtkern.packing.events import Clock, CudaClock, EventTimer
from rmtkern.packing.timing import Timer, interleaved_ms

__all__ = ["Device", "cuda_device", "device_of"]


@dataclass(frozen=True)
class Device:
    """What pack_ does differently from one kind of device to another.

    Args:
        dtypes: of the linears that kernels take there.
        dense: names in `layouts.dense.weight.FORMS` of the dense forms worth timing.
        timer: how candidates are timed, unless the caller says.
        kernels: whether our attention and LayerNorm kernels run there.
        reason: why none of our kernels runs there, or None; every layer then stays as it is.
        here: fields of `DecisionKey` that name this device in place of the CPU, its instruction set and threads.
        name: of the device in a report; empty for the CPU, whose report says the threads.
    """

    dtypes: tuple[torch.dtype, ...]
    dense: tuple[str, ...]
    timer: Timer
    kernels: bool = True
    reason: str | None = None
    here: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def keys(self, timer: Timer) -> dict[str, Any]:
        """The fields `here` for times of a timer: those of graphs are none of a model that is launched otherwise."""
        if isinstance(timer, EventTimer) and not timer.graphs:
            return {**self.here, "isa": f"{self.here.get('isa', '')}, kernel by kernel"}
        return dict(self.here)

    def recipes(self, weight: Tensor, layouts: Sequence[str]) -> dict[str, tuple[str, dict[str, int]]]:
        """What is worth timing for a weight [N, K]: dense forms of this device, then the layouts' variants.

        Returns:
            A name for each -> layout, params for its `pack`.
        """
        found = {}
        for layout in ("dense", *layouts):
            kind = LAYOUTS[layout]
            for params in kind.variants(weight) if weight.dtype in kind.dtypes else ():
                if layout != "dense" or FORMS[params["form"]] in self.dense:
                    found[f"{layout}{params}"] = (layout, params)
        return found


def device_of(model: nn.Module, examples: Sequence[Example]) -> Device:
    """The device that holds a model.

    Args:
        model: with at least one parameter or buffer.
        examples: what it is called with.

    Returns:
        Its description; other kinds than "cpu" and "cuda" (which ROCm is too) have a `reason`.

    Raises:
        ValueError: the model is on "meta" or on several devices, or an example's tensor is elsewhere (one of no
            dimension may be on the CPU, as PyTorch allows it).
    """
    where: dict[torch.device, str] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        where.setdefault(tensor.device, name)
    meta = next((name for device, name in where.items() if device.type == "meta"), None)
    if meta is not None:
        raise ValueError(
            f"model: {meta} is on device meta and has no values; call model.to_empty(device=...) and load its weights"
        )
    if len(where) > 1:
        found = ", ".join(f"{device} ({name})" for device, name in where.items())
        raise ValueError(f"model: expected all parameters and buffers on one device, got {found}; call model.to(...)")
    (device,) = where
    for index, example in enumerate(examples):
        for value in pytree.tree_leaves(example):
            if isinstance(value, Tensor) and value.device != device and (value.ndim or value.device.type != "cpu"):
                raise ValueError(
                    f"example {index}: a tensor is on {value.device}, the model on {device};"
                    f" move it: .to({str(device)!r})"
                )
    if device.type == "cpu":
        return Device(DTYPES, FORMS, interleaved_ms)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = f"compute capability {properties.major}.{properties.minor}"
        if torch.version.hip is not None:
            arch = properties.gcnArchName
        return cuda_device(properties.name, arch, CudaClock(device), _reason_against(device))
    reason = f"device {device}; there are kernels for cpu and cuda only: call model.cpu() to pack it"
    return Device(DTYPES, ("torch",), interleaved_ms, kernels=False, reason=reason, name=str(device))


def cuda_device(name: str, arch: str, clock: Clock, reason: str | None = None) -> Device:
    """A CUDA or ROCm device: nn.Linear's cuBLAS against our Triton kernels, timed by its own events.

    Args:
        name: such as "NVIDIA H200".
        arch: compute capability, or AMD's name of the architecture.
        clock: that times on it.
        reason: why Triton kernels do not run on it, or None.
    """
    triton = version("triton") or "none"
    settings = [arch, f"triton {triton}", f"float32 {torch.get_float32_matmul_precision()}"]
    if importlib.util.find_spec("cupy") is not None:  # then nofm has another kernel
        settings.append("cupy")
    if os.environ.get("RMTKERN_AUTOTUNE") == "1":
        settings.append("autotuned")
    if forced := os.environ.get("RMTKERN_BACKEND"):
        settings.append(f"backend {forced}")
    return Device(
        (*DTYPES, torch.float16),
        ("torch", "own"),
        EventTimer(clock),
        kernels=False,
        reason=reason,
        here={"cpu": name, "isa": ", ".join(settings), "threads": 1},
        name=f"{name}, {arch}, triton {triton}",
    )


def _reason_against(device: torch.device) -> str | None:
    """Why our own dense kernel does not run on a device, for each backend; None if it does."""
    one = LAYOUTS["dense"].pack(torch.ones(1, 1, device=device), form=FORMS.index("own"))
    try:
        linear(torch.ones(0, 1, device=device), one)  # chooses a kernel and, for no tokens, launches none
    except KernelUnavailable as error:
        return str(error)
    return None
