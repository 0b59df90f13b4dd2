"""block: mini-blocks, where one load of an activation feeds several outputs; larger blocks, which a GPU multiplies."""

from rmtkern.layouts.block.weight import BlockWeight

__all__ = ["BlockWeight"]
