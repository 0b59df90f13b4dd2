"""nofm: n kept entries in every group of m columns, such as 2:4."""

from rmtkern.layouts.nofm.weight import NofMWeight

__all__ = ["NofMWeight"]
