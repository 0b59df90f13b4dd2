"""mma.sync: a warp's product of small matrices whose pieces lie in its registers.

The fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k*". Products are exact and summed in float64,
then rounded to float32 once: the order and the internal width of a tensor core's sum are not modelled.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, Read, parts
from tests.gpu.ptx.text import Instruction
from tests.gpu.ptx.types import TYPES
from tests.gpu.rounding import bfloat16_to_float32, truncate_to_tf32

Array = NDArray[Any]
LANE = np.arange(32)
ROW, COLUMN = LANE >> 2, LANE & 3  # of a lane in a fragment: "groupID" and "threadID_in_group"


def operand_numbers(patterns: Array, kind: str) -> Array:
    """Registers [..., n] of a matrix operand -> its numbers [..., n * 4 / bytes of a number] as float32."""
    patterns = np.ascontiguousarray(patterns)
    if kind == "f16":
        return patterns.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return bfloat16_to_float32(patterns.view(np.uint16))
    if kind == "tf32":
        return truncate_to_tf32(patterns.view(np.float32))
    raise Unsupported(f"matrices of {kind}")


def matrix_order(rows: int, registers: int, each: int) -> Array:
    """Where the entries [rows, k] of a matrix lie in its fragment [32 lanes, registers, numbers of a register].

    Registers go along k; with 16 rows they alternate between the upper and the lower 8.
    """
    halves = rows // 8
    order = np.empty((rows, registers // halves * 4 * each), np.intp)
    for register in range(registers):
        for i in range(each):
            k = (register // halves * 4 + COLUMN) * each + i
            order[ROW + 8 * (register % halves), k] = (LANE * registers + register) * each + i
    return order


# where the numbers [4, 32] of a fragment of d lie in the matrix [16, 8]
RESULT_ORDER = np.stack([(ROW + 8 * (i >> 1)) * 8 + 2 * COLUMN + (i & 1) for i in range(4)])


@instruction("mma.sync.aligned", words="m16n8k4 m16n8k8 m16n8k16 row col")
def _mma(machine: Machine, what: Instruction) -> Step:
    """d [16, 8] = a [16, k] b [k, 8] + c, float32 sums."""
    shape = next(part for part in what.parts if re.fullmatch(r"m\d+n\d+k\d+", part))
    kinds = [part for part in what.parts if part in TYPES]
    if len(kinds) != 4 or kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2]:
        raise Unsupported(f"the instruction {what}")
    kind, registers = kinds[1], machine.registers
    a, b = ([registers.read(part, TYPES["b32"]) for part in parts(operand)] for operand in what.operands[1:3])
    c = [registers.numbers(part, TYPES["f32"]) for part in parts(what.operands[3])]
    stores = [registers.store(part, TYPES["f32"]) for part in parts(what.operands[0])]
    each = 4 // TYPES[kind].size
    if len(a) * 2 * each != int(shape.rpartition("k")[2]) or len(b) * 4 * each != int(shape.rpartition("k")[2]):
        raise Unsupported(f"the instruction {what}")

    order_a, order_b = matrix_order(16, len(a), each), matrix_order(8, len(b), each)

    def matrix(reads: list[Read], order: Array, lanes: Lanes) -> Array:
        patterns = np.stack([read(lanes) for read in reads], 1)
        return operand_numbers(patterns, kind).reshape(len(lanes) // 32, -1)[:, order].astype(np.float64)

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        product = matrix(a, order_a, lanes) @ matrix(b, order_b, lanes).transpose(0, 2, 1)  # [warps, 16, 8]
        numbers = product.reshape(-1, 128)[:, RESULT_ORDER]
        for i, (read, store) in enumerate(zip(c, stores, strict=True)):
            store(lanes, (numbers[:, i].ravel() + read(lanes)).astype(np.float32))

    return step
