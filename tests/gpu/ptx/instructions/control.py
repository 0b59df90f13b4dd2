"""Branches, the end of a thread, barriers of a block, and fences."""

import numpy as np

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import AT_BARRIER, DONE, Machine, Step
from tests.gpu.ptx.registers import Lanes
from tests.gpu.ptx.text import Immediate, Instruction, Symbol


@instruction("bra", words="uni")
def _bra(machine: Machine, what: Instruction) -> Step:
    label = what.operands[0]
    if not isinstance(label, Symbol) or label.name not in machine.kernel.labels:
        raise Unsupported(f"the instruction {what}")
    target = machine.kernel.labels[label.name]
    return lambda lanes: machine.jump(lanes, target)


@instruction("ret", "exit", words="uni")
def _ret(machine: Machine, what: Instruction) -> Step:
    return lambda lanes: machine.wait(lanes, DONE)


@instruction("bar.sync", "barrier.sync", "barrier.cta.sync", "bar.cta.sync", words="aligned")
def _barrier(machine: Machine, what: Instruction) -> Step:
    if what.operands != (Immediate("0"),):
        raise Unsupported(f"a barrier of a part of a block, {what}")

    def step(lanes: Lanes) -> None:
        machine.whole_warps(lanes)
        machine.wait(lanes, AT_BARRIER)

    return step


@instruction("bar.warp.sync")
def _warp_barrier(machine: Machine, what: Instruction) -> Step:
    if what.operands not in ((Immediate("-1"),), (Immediate("0xffffffff"),), (Immediate("4294967295"),)):
        raise Unsupported(f"a barrier of a part of a warp, {what}")
    return machine.sync_warps


@instruction("fence.proxy.async", words="shared::cta global")
def _proxy_fence(machine: Machine, what: Instruction) -> Step:
    if "global" in what.parts:
        return lambda lanes: None
    return lambda lanes: machine.shared.fence_proxy(lanes.ids)


@instruction("membar", "fence", words="cta gl sys gpu acq_rel sc cluster")
def _fence(machine: Machine, what: Instruction) -> Step:
    """Nothing: memory changes at once for everybody here, and no finding depends on a fence."""
    return lambda lanes: None


@instruction("trap")
def _trap(machine: Machine, what: Instruction) -> Step:
    def step(lanes: Lanes) -> None:
        raise AssertionError(f"{len(np.unique(lanes.ids))} threads reach {machine.moment.text()}")

    return step
