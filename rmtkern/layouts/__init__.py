"""The storage layouts by name: one line per layout. It must not know which kernels run them (ops.py does)."""

from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.bitmask.weight import BitmaskWeight
from rmtkern.layouts.block.weight import BlockWeight
from rmtkern.layouts.dense.weight import DenseWeight
from rmtkern.layouts.lowrank.weight import LowRankWeight
from rmtkern.layouts.nofm.weight import NofMWeight
from rmtkern.layouts.spectral.weight import SpectralWeight

__all__ = ["LAYOUTS"]

LAYOUTS: dict[str, type[PackedWeight]] = {
    "dense": DenseWeight,
    "bitmask": BitmaskWeight,
    "block": BlockWeight,
    "nofm": NofMWeight,
    "lowrank": LowRankWeight,
    "spectral": SpectralWeight,
}
