"""The registers of all threads: a row of bit patterns for each name, and which threads have written it.

Operands become functions of the lanes that execute. Literals, parameters and special registers are rows as well.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.moment import Moment
from tests.gpu.ptx.text import Address, Group, Immediate, Operand, Register, Symbol
from tests.gpu.ptx.types import TYPES, Type

Array = NDArray[Any]
Read = Callable[["Lanes"], Array]
Write = Callable[["Lanes", Array], None]
POISON = 0xA5  # what an unwritten register holds, byte by byte


class Lanes:
    """Threads that execute an instruction together.

    Args:
        index: a slice or an array of thread numbers, to index a row with.
        ids: the same as an array.
    """

    __slots__ = ("ids", "index")

    def __init__(self, index: slice | Array, ids: Array) -> None:
        self.index = index
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, chosen: Array) -> "Lanes":
        """Those for which `chosen` [lanes] is true."""
        if chosen.all():
            return self
        ids = self.ids[chosen]
        return Lanes(ids, ids)

    @property
    def warps(self) -> Array:
        """Thread numbers [warps, 32]; ValueError if a warp is not whole."""
        ids = self.ids
        if len(ids) % 32 == 0:
            rows = ids.reshape(-1, 32)
            if not (rows[:, 0] % 32).any() and (rows[:, 31] - rows[:, 0] == 31).all():
                return rows
        raise ValueError("a warp is not whole")


@dataclass
class Tracked:
    """Of a register that a product of a warpgroup uses: for each thread, products under way and the last write."""

    changing: Array
    reading: Array
    stamp: Array


class Registers:
    """Args: the moment; number of threads; names of the registers to track."""

    def __init__(self, moment: Moment, threads: int, tracked: Iterable[str] = ()) -> None:
        self.moment = moment
        self.threads = threads
        self.kinds = {name: TYPES[kind] for name, kind in moment.kernel.registers.items()}
        self.tracked = {
            name: Tracked(np.zeros(threads, np.int16), np.zeros(threads, np.int16), np.full(threads, -1, np.int64))
            for name in tracked
        }
        self.rows: dict[str, Array] = {}
        self.written: dict[str, Array] = {}
        by_type: dict[Any, list[str]] = {}
        for name, kind in self.kinds.items():
            by_type.setdefault(kind.raw, []).append(name)
        for raw, names in by_type.items():
            size = np.dtype(raw).itemsize
            block = np.full((len(names), threads, size), POISON if raw is not np.bool_ else 1, np.uint8)
            self.rows |= dict(zip(names, block.view(raw)[..., 0], strict=True))
            self.written |= dict(zip(names, np.zeros((len(names), threads), bool), strict=True))
        self.constants: dict[str, Array] = {}  # special registers and symbols: rows of uint32 or uint64

    def unwritten(self, name: str) -> None:
        """A register was read that some of the threads had not written."""
        self.moment.find("uninitialised", f"a read of register {name} that is not written")

    def read(self, operand: Operand, kind: Type, wider: bool = False) -> Read:
        """A function that gives the patterns of an operand as `kind.raw`.

        Args:
            operand: a register, literal or symbol.
            kind: how it is read.
            wider: whether the register may be wider than `kind` (as in ld, st and cvt); its low bits are taken.
        """
        if isinstance(operand, Register):
            return self._read_register(operand, kind, wider)
        if isinstance(operand, Immediate):
            row = np.broadcast_to(kind.literal(operand), (self.threads,))
        elif isinstance(operand, Symbol) and operand.name in self.constants:
            row = self.constants[operand.name].astype(kind.raw)
        else:
            raise Unsupported(f"the operand {operand}")
        return lambda lanes: np.ascontiguousarray(row[lanes.index])

    def _read_register(self, operand: Register, kind: Type, wider: bool) -> Read:
        name = operand.name
        row, written, held = self.rows[name], self.written[name], self.kinds[name]
        if held.size < kind.size or (held.raw == np.bool_) != (kind.raw == np.bool_):
            raise Unsupported(f"reading the {held.name} register {name} as {kind.name}")
        if held.size > kind.size and not wider:
            raise Unsupported(f"reading the {held.name} register {name} as {kind.name}")
        tracked, narrow = self.tracked.get(name), held.size > kind.size

        def read(lanes: Lanes) -> Array:
            if tracked is not None and tracked.changing[lanes.index].any():
                self.moment.find("unwaited product", f"a read of register {name}, which a product under way changes")
            if not written[lanes.index].all():
                self.unwritten(name)
            patterns = row[lanes.index]
            if operand.negated:
                return ~patterns
            return patterns.astype(kind.raw) if narrow else patterns

        return read

    def numbers(self, operand: Operand, kind: Type, wider: bool = False) -> Read:
        """A function that gives an operand as numbers to compute with."""
        read = self.read(operand, kind, wider)
        decode = kind.decode
        return lambda lanes: decode(read(lanes))

    def write(self, operand: Operand, kind: Type) -> Write:
        """A function that stores patterns of `kind.raw`; in a wider register they are extended by the type's sign."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda lanes, patterns: None
        if not isinstance(operand, Register):
            raise Unsupported(f"the destination {operand}")
        name = operand.name
        row, written, held = self.rows[name], self.written[name], self.kinds[name]
        if held.size < kind.size or (held.raw == np.bool_) != (kind.raw == np.bool_):
            raise Unsupported(f"writing {kind.name} to the {held.name} register {name}")
        tracked = self.tracked.get(name)
        extended = held.size > kind.size
        signed = TYPES[f"s{8 * held.size}"].dtype if kind.is_signed else held.raw

        def write(lanes: Lanes, patterns: Array) -> None:
            if tracked is not None:
                if tracked.changing[lanes.index].any() or tracked.reading[lanes.index].any():
                    self.moment.find("unwaited product", f"a write of register {name}, which a product under way uses")
                tracked.stamp[lanes.index] = self.moment.clock
            if extended:
                patterns = patterns.view(kind.dtype).astype(signed).view(held.raw)
            row[lanes.index] = patterns
            written[lanes.index] = True

        return write

    def store(self, operand: Operand, kind: Type) -> Write:
        """A function that rounds numbers to a type and stores them."""
        write, encode = self.write(operand, kind), kind.encode
        return lambda lanes, numbers: write(lanes, encode(numbers))

    def address(self, operand: Operand) -> Read:
        """A function that gives base + offset of an [address] as int64."""
        if not isinstance(operand, Address):
            raise Unsupported(f"the address {operand}")
        base, offset = operand.base, operand.offset
        size = self.kinds[base.name].size if isinstance(base, Register) else 8
        read = self.read(base, TYPES[f"u{8 * size}"])
        return lambda lanes: read(lanes).astype(np.int64) + offset


def parts(operand: Operand) -> tuple[Operand, ...]:
    """The parts of a vector, or the operand alone."""
    return operand.parts if isinstance(operand, Group) else (operand,)
