"""The storage layouts by name: one line per layout. It must not know which kernels run them (ops.py does)."""

from .base import PackedWeight
from .dense.weight import DenseWeight

__all__ = ["LAYOUTS"]

LAYOUTS: dict[str, type[PackedWeight]] = {
    "dense": DenseWeight,
}
