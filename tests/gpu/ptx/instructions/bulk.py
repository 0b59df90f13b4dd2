"""The copy engine (TMA) and the barriers in shared memory that it reports to.

A copy may land at any time after it was started: here as late as possible, when the first thread waits for its phase.
Who has not waited for that phase himself, or met one who has at a barrier of the block, may not touch what it brought.
Two-dimensional tiles from global to shared memory are known. Source: PTX ISA, "mbarrier" and "cp.async.bulk.tensor".
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import PtxError, Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import POLLING, Machine, Step
from tests.gpu.ptx.races import ATOMIC, WRITE
from tests.gpu.ptx.registers import Lanes
from tests.gpu.ptx.tensor_map import TensorMap
from tests.gpu.ptx.text import Address, Instruction, Register
from tests.gpu.ptx.types import TYPES

Array = NDArray[Any]
SIZE = 8  # bytes of a barrier object


@dataclass
class Fetch:
    """A copy under way: where to, and the pieces [n, 16]."""

    offsets: Array
    values: Array


@dataclass
class Barrier:
    """A barrier object.

    Args:
        count: arrivals of a phase.
        missing: arrivals that this phase still lacks.
        pending: bytes that it still lacks.
        phases: completed.
        fetches: copies under way.
        landed: (interval, number) of those that have landed.
    """

    count: int
    missing: int
    pending: int = 0
    phases: int = 0
    fetches: list[Fetch] = field(default_factory=list)
    landed: list[tuple[int, int]] = field(default_factory=list)

    def turn(self) -> None:
        """Complete the phase if everything has arrived."""
        if self.missing == 0 and self.pending == 0:
            self.phases += 1
            self.missing = self.count


class Barriers:
    """The barrier objects of a machine, by their offset in shared memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.by_offset: dict[int, Barrier] = {}

    def places(self, threads: Array, addresses: Array, kind: int) -> Array:
        """Offsets of barrier objects; their use is logged, so that one before its initialisation is a race."""
        shared = self.machine.shared
        offsets = shared.offsets(threads, addresses, SIZE, "a barrier object")
        shared.touch(threads, offsets, SIZE, kind)
        return offsets

    def at(self, offset: int) -> Barrier:
        """The barrier object at an offset."""
        if offset not in self.by_offset:
            raise PtxError(f"no barrier object is initialised where {self.machine.moment.text()} uses one")
        return self.by_offset[offset]

    def land(self, barrier: Barrier) -> None:
        """Let the copies of a barrier's phase arrive."""
        interval = self.machine.moment.interval
        barrier.landed = [(when, number) for when, number in barrier.landed if when == interval]
        for fetch in barrier.fetches:
            barrier.landed.append((interval, self.machine.shared.finish_fetch(fetch.offsets, fetch.values)))
            barrier.pending -= fetch.values.size
        barrier.fetches.clear()
        barrier.turn()

    def observe(self, threads: Array, barrier: Barrier) -> None:
        """These threads have waited for a barrier object's phase."""
        now = [number for interval, number in barrier.landed if interval == self.machine.moment.interval]
        self.machine.shared.observe(threads, now)


@instruction("mbarrier.init", words="shared shared::cta")
def _init(machine: Machine, what: Instruction) -> Step:
    barriers, registers = machine.part(Barriers), machine.registers
    address, count = registers.address(what.operands[0]), registers.numbers(what.operands[1], TYPES["u32"])

    def step(lanes: Lanes) -> None:
        for offset, arrivals in zip(
            barriers.places(lanes.ids, address(lanes), WRITE).tolist(), count(lanes).tolist(), strict=True
        ):
            barriers.by_offset[offset] = Barrier(arrivals, arrivals)

    return step


@instruction("mbarrier.inval", words="shared shared::cta")
def _inval(machine: Machine, what: Instruction) -> Step:
    barriers, address = machine.part(Barriers), machine.registers.address(what.operands[0])

    def step(lanes: Lanes) -> None:
        for offset in barriers.places(lanes.ids, address(lanes), WRITE).tolist():
            if barriers.at(offset).fetches:
                machine.moment.find("unwaited copy", "a barrier object ends while its copies are under way")
            del barriers.by_offset[offset]

    return step


