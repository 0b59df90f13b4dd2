"""Which architecture a Triton launch compiles for, and whether it is interpreted. Importing this imports triton."""

import torch
import triton
from triton.runtime import driver

from rmtkern.errors import KernelUnavailable
from rmtkern.gpu import ARCHITECTURES, architecture

__all__ = ["INTERPRETED", "reason_against_device", "target"]

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read by @triton.jit when it decorates, so fixed for a process


def reason_against_device(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a CUDA or ROCm device, or None if they do; not asked while PyTorch traces."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = architecture("hip", properties.gcnArchName)
    else:
        name = architecture("cuda", 10 * properties.major + properties.minor)
    return None if name else f"{torch.cuda.get_device_name(device)} is none of {', '.join(ARCHITECTURES)}"


def target() -> str:
    """The architecture that a launch on the current device compiles for; the interpreter runs sm_80's tables.

    Raises:
        KernelUnavailable: it is none of ARCHITECTURES.
    """
    if INTERPRETED:
        return "sm_80"
    found = driver.active.get_current_target()
    name = architecture(found.backend, found.arch)
    if name is None:
        raise KernelUnavailable(f"no Triton kernel for {found.backend} {found.arch}; expected {ARCHITECTURES}")
    return name
