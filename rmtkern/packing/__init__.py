"""pack_ and unpack_: swap a model's linears for what is measured fastest here, and back.

It decides by measuring and must not know why weights are zero. pack.py is the way through the rest.
"""

from rmtkern.packing.decisions import Decisions
from rmtkern.packing.pack import pack_
from rmtkern.packing.report import PackReport
from rmtkern.packing.unpack import is_packed, unpack_

__all__ = ["Decisions", "PackReport", "is_packed", "pack_", "unpack_"]
