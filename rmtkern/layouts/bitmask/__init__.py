"""bitmask: any zero pattern, as values and one 64-bit mask per row and 64 columns."""

from rmtkern.layouts.bitmask.weight import BitmaskWeight

__all__ = ["BitmaskWeight"]
