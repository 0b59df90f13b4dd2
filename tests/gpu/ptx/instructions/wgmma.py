"""wgmma: a warpgroup's product (sm_90) whose operands lie in shared memory, while its threads go on.

Its result is formed when all four warps have reached it; until they wait for it nobody may touch its accumulators or
write its operands, which is checked. Operands may lie along k or across it, with every swizzle. Sums as in products.py.
Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.products import COLUMN, ROW, matrix_order, operand_numbers
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import AT_PRODUCT, WARPGROUP, Machine, Step
from tests.gpu.ptx.registers import Lanes, Registers, parts
from tests.gpu.ptx.text import Group, Immediate, Instruction, Operand, Register
from tests.gpu.ptx.types import TYPES

Array = NDArray[Any]
STEP = 32  # bytes of k in a product
SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # mode -> (bytes of a row, bits that are exchanged)
WARP_ROWS = 16


@dataclass
class Product:
    """A product of one warpgroup under way: its threads and those that still have to wait, registers, operands."""

    threads: Array
    waiting: Array
    accumulators: list[str]
    factors: list[str]
    operands: list[Array]
    group: Array


class Products:
    """The products of a machine, and how many groups each thread has closed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.under_way: list[Product] = []
        self.groups = np.zeros(machine.threads, np.int32)
        self.fenced = np.full(machine.threads, -1, np.int64)  # when each thread's last wgmma.fence was

    def begin(self, threads: Array, accumulators: list[str], factors: list[str], operands: list[Array]) -> None:
        """A warpgroup's threads [128] begin a product."""
        tracked = self.machine.registers.tracked
        for name in accumulators:
            tracked[name].changing[threads] += 1
        for name in factors:
            tracked[name].reading[threads] += 1
        waiting = np.ones(WARPGROUP, bool)
        self.under_way.append(Product(threads, waiting, accumulators, factors, operands, self.groups[threads]))

    def check_fence(self, threads: Array, names: list[str]) -> None:
        """Registers that other instructions have written must be fenced since."""
        tracked = self.machine.registers.tracked
        if any((tracked[name].stamp[threads] > self.fenced[threads]).any() for name in names):
            self.machine.moment.find("missing fence", "registers written since the last wgmma.fence")

    def wait(self, threads: Array, but: int) -> None:
        """Threads wait for all their groups but the last `but`."""
        done_before = np.full(self.machine.threads, -1, np.int32)
        done_before[threads] = self.groups[threads] - but
        tracked, still = self.machine.registers.tracked, []
        for product in self.under_way:
            done = product.waiting & (product.group < done_before[product.threads])
            ids = product.threads[done]
            for name in product.accumulators:
                tracked[name].changing[ids] -= 1
            for name in product.factors:
                tracked[name].reading[ids] -= 1
            product.waiting &= ~done
            if product.waiting.any():
                still.append(product)
            else:
                for offsets in product.operands:
                    self.machine.shared.finish_operand(offsets)
        self.under_way = still


@instruction("wgmma.fence.sync.aligned")
def _fence(machine: Machine, what: Instruction) -> Step:
    products = machine.part(Products)

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        products.fenced[lanes.index] = machine.moment.clock

    return step


@instruction("wgmma.commit_group.sync.aligned")
def _commit(machine: Machine, what: Instruction) -> Step:
    products = machine.part(Products)

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        products.groups[lanes.index] += 1

    return step


@instruction("wgmma.wait_group.sync.aligned")
def _wait(machine: Machine, what: Instruction) -> Step:
    products, count = machine.part(Products), what.operands[0]
    if not isinstance(count, Immediate):
        raise Unsupported(f"the instruction {what}")
    but = int(count.text)

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        products.wait(lanes.ids, but)

    return step


