"""Logic, shifts, bit fields, permutations of bytes, and moves of bit patterns."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.arithmetic import elementwise
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, parts
from tests.gpu.ptx.text import Group, Immediate, Instruction
from tests.gpu.ptx.types import TYPES

Array = NDArray[Any]
_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
}


@instruction(*_LOGIC)
def _logic(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    return elementwise(machine, what, _LOGIC[what.parts[0]], kind, kind)


@instruction("cnot")
def _cnot(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    return elementwise(machine, what, lambda x: (x == 0).astype(kind.dtype), kind, kind)


@instruction("shl", "shr")
def _shift(machine: Machine, what: Instruction) -> Step:
    kind, registers = machine.type_of(what), machine.registers
    value, amount = registers.numbers(what.operands[1], kind), registers.numbers(what.operands[2], TYPES["u32"])
    store, left, most = registers.store(what.operands[0], kind), what.parts[0] == "shl", 8 * kind.size - 1

    def step(lanes: Lanes) -> None:
        x, by = value(lanes), amount(lanes)
        within = np.minimum(by, most).astype(x.dtype)
        shifted = x << within if left else x >> within
        lost = by > most
        if lost.any():  # everything is shifted out, but for the sign
            shifted = np.where(lost, x >> x.dtype.type(most) if not left and kind.is_signed else 0, shifted)
        store(lanes, shifted)

    return step


@instruction("shf", words="l r wrap clamp")
def _funnel(machine: Machine, what: Instruction) -> Step:
    def shift(low: Array, high: Array, by: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        by = (by & 31 if "wrap" in what.parts else np.minimum(by, 32)).astype(np.uint64)
        moved = both << by >> np.uint64(32) if "l" in what.parts else both >> by
        return moved.astype(np.uint32)

    return elementwise(machine, what, shift, TYPES["u32"], TYPES["u32"])


@instruction("bfe")
def _bfe(machine: Machine, what: Instruction) -> Step:
    kind, registers, u32 = machine.type_of(what), machine.registers, TYPES["u32"]
    value = registers.numbers(what.operands[1], kind)
    first, count = (registers.numbers(operand, u32) for operand in what.operands[2:4])
    store, bits = registers.store(what.operands[0], kind), 8 * kind.size

    def step(lanes: Lanes) -> None:
        x = value(lanes).view(kind.raw).astype(np.uint64)
        begin, length = (first(lanes) & 255).astype(np.uint64), (count(lanes) & 255).astype(np.uint64)
        begin, length = np.minimum(begin, bits), np.minimum(length, bits)
        field = np.where(begin < bits, x >> np.minimum(begin, bits - 1), 0) & _ones(length)
        if kind.is_signed:  # the sign is the last bit of the field, or of the number
            last = np.minimum(begin + length - 1, bits - 1)
            negative = (x >> last & np.uint64(1) != 0) & (length > 0)
            field = np.where(
                negative, field | ~_ones(np.minimum(length, last + 1 - np.minimum(begin, last + 1))), field
            )
        store(lanes, field.astype(kind.raw).view(kind.dtype))

    return step


def _ones(count: Array) -> Array:
    """uint64 with the lowest `count` bits set."""
    full = count >= 64
    return np.where(full, ~np.uint64(0), (np.uint64(1) << np.where(full, 0, count).astype(np.uint64)) - np.uint64(1))


@instruction("bfi")
def _bfi(machine: Machine, what: Instruction) -> Step:
    kind, registers, u32 = machine.type_of(what), machine.registers, TYPES["u32"]
    source, base = (registers.numbers(operand, kind) for operand in what.operands[1:3])
    first, count = (registers.numbers(operand, u32) for operand in what.operands[3:5])
    store, bits = registers.store(what.operands[0], kind), 8 * kind.size

    def step(lanes: Lanes) -> None:
        begin, length = (first(lanes) & 255).astype(np.uint64), (count(lanes) & 255).astype(np.uint64)
        field = np.where(begin < bits, _ones(length) << np.minimum(begin, bits - 1), 0).astype(kind.raw)
        moved = (source(lanes).astype(np.uint64) << np.minimum(begin, bits - 1)).astype(kind.raw)
        store(lanes, base(lanes) & ~field | moved & field)

    return step


@instruction("popc", "clz", "brev", "bfind")
def _count(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    bits, name = 8 * kind.size, what.parts[0]
    if name == "popc":
        return elementwise(machine, what, lambda x: np.bitwise_count(x).astype(np.uint32), kind, TYPES["u32"])
    if name == "brev":
        return elementwise(
            machine, what, lambda x: sum((x >> i & 1) << bits - 1 - i for i in range(bits)).astype(x.dtype), kind, kind
        )
    if name == "bfind" and (kind.is_signed or "shiftamt" in what.parts):
        raise Unsupported(f"the instruction {what}")

    def length(x: Array) -> Array:  # of the number in binary
        return sum((x >> x.dtype.type(i) != 0).astype(np.uint32) for i in range(bits))

    if name == "clz":
        return elementwise(machine, what, lambda x: np.uint32(bits) - length(x), kind, TYPES["u32"])
    return elementwise(machine, what, lambda x: length(x) - np.uint32(1), kind, TYPES["u32"])


@instruction("lop3")
def _lop3(machine: Machine, what: Instruction) -> Step:
    kind, registers, table = machine.type_of(what), machine.registers, what.operands[4]
    if not isinstance(table, Immediate):
        raise Unsupported(f"the instruction {what}")
    a, b, c = (registers.read(operand, kind) for operand in what.operands[1:4])
    write, rows = registers.write(what.operands[0], kind), int(table.text, 0)

    def step(lanes: Lanes) -> None:
        x, y, z = a(lanes), b(lanes), c(lanes)
        result = np.zeros_like(x)
        for row in range(8):
            if rows >> row & 1:
                result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        write(lanes, result)

    return step


@instruction("prmt")
def _prmt(machine: Machine, what: Instruction) -> Step:
    def permute(a: Array, b: Array, selectors: Array) -> Array:
        source = np.stack([a, b], 1).view(np.uint8)  # [threads, 8]
        result = np.zeros((len(a), 4), np.uint8)
        for i in range(4):
            selector = selectors >> np.uint32(4 * i) & 15
            byte = source[np.arange(len(a)), selector & 7]
            result[:, i] = np.where(selector & 8, np.where(byte & 128, 255, 0), byte)
        return result.view(np.uint32)[:, 0]

    return elementwise(machine, what, permute, TYPES["b32"], TYPES["b32"])


@instruction("mov", "cvta", "cvta.to", words="global shared shared::cta param")
def _mov(machine: Machine, what: Instruction) -> Step:
    target, source = what.operands
    kind, registers = machine.type_of(what), machine.registers
    if isinstance(target, Group) or isinstance(source, Group):
        return _pack(machine, what)
    read, write = registers.read(source, kind), registers.write(target, kind)
    return lambda lanes: write(lanes, read(lanes))


def _pack(machine: Machine, what: Instruction) -> Step:
    """mov between a register and a vector of its parts, the lowest first."""
    target, source = what.operands
    kind, registers = machine.type_of(what), machine.registers
    count = len(parts(target)) * len(parts(source))
    part = TYPES[f"b{8 * kind.size // count}"]
    if isinstance(source, Group):
        reads, write = [registers.read(each, part) for each in parts(source)], registers.write(target, kind)
        return lambda lanes: write(lanes, np.stack([read(lanes) for read in reads], 1).view(kind.raw)[:, 0])
    read, writes = registers.read(source, kind), [registers.write(each, part) for each in parts(target)]

    def step(lanes: Lanes) -> None:
        halves = np.ascontiguousarray(read(lanes))[:, None].view(part.raw)
        for i, write_part in enumerate(writes):
            write_part(lanes, np.ascontiguousarray(halves[:, i]))

    return step
