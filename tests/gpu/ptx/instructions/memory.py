"""Loads, stores and atomic changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, parts
from tests.gpu.ptx.text import Address, Instruction, Symbol

Array = NDArray[Any]
_ORDER = "weak relaxed acquire release acq_rel volatile cta gpu sys cluster"
_CACHE = "ca cg cs cv wb wt nc"
_SPACES = "global shared shared::cta"


def is_shared(what: Instruction) -> bool:
    """Whether an access is to shared memory; Unsupported if it is to neither shared nor global memory."""
    if "shared" in what.parts or "shared::cta" in what.parts:
        return True
    if "global" in what.parts:
        return False
    raise Unsupported(f"a generic address, {what}")


@instruction("ld", words=f"param v2 v4 v8 {_SPACES} {_ORDER} {_CACHE}")
def _ld(machine: Machine, what: Instruction) -> Step:
    kind, registers = machine.type_of(what), machine.registers
    if "param" in what.parts:
        return _ld_param(machine, what)
    address, shared = registers.address(what.operands[1]), is_shared(what)
    writes = [registers.write(part, kind) for part in parts(what.operands[0])]
    width = kind.size * len(writes)
    load = machine.shared.load if shared else machine.memory.load

    def step(lanes: Lanes) -> None:
        values = load(lanes.ids, address(lanes), width).view(kind.raw)
        for i, write in enumerate(writes):
            write(lanes, np.ascontiguousarray(values[:, i]))

    return step


def _ld_param(machine: Machine, what: Instruction) -> Step:
    kind, source = machine.type_of(what), what.operands[1]
    if not isinstance(source, Address) or not isinstance(source.base, Symbol) or source.offset:
        raise Unsupported(f"the instruction {what}")
    value = machine.params[source.base.name]
    if isinstance(value, float):
        pattern = kind.encode(np.array([value])) if kind.is_float else np.array([value], f"f{kind.size}").view(kind.raw)
    else:
        pattern = np.array([int(value) % (1 << 8 * kind.size)], kind.raw)
    write = machine.registers.write(what.operands[0], kind)
    return lambda lanes: write(lanes, np.repeat(pattern, len(lanes)))


@instruction("st", words=f"v2 v4 v8 {_SPACES} {_ORDER} {_CACHE}")
def _st(machine: Machine, what: Instruction) -> Step:
    kind, registers = machine.type_of(what), machine.registers
    address, shared = registers.address(what.operands[0]), is_shared(what)
    reads = [registers.read(part, kind, wider=True) for part in parts(what.operands[1])]
    store = machine.shared.store if shared else machine.memory.store

    def step(lanes: Lanes) -> None:
        values = np.stack([read(lanes) for read in reads], 1).view(np.uint8)
        store(lanes.ids, address(lanes), values)

    return step


_CHANGES: dict[str, Callable[..., Any]] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: old * 0 if old >= limit else old + 1,
    "cas": lambda old, expected, new: new if old == expected else old,
}


def _change_all(places: Array, olds: Array, operands: list[Array], change: Callable[..., Any]) -> tuple[Array, Array]:
    """(what each lane finds, what it leaves) of changes to `places`, one lane after the other."""
    current: dict[int, Any] = {}
    found, left = olds.copy(), olds.copy()
    for i, place in enumerate(places.tolist()):
        found[i] = current.get(place, olds[i])
        left[i] = change(found[i], *(operand[i] for operand in operands))
        current[place] = left[i]
    return found, left


@instruction("atom", "red", words=" ".join([_SPACES, _ORDER, "noftz", *_CHANGES]))
def _atom(machine: Machine, what: Instruction) -> Step:
    kind, registers = machine.type_of(what), machine.registers
    operands = what.operands if what.parts[0] == "red" else what.operands[1:]
    address = registers.address(operands[0])
    values = [registers.numbers(operand, kind) for operand in operands[1:]]
    store = registers.store(what.operands[0], kind) if what.parts[0] == "atom" else None
    change = next(_CHANGES[word] for word in what.parts if word in _CHANGES)
    memory = machine.shared if is_shared(what) else machine.memory

    def step(lanes: Lanes) -> None:
        given = [value(lanes) for value in values]
        found = np.zeros(len(lanes), kind.dtype)

        def compute(places: Array, old: Array) -> Array:
            nonlocal found
            found, left = _change_all(places, kind.decode(old.view(kind.raw)[:, 0]), given, change)
            return np.ascontiguousarray(kind.encode(left))[:, None].view(np.uint8)

        memory.change(lanes.ids, address(lanes), kind.size, compute)
        if store is not None:
            store(lanes, found)

    return step
