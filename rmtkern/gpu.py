"""Which GPUs and sizes the kernels are written for, whether this process has one, and how each sums float32.

It imports no GPU package and knows no kernel.
"""

import os

import torch

__all__ = ["ARCHITECTURES", "FEATURES", "ROWS", "architecture", "has_device", "precision"]

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""What the kernels are compiled and checked for; others are refused."""
ROWS = 2**31
"""Tokens and stored values stay below: kernels count them in 32 bits."""
FEATURES = 2**23
"""N and K stay below: the offsets within a tile of 128 rows are counted in 32 bits too."""


def has_device() -> bool:
    """Whether GPU kernels can run in this process: on a device, or in Triton's interpreter."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def architecture(backend: str, arch: int | str) -> str | None:
    """The name in `ARCHITECTURES` whose code runs on a device, or None if none does.

    Args:
        backend: "cuda" or "hip".
        arch: compute capability as an integer (86 for 8.6), or AMD's name such as "gfx942:sramecc+".
    """
    if backend == "hip":
        name = str(arch).split(":")[0]
    else:
        number = int(arch)
        same_family = {87: 86, 101: 100, 103: 100, 121: 120}
        name = f"sm_{same_family.get(number, number)}"
    return name if name in ARCHITECTURES else None


def precision(itemsize: int, arch: str) -> str:
    """How a dot product of float32 is summed: three TF32 products on NVIDIA's tensor cores, exactly elsewhere."""
    return "tf32x3" if itemsize == 4 and arch.startswith("sm_") else "ieee"