@instruction("mbarrier.arrive", words="expect_tx shared shared::cta release cta")
def _arrive(machine: Machine, what: Instruction) -> Step:
    barriers, registers = machine.part(Barriers), machine.registers
    if isinstance(what.operands[0], Register):
        raise Unsupported(f"the state that {what} returns")
    address = registers.address(what.operands[1])
    expected = registers.numbers(what.operands[2], TYPES["u32"]) if "expect_tx" in what.parts else None

    def step(lanes: Lanes) -> None:
        count = expected(lanes) if expected is not None else np.zeros(len(lanes), np.uint32)
        offsets = barriers.places(lanes.ids, address(lanes), ATOMIC)
        for offset, size in zip(offsets.tolist(), count.tolist(), strict=True):
            barrier = barriers.at(offset)
            if barrier.missing == 0:  # nobody has waited for the phase, whose copies have landed at last
                barriers.land(barrier)
            if barrier.missing == 0:
                raise PtxError(f"{machine.moment.text()} arrives once more than the barrier object takes")
            barrier.pending += size
            barrier.missing -= 1
            barrier.turn()

    return step


@instruction("mbarrier.try_wait.parity", "mbarrier.test_wait.parity", words="shared shared::cta acquire cta")
def _wait(machine: Machine, what: Instruction) -> Step:
    barriers, registers = machine.part(Barriers), machine.registers
    address, parity = registers.address(what.operands[1]), registers.numbers(what.operands[2], TYPES["u32"])
    write = registers.write(what.operands[0], TYPES["pred"])

    def step(lanes: Lanes) -> None:
        offsets, phase = barriers.places(lanes.ids, address(lanes), ATOMIC), parity(lanes)
        done = np.zeros(len(lanes), bool)
        for offset in np.unique(offsets).tolist():
            barrier = barriers.at(offset)
            here = offsets == offset
            if (barrier.phases % 2 == phase[here]).any():
                barriers.land(barrier)
            ready = here & (barrier.phases % 2 != phase)
            barriers.observe(lanes.ids[ready], barrier)
            done |= ready
        write(lanes, done)
        if not done.all():  # the others try again once somebody else has done something
            machine.jump(lanes.where(done), machine.moment.instruction + 1)
            machine.wait(lanes.where(~done), POLLING)

    return step


@instruction(
    "cp.async.bulk.tensor.2d",
    words="shared::cta shared::cluster global mbarrier::complete_tx::bytes tile",
)
def _fetch(machine: Machine, what: Instruction) -> Step:
    barriers, registers = machine.part(Barriers), machine.registers
    source = what.operands[1]
    if len(what.operands) != 3 or not isinstance(source, Address) or not what.parts[-1].startswith("mbarrier"):
        raise Unsupported(f"the instruction {what}")
    to, report = registers.address(what.operands[0]), registers.address(what.operands[2])
    handle = registers.read(source.base, TYPES["u64"])
    column, row = (registers.numbers(part, TYPES["s32"]) for part in source.coordinates)

    def step(lanes: Lanes) -> None:
        offsets = barriers.places(lanes.ids, report(lanes), ATOMIC)
        starts, handles, columns, rows = to(lanes), handle(lanes), column(lanes), row(lanes)
        for i, thread in enumerate(lanes.ids):
            found = machine.maps.get(int(handles[i]))
            if found is None:
                raise PtxError(f"{machine.moment.text()} names no tensor map")
            tensor_map, base = found
            values = _box(machine, tensor_map, base, int(thread), int(rows[i]), int(columns[i]))
            pieces = tensor_map.target(int(starts[i]))
            begun = machine.shared.begin_fetch(int(thread), pieces, values)
            barriers.at(int(offsets[i])).fetches.append(Fetch(begun, values))

    return step


def _box(machine: Machine, tensor_map: TensorMap, base: int, thread: int, row: int, column: int) -> Array:
    """The pieces [n, 16] of a box; what lies outside the matrix is zero."""
    box = np.zeros((tensor_map.box[0], tensor_map.box[1] * tensor_map.itemsize), np.uint8)
    rows, begins, offsets = tensor_map.source(row, column)
    if len(offsets):
        values = machine.memory.load(np.full(len(offsets), thread), base + offsets, tensor_map.itemsize)
        box[rows[:, None], begins[:, None] + np.arange(tensor_map.itemsize)] = values
    return box.reshape(-1, 16)
