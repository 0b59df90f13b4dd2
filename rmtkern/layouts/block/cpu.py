"""block on the CPU: the shared op with csrc/linear/block.inl behind it, on every instruction set, for mini-blocks."""

from torch import Tensor

from rmtkern.layouts import cpu
from rmtkern.layouts.block.weight import BlockWeight
from rmtkern.layouts.cpu import linear

__all__ = ["linear", "supports"]


def supports(w: BlockWeight, x: Tensor) -> str | None:
    """Why the CPU kernels cannot compute x [T, K] times this weight, or None if they can."""
    if w.large:
        size = f"{w.params['r']} x {w.params['c']}"
        return f"blocks of {size} are for a GPU; pack the weight on the CPU, where mini-blocks or dense run it"
    return cpu.supports(w, x)
