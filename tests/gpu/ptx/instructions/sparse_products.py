"""mma.sp: a warp's product whose first matrix holds two of each four columns, and metadata that says which.

The fragments are those of the PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types"; sums as in
products.py. The lane that holds the metadata of a row is the one that the sparsity selector names: of each four lanes,
whose "groupID" is the row, the first (second) of a pair has columns 0 to 15 (16 to 31), its lower half the row and its
upper half the row 8 further; four bits for each group of four columns, the indices of the first and the second entry.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.products import RESULT_ORDER, matrix_order, operand_numbers
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, parts
from tests.gpu.ptx.text import Immediate, Instruction
from tests.gpu.ptx.types import TYPES

Array = NDArray[Any]
KEPT_ORDER, DENSE_ORDER = matrix_order(16, 4, 2), matrix_order(8, 4, 2)  # a [16, 16] kept, b^T [8, 32]


def kept_columns(metadata: Array, selector: int) -> Array:
    """Registers [warps, 32] of metadata -> the column [warps, 16, 16] of each kept entry of a, in 0 to 31."""
    pairs = metadata.reshape(-1, 8, 4)[:, :, 2 * selector : 2 * selector + 2]  # [warps, row, half of the columns]
    halves = np.stack([pairs & 0xFFFF, pairs >> 16], 1).reshape(-1, 16, 2)  # rows 0 to 7, then 8 to 15
    indices = halves[..., None] >> np.arange(0, 16, 2, dtype=np.uint32) & 3  # two for each group
    return (indices + 4 * (np.arange(8) // 2)).reshape(-1, 16, 16) + 16 * (np.arange(16) // 8)


@instruction("mma.sp::ordered_metadata.sync.aligned", words="m16n8k32 row col")
def _mma_sp(machine: Machine, what: Instruction) -> Step:
    """d [16, 8] = a [16, 32] b [32, 8] + c, float32 sums."""
    kinds = [part for part in what.parts if part in TYPES]
    selector = what.operands[5]
    if kinds[1:] not in (["f16", "f16", "f32"], ["bf16", "bf16", "f32"]) or kinds[0] != "f32":
        raise Unsupported(f"the instruction {what}")
    if "m16n8k32" not in what.parts or not isinstance(selector, Immediate) or int(selector.text, 0) not in (0, 1):
        raise Unsupported(f"the instruction {what}")
    kind, registers, pair = kinds[1], machine.registers, int(selector.text, 0)
    a, b = ([registers.read(part, TYPES["b32"]) for part in parts(operand)] for operand in what.operands[1:3])
    c = [registers.numbers(part, TYPES["f32"]) for part in parts(what.operands[3])]
    metadata = registers.read(what.operands[4], TYPES["b32"])
    stores = [registers.store(part, TYPES["f32"]) for part in parts(what.operands[0])]

    def matrix(reads: list[Any], order: Array, lanes: Lanes) -> Array:
        numbers = operand_numbers(np.stack([read(lanes) for read in reads], 1), kind)
        return numbers.reshape(len(lanes) // 32, -1)[:, order].astype(np.float64)

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        kept, columns = matrix(a, KEPT_ORDER, lanes), kept_columns(metadata(lanes), pair)
        if not (columns[..., ::2] < columns[..., 1::2]).all():
            machine.moment.find("metadata", "columns that are not two different ones in order")
        dense = np.zeros((len(kept), 16, 32))
        np.put_along_axis(dense, columns, kept, 2)
        product = dense @ matrix(b, DENSE_ORDER, lanes).transpose(0, 2, 1)
        # An entry that is not kept is not multiplied: an Inf or NaN of b meets kept entries alone.
        for warp in np.flatnonzero(~np.isfinite(product).all((1, 2))):
            across = matrix(b, DENSE_ORDER, lanes)[warp].T[columns[warp]]  # [16, 16, 8]
            product[warp] = (kept[warp][..., None] * across).sum(1)
        numbers = product.reshape(-1, 128)[:, RESULT_ORDER]
        for i, (read, store) in enumerate(zip(c, stores, strict=True)):
            store(lanes, (numbers[:, i].ravel() + read(lanes)).astype(np.float32))

    return step