def operand_addresses(descriptor: int, rows: int, across: bool) -> Array:
    """Where the pieces of 16 bytes of a matrix lie that a 64-bit descriptor names.

    Args:
        descriptor: start, two distances and the swizzle.
        rows: of the matrix.
        across: whether a piece is 8 rows at one k, so that the result is [16, rows / 8], and not 16 bytes along k,
            which makes it [rows, 2]. The layouts are those of CUTLASS's mma_sm90_desc.hpp, "MN-major" and "K-major".
    """
    start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Unsupported(f"the base offset of the matrix descriptor {descriptor:#x}")
    width, exchanged = SWIZZLES[descriptor >> 62]
    if across:
        k, piece = np.arange(16)[:, None], np.arange(rows // 8)[None, :]
        in_width = width // 16
        if width == 16:
            leading, stride = stride, leading
        address = start + k // 8 * stride + k % 8 * width + piece // in_width * leading + piece % in_width * 16
    else:
        row, piece = np.arange(rows)[:, None], np.arange(2)[None, :]
        address = start + row // 8 * stride + row % 8 * width + piece * (leading if width == 16 else 16)
    return address ^ (address >> 7 & exchanged) << 4


def _names(operand: Operand) -> list[str]:
    return [part.name for part in parts(operand) if isinstance(part, Register)]


def _gather(registers: Registers, names: list[str], threads: Array) -> Array:
    """The patterns [groups, 128, registers] of a fragment."""
    for name in names:
        if not registers.written[name][threads].all():
            registers.unwritten(name)
    return np.stack([registers.rows[name][threads] for name in names], -1)


@instruction("wgmma.mma_async.sync.aligned", words=" ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16)))
def _wgmma(machine: Machine, what: Instruction) -> Step:
    shape = re.search(r"m64n(\d+)k(\d+)", what.opcode)
    assert shape is not None
    columns, kind = int(shape.group(1)), what.parts[-1]
    flags = [operand.text for operand in what.operands[4:] if isinstance(operand, Immediate)]
    size = TYPES[kind].size
    if (
        what.parts[-3:] != ("f32", kind, kind)
        or int(shape.group(2)) * size != STEP
        or len(flags) != len(what.operands[4:])
    ):
        raise Unsupported(f"the instruction {what}")
    if flags[:2] != ["1", "1"]:
        raise Unsupported(f"negated operands of {what}")
    registers, shared, products = machine.registers, machine.shared, machine.part(Products)
    accumulators = _names(what.operands[0])
    factors = _names(what.operands[1]) if isinstance(what.operands[1], Group) else []
    left = None if factors else registers.read(what.operands[1], TYPES["b64"])
    right = registers.read(what.operands[2], TYPES["b64"])
    keep = registers.read(what.operands[3], TYPES["pred"])
    each = 4 // size
    across_a, across_b = [flag == "1" for flag in ["0", "0", "0", *flags[2:]][-2:]]  # of a only if in shared memory

    def matrix(descriptor: int, rows: int, across: bool, thread: int) -> tuple[Array, Array]:
        """(numbers [rows, k], what to finish) of an operand in the memory of a thread's block."""
        addresses = operand_addresses(descriptor, rows, across)
        values, offsets = shared.begin_operand(np.full(addresses.size, thread), addresses.ravel())
        numbers = operand_numbers(values.reshape(len(addresses), -1).view(np.uint32), kind)
        return numbers.T if across else numbers, offsets

    def multiply(threads: Array, descriptors: tuple[int, int], factor: Array | None) -> Array:
        """The product [64, columns] of a warpgroup; it is under way from now on."""
        b, used = matrix(descriptors[1], columns, across_b, int(threads[0]))
        if factor is None:
            a, also = matrix(descriptors[0], 4 * WARP_ROWS, across_a, int(threads[0]))
            operands = [used, also]
        else:
            order = matrix_order(WARP_ROWS, len(factors), each)
            a, operands = operand_numbers(factor, kind).reshape(4, -1)[:, order].reshape(4 * WARP_ROWS, -1), [used]
        products.begin(threads, accumulators, factors, operands)
        return a.astype(np.float64) @ b.astype(np.float64).T

    def step(lanes: Lanes) -> None:
        groups = machine.warpgroups(lanes.ids)
        if groups.size != len(lanes):
            machine.wait(lanes, AT_PRODUCT)
            return
        ones = [Lanes(threads, threads) for threads in groups]
        kept = np.array([bool(keep(one)[0]) for one in ones])
        old = _gather(registers, accumulators, groups).view(np.float32) if kept.any() else np.zeros(1, np.float32)
        given = _gather(registers, factors, groups) if factors else None
        for number, (threads, one) in enumerate(zip(groups, ones, strict=True)):
            products.check_fence(threads, accumulators + factors)
            descriptors = (int(left(one)[0]) if left else 0, int(right(one)[0]))
            product = multiply(threads, descriptors, None if given is None else given[number])
            tile = product.reshape(4, WARP_ROWS, columns)
            for i, name in enumerate(accumulators):
                value = tile[:, ROW + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * COLUMN + (i & 1)].ravel()
                if kept[number]:
                    value = value + old[number, :, i]
                registers.rows[name][threads] = value.astype(np.float32).view(np.uint32)
                registers.written[name][threads] = True

    return step
