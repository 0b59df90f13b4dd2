"""block: r x 1 mini-blocks, so that one load of an activation feeds r outputs."""

from rmtkern.layouts.block.weight import BlockWeight

__all__ = ["BlockWeight"]
