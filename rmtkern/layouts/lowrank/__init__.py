"""lowrank: a weight as the product of two thin factors."""

from rmtkern.layouts.lowrank.weight import LowRankWeight

__all__ = ["LowRankWeight"]
