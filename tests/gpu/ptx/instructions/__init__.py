"""The instructions, one file for each kind; importing this fills the table."""

from tests.gpu.ptx.instructions import (
    arithmetic,
    bits,
    bulk,
    control,
    convert,
    copies,
    memory,
    products,
    sparse_products,
    warps,
    wgmma,
)
from tests.gpu.ptx.instructions.table import build

__all__ = [
    "arithmetic",
    "bits",
    "build",
    "bulk",
    "control",
    "convert",
    "copies",
    "memory",
    "products",
    "sparse_products",
    "warps",
    "wgmma",
]
