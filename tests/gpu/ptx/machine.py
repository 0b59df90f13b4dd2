"""Runs the threads of some blocks: who goes next, where threads part and meet again, barriers.

A schedule says which warps go first: "forward" runs warp 0 of every block until it waits, then warp 1, and so on;
"reverse" the last warp first; "lockstep" all warps together. What is right under one of them only by luck is wrong
under another. Threads of a warp that have parted meet again at the smallest instruction number.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Deadlock, PtxError, Unsupported
from tests.gpu.ptx.global_memory import GlobalMemory
from tests.gpu.ptx.moment import Moment
from tests.gpu.ptx.registers import Lanes, Registers, parts
from tests.gpu.ptx.shared_memory import SharedMemory
from tests.gpu.ptx.tensor_map import MappedTensor
from tests.gpu.ptx.text import Instruction, Register
from tests.gpu.ptx.types import TYPES, Type

Array = NDArray[Any]
Step = Callable[[Lanes], None]
Build = Callable[["Machine", Instruction], Step]
Part = TypeVar("Part")
SCHEDULES = ("forward", "reverse", "lockstep")
RUNNING, AT_BARRIER, AT_PRODUCT, POLLING, PARTED, DONE = range(6)
LIMIT = 20_000_000  # steps after which a loop is taken for endless
PARTED_WARP = "a part of a warp executes {}, which takes whole warps"
WARPGROUP = 128
MAP = 1 << 60  # the address of the first parameter if it is a tensor map


class Parted(Exception):
    """Lanes have come without the rest of their warp to an instruction that takes whole warps."""


class Machine:
    """Some blocks, of which this runs all threads.

    Args:
        moment: of the kernel.
        blocks: (x, y, z) of each block.
        grid: of the launch.
        shared_bytes: of a block.
        params: name -> address, number, or tensor map and the address of its tensor, in order.
        memory: global memory.
        schedule: one of SCHEDULES.
        build: makes the step of an instruction.

    Threads are numbered warp by warp, in it block by block, in it lane by lane: the same warp of all blocks is one
    slice of a register's row.
    """

    def __init__(
        self,
        moment: Moment,
        blocks: Array,
        grid: tuple[int, int, int],
        shared_bytes: int,
        params: dict[str, Any],
        memory: GlobalMemory,
        schedule: str,
        build: Build,
    ) -> None:
        kernel = moment.kernel
        self.moment, self.kernel, self.params, self.memory = moment, kernel, params, memory
        x, y, z = kernel.threads
        if x * y * z % 32:
            raise Unsupported(f"blocks of {x * y * z} threads, no multiple of a warp")
        self.warps, self.blocks = x * y * z // 32, len(blocks)
        self.threads = self.warps * self.blocks * 32
        self.ids = np.arange(self.threads)
        self.lane = self.ids % 32
        self.block = self.ids // 32 % self.blocks
        self.warp = self.ids // 32 // self.blocks
        in_block = self.warp * 32 + self.lane
        products = [i for i in kernel.instructions if i.opcode.startswith("wgmma.mma_async")]
        self.maps = {MAP + i: value for i, value in enumerate(params.values()) if isinstance(value, MappedTensor)}
        proxies = bool(products or self.maps)
        self.shared = SharedMemory(moment, self.block, max(shared_bytes, kernel.shared_bytes), proxies)
        in_products = (part for i in products for operand in i.operands[:2] for part in parts(operand))
        tracked = {part.name for part in in_products if isinstance(part, Register)}
        self.registers = Registers(moment, self.threads, tracked)
        self.registers.constants |= self._constants(in_block, blocks, grid)
        self.pc = np.zeros(self.threads, np.int64)
        self.state = np.full(self.threads, RUNNING, np.int8)
        self.build = build
        self.parts: dict[Any, Any] = {}
        self.jumped = False  # whether the step has changed `pc` or `state` by itself
        self.looked, self.polls = -1, 0  # when polling threads were last let go, and how often they polled since
        self.counts: Counter[str] = Counter()
        self.steps: list[Step | None] = [None] * len(kernel.instructions)
        if products and self.warps % (WARPGROUP // 32):
            raise Unsupported("wgmma in a block whose warps are no whole warpgroups")
        self.units = self._units(schedule)

    def _units(self, schedule: str) -> list[slice]:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule}")
        if schedule == "lockstep":
            return [slice(0, self.threads)]
        size = self.blocks * 32
        units = [slice(first, first + size) for first in range(0, self.threads, size)]
        return units if schedule == "forward" else units[::-1]

    def _constants(self, in_block: Array, blocks: Array, grid: tuple[int, int, int]) -> dict[str, Array]:
        x, y, _ = self.kernel.threads
        threads = (in_block % x, in_block // x % y, in_block // (x * y))
        rows = {"%laneid": self.lane, "%warpid": self.warp, "%cluster_ctarank": 0, "%cluster_nctarank": 1}
        for i, axis in enumerate("xyz"):
            rows |= {f"%tid.{axis}": threads[i], f"%ntid.{axis}": self.kernel.threads[i], f"%nctaid.{axis}": grid[i]}
            rows |= {f"%ctaid.{axis}": blocks[self.block, i], f"%cluster_ctaid.{axis}": 0}
        rows |= self.kernel.shared
        rows |= {name: MAP + i for i, name in enumerate(self.params) if MAP + i in self.maps}
        return {name: np.broadcast_to(np.asarray(row, np.uint64), (self.threads,)) for name, row in rows.items()}

    # ------------------------------------------------------------ what instructions use

    def type_of(self, instruction: Instruction) -> Type:
        """The last type among the words of an opcode."""
        found = [TYPES[part] for part in instruction.parts[1:] if part in TYPES]
        if not found:
            raise Unsupported(f"the instruction {instruction}")
        return found[-1]

    def part(self, make: Callable[["Machine"], Part]) -> Part:
        """What `make` makes for this machine, the same at every call: state that a kind of instruction needs."""
        if make not in self.parts:
            self.parts[make] = make(self)
        found: Part = self.parts[make]
        return found

    def sync_warps(self, lanes: Lanes) -> None:
        """Whole warps have met. Where a block is one warp, that is a barrier of the block."""
        self.shared.sync_warps(self.whole_warps(lanes).ravel())
        self.moment.interval += self.warps == 1

    def whole_warps(self, lanes: Lanes) -> Array:
        """Thread numbers [warps, 32]; if a part of a warp is missing, Parted, which makes the lanes wait for it."""
        try:
            return lanes.warps
        except ValueError:
            raise Parted from None

    def jump(self, lanes: Lanes, target: int) -> None:
        """Lanes go on at an instruction."""
        self.pc[lanes.index] = target
        self.jumped = True

    def wait(self, lanes: Lanes, state: int) -> None:
        """Lanes stop at this instruction until `state` is over."""
        self.pc[lanes.index] = self.moment.instruction
        self.state[lanes.index] = state
        self.polls += state == POLLING
        self.jumped = True

    # ------------------------------------------------------------ the loop

    def run(self, first_block: int = 0) -> Counter[str]:
        """Run to the end; how often warps executed each kind of instruction. `first_block`: its number in the grid."""
        self.memory.enter(first_block + self.block)
        left = LIMIT
        with np.errstate(all="ignore"):
            while True:
                group = self._next()
                if group is None:
                    if (self.state == DONE).all():
                        self.shared.barrier()
                        return self.counts
                    self._release()
                    continue
                left -= self._run(*group)
                if left < 0:
                    raise Deadlock(f"{LIMIT} steps and no end; the last was {self.moment.text()}")

    def _next(self) -> tuple[Lanes, int] | None:
        """(threads of a unit at the smallest instruction number, where its other threads wait to be met)."""
        for unit in self.units:
            running = self.state[unit] == RUNNING
            if running.any():
                pcs = self.pc[unit]
                first = int(pcs[running].min())
                here = running & (pcs == first)
                later = running & ~here
                meet = int(pcs[later].min()) if later.any() else len(self.steps)
                if here.all():
                    return Lanes(unit, self.ids[unit]), meet
                ids = self.ids[unit][here]
                return Lanes(ids, ids), meet
        return None

    def _run(self, lanes: Lanes, meet: int) -> int:
        """Execute until the lanes jump, wait, part, or reach `meet`; returns the number of steps."""
        number = first = int(self.pc[lanes.ids[0]])
        self.jumped = False
        while not self.jumped:
            if number == len(self.steps):
                raise PtxError(f"{self.kernel.name} runs past its last instruction")
            if number == meet:
                self.pc[lanes.index] = number
                break
            self.moment.instruction = number
            self.moment.clock += 1
            step = self.steps[number]
            if step is None:
                step = self.steps[number] = self._decode(self.kernel.instructions[number])
            try:
                step(lanes)
            except Parted:
                self.wait(lanes, PARTED)
            number += 1
        for instruction in self.kernel.instructions[first:number]:
            self.counts[instruction.parts[0]] += -(-len(lanes) // 32)
        return number - first

    def _decode(self, instruction: Instruction) -> Step:
        step = self.build(self, instruction)
        if instruction.guard is None:
            return step
        guard = self.registers.read(instruction.guard, TYPES["pred"])

        def guarded(lanes: Lanes) -> None:
            chosen = lanes.where(guard(lanes))
            if len(chosen) == 0:
                return
            try:
                step(chosen)
            except Parted:
                if len(chosen) < len(lanes):  # the predicate parts them, so that nothing is gained by waiting
                    raise PtxError(PARTED_WARP.format(self.moment.text())) from None
                raise
            if self.jumped and len(chosen) < len(lanes):  # the others go on with the next instruction
                others = np.setdiff1d(lanes.ids, chosen.ids, assume_unique=True)
                self.pc[others] = self.moment.instruction + 1

        return guarded

    # ------------------------------------------------------------ waiting

    def _release(self) -> None:
        """Nobody runs: let whole warpgroups begin products, let threads that poll look again, or end a barrier."""
        if self._release_parted() or self._release_products() or self._release_polling():
            return
        at_barrier = self.state == AT_BARRIER
        if (at_barrier | (self.state == DONE)).all() and at_barrier.any():
            self.shared.barrier()
            self.moment.interval += 1
            self.state[at_barrier] = RUNNING
            self.pc[at_barrier] += 1
            return
        parted = np.flatnonzero(self.state == PARTED)
        if len(parted):
            raise Deadlock(PARTED_WARP.format(self.moment.text(int(self.pc[parted[0]]))))
        stuck = np.flatnonzero((self.state != DONE) & ~at_barrier)
        raise Deadlock(f"no thread of {self.kernel.name} can go on; some wait at {self.moment.text(self.pc[stuck[0]])}")

    def _release_parted(self) -> bool:
        """Warps whose parts have met at an instruction that takes whole warps go on."""
        pcs = np.where(self.state == PARTED, self.pc, -1).reshape(-1, 32)
        met = (pcs[:, 0] >= 0) & (pcs == pcs[:, :1]).all(1)
        self.state.reshape(-1, 32)[met] = RUNNING
        return bool(met.any())

    def _release_polling(self) -> bool:
        """Threads that poll go on if anything but polling has been executed since they began to."""
        polling = self.state == POLLING
        if not polling.any() or self.moment.clock - self.looked == self.polls:
            return False
        self.looked, self.polls = self.moment.clock, 0
        self.state[polling] = RUNNING
        return True

    def warpgroups(self, threads: Array) -> Array:
        """Thread numbers [groups, 128] of the whole warpgroups among `threads`, in the order of warps and lanes."""
        groups = self.block[threads] * self.warps + self.warp[threads] // 4
        order = np.lexsort((threads, groups))
        threads, groups = threads[order], groups[order]
        _, first, counts = np.unique(groups, return_index=True, return_counts=True)
        whole = first[counts == WARPGROUP]
        return threads[whole[:, None] + np.arange(WARPGROUP)]

    def _release_products(self) -> bool:
        waiting = np.flatnonzero(self.state == AT_PRODUCT)
        released = False
        for number in np.unique(self.pc[waiting]):
            groups = self.warpgroups(waiting[self.pc[waiting] == number])
            if len(groups):
                ids = np.sort(groups.ravel())
                self.state[ids] = RUNNING
                self.pc[ids] = number + 1
                self.moment.instruction = int(number)
                step = self.steps[number]
                assert step is not None
                step(Lanes(ids, ids))
                self.jumped = False
                released = True
        return released
