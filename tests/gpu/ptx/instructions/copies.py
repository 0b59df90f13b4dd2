"""cp.async: copies from global to shared memory that land when they are waited for, and ldmatrix and stmatrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, parts
from tests.gpu.ptx.text import Immediate, Instruction
from tests.gpu.ptx.types import TYPES

Array = NDArray[Any]


@dataclass
class Copy:
    """Copies of some threads under way: who, where to, what, and in which of the thread's groups."""

    threads: Array
    offsets: Array
    values: Array
    groups: Array


class Copies:
    """The copies of a machine, and how many groups each thread has closed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.under_way: list[Copy] = []
        self.groups = np.zeros(machine.threads, np.int32)

    def begin(self, threads: Array, to: Array, values: Array) -> None:
        """Threads [n] begin to copy bytes [n, width]."""
        offsets = self.machine.shared.begin_copy(threads, to, values)
        self.under_way.append(Copy(threads.copy(), offsets, values, self.groups[threads]))

    def wait(self, threads: Array, but: int | None) -> None:
        """Threads wait for all their groups but the last `but`; for everything if None."""
        done_before = np.full(self.machine.threads, -1, np.int32)  # groups below this are waited for
        done_before[threads] = self.groups[threads] - but if but is not None else np.iinfo(np.int32).max
        still = []
        for copy in self.under_way:
            done = copy.groups < done_before[copy.threads]
            if done.any():
                self.machine.shared.finish_copy(copy.threads[done], copy.offsets[done], copy.values[done])
            if not done.all():
                left = ~done
                still.append(Copy(copy.threads[left], copy.offsets[left], copy.values[left], copy.groups[left]))
        self.under_way = still


@instruction("cp.async.ca", "cp.async.cg", words="shared shared::cta global")
def _copy(machine: Machine, what: Instruction) -> Step:
    registers, copies, width = machine.registers, machine.part(Copies), what.operands[2]
    if not isinstance(width, Immediate) or len(what.operands) > 4:
        raise Unsupported(f"the instruction {what}")
    to, source, size = registers.address(what.operands[0]), registers.address(what.operands[1]), int(width.text, 0)
    given = registers.numbers(what.operands[3], TYPES["u32"]) if len(what.operands) > 3 else None

    def step(lanes: Lanes) -> None:
        values = np.zeros((len(lanes), size), np.uint8)
        count = given(lanes) if given is not None else np.full(len(lanes), size, np.uint32)
        some = count > 0  # the bytes beyond are zeros; the source of none is not read
        if not np.isin(count, (0, size)).all():
            raise Unsupported(f"a copy of a part of its bytes, {what}")
        if some.any():
            values[some] = machine.memory.load(lanes.ids[some], source(lanes)[some], size)
        copies.begin(lanes.ids, to(lanes), values)

    return step


@instruction("cp.async.commit_group")
def _commit(machine: Machine, what: Instruction) -> Step:
    copies = machine.part(Copies)

    def step(lanes: Lanes) -> None:
        copies.groups[lanes.index] += 1

    return step


@instruction("cp.async.wait_group", "cp.async.wait_all")
def _wait(machine: Machine, what: Instruction) -> Step:
    copies, count = machine.part(Copies), what.operands[0] if what.operands else None
    but = int(count.text, 0) if isinstance(count, Immediate) else None
    return lambda lanes: copies.wait(lanes.ids, but)


@instruction("ldmatrix.sync.aligned.m8n8", words="x1 x2 x4 trans shared shared::cta")
def _ldmatrix(machine: Machine, what: Instruction) -> Step:
    """8x8 matrices of 16 bits: lane 8 i + r addresses row r of matrix i; lane l gets pair l % 4 of row l / 4."""
    registers = machine.registers
    writes = [registers.write(part, TYPES["b32"]) for part in parts(what.operands[0])]
    address, count, transposed = registers.address(what.operands[1]), len(writes), "trans" in what.parts

    def step(lanes: Lanes) -> None:
        warps = machine.whole_warps(lanes)
        addresses = address(lanes).reshape(-1, 32)[:, : 8 * count]
        rows = machine.shared.load(warps[:, : 8 * count].ravel(), addresses.ravel(), 16)
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        pairs = matrices.reshape(-1, count, 64).view(np.uint32)  # [warps, count, 32]
        for i, write in enumerate(writes):
            write(lanes, pairs[:, i].ravel())

    return step


@instruction("stmatrix.sync.aligned.m8n8", words="x1 x2 x4 trans shared shared::cta")
def _stmatrix(machine: Machine, what: Instruction) -> Step:
    registers = machine.registers
    reads = [registers.read(part, TYPES["b32"]) for part in parts(what.operands[1])]
    address, count, transposed = registers.address(what.operands[0]), len(reads), "trans" in what.parts

    def step(lanes: Lanes) -> None:
        warps = machine.whole_warps(lanes)
        addresses = address(lanes).reshape(-1, 32)[:, : 8 * count]
        pairs = np.stack([read(lanes).reshape(-1, 32) for read in reads], 1)
        matrices = pairs.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        rows = matrices.reshape(-1, 8).view(np.uint8)
        machine.shared.store(warps[:, : 8 * count].ravel(), addresses.ravel(), rows)

    return step
