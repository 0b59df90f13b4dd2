"""spectral on the CPU: the shared op with csrc/linear/spectral.inl behind it, on every instruction set."""

from rmtkern.layouts.cpu import linear, supports

__all__ = ["linear", "supports"]
