"""What the threads of a warp exchange through registers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, parts
from tests.gpu.ptx.text import Instruction
from tests.gpu.ptx.types import TYPES

Array = NDArray[Any]


@instruction("shfl.sync", words="idx up down bfly")
def _shfl(machine: Machine, what: Instruction) -> Step:
    kind, registers, u32 = machine.type_of(what), machine.registers, TYPES["u32"]
    mode, targets = what.parts[2], parts(what.operands[0])
    source, by, clamp = (
        registers.read(operand, kind if i == 0 else u32) for i, operand in enumerate(what.operands[1:4])
    )
    write = registers.write(targets[0], kind)
    inside = registers.write(targets[1], TYPES["pred"]) if len(targets) > 1 else None

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        own = machine.lane[lanes.ids]
        amount, limits = by(lanes).astype(np.int64) & 31, clamp(lanes).astype(np.int64)
        segment = limits >> 8 & 31  # bits of the lane number that may not change
        last = own & segment | limits & 31 & ~segment
        if mode == "idx":
            lane = own & segment | amount & ~segment
        else:
            lane = {"up": own - amount, "down": own + amount, "bfly": own ^ amount}[mode]
        valid = lane >= last if mode == "up" else lane <= last
        threads = lanes.ids - own + np.where(valid, lane, own)
        write(lanes, source(lanes)[np.searchsorted(lanes.ids, threads)])
        if inside is not None:
            inside(lanes, valid)

    return step


@instruction("redux.sync", words="add min max and or xor")
def _redux(machine: Machine, what: Instruction) -> Step:
    kind, registers = machine.type_of(what), machine.registers
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[what.parts[2]]  # fmt: skip
    source, store = registers.numbers(what.operands[1], kind), registers.store(what.operands[0], kind)

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        store(lanes, np.repeat(function.reduce(source(lanes).reshape(-1, 32), 1, dtype=kind.dtype), 32))

    return step


@instruction("vote.sync", words="all any uni ballot")
def _vote(machine: Machine, what: Instruction) -> Step:
    registers, mode = machine.registers, what.parts[2]
    source = registers.read(what.operands[1], TYPES["pred"])
    write = registers.write(what.operands[0], TYPES["b32" if mode == "ballot" else "pred"])

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        votes = source(lanes).reshape(-1, 32)
        if mode == "ballot":
            found = (votes << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        elif mode == "uni":
            found = votes.all(1) | ~votes.any(1)
        else:
            found = votes.all(1) if mode == "all" else votes.any(1)
        write(lanes, np.repeat(found, 32))

    return step


@instruction("elect.sync")
def _elect(machine: Machine, what: Instruction) -> Step:
    """One thread of each warp: the first."""
    registers, targets = machine.registers, parts(what.operands[0])
    leader = registers.write(targets[0], TYPES["b32"])
    is_leader = registers.write(targets[1], TYPES["pred"])

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        leader(lanes, np.zeros(len(lanes), np.uint32))
        is_leader(lanes, machine.lane[lanes.ids] == 0)

    return step
