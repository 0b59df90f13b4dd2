"""pack_ and unpack_: swap a model's linears for what is measured fastest here, and back.

Nothing in here knows why weights are zero: what is chosen is measured. `pack` is the way through it all.
"""

from rmtkern.packing.decisions import Decisions
from rmtkern.packing.pack import is_packed, pack_, place_, unpack_
from rmtkern.packing.report import PackReport

__all__ = ["Decisions", "PackReport", "is_packed", "pack_", "place_", "unpack_"]
