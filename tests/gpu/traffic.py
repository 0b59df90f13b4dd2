"""How many bytes a kernel moves between memory and an L2 cache: accesses recorded in the interpreter, then replayed.

A model, not a measurement: programs run in waves of `concurrent`, in lock-step, and the cache is fully associative and
drops the sectors that were used longest ago. It knows no kernel of ours.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

SECTOR = 64
"""Bytes that move together: two sectors of 32."""


@dataclass
class Trace:
    """For each program, in order, its accesses: (whether it writes, the sectors that it touches)."""

    programs: dict[tuple[int, ...], list[tuple[bool, NDArray[np.int64]]]] = field(default_factory=dict)

    def add(self, writes: bool, addresses: Any, mask: Any, itemsize: int) -> None:
        """Record one load, store or atomic."""
        program = tuple(int(index) for index in interpreter.interpreter_builder.grid_idx)
        flat = np.asarray(addresses).astype(np.int64)
        flat = flat[np.broadcast_to(np.asarray(mask, bool), flat.shape)]
        sectors = np.unique(np.concatenate([flat // SECTOR, (flat + itemsize - 1) // SECTOR]))
        self.programs.setdefault(program, []).append((writes, sectors))

    def touched(self) -> int:
        """Bytes of all distinct sectors: what must move at least, once in or once out."""
        return SECTOR * len({int(s) for accesses in self.programs.values() for _, found in accesses for s in found})

    def requested(self) -> int:
        """Bytes that the programs ask the L2 cache for, each program by itself."""
        return SECTOR * sum(len(found) for accesses in self.programs.values() for _, found in accesses)

    def moved(self, cache: int, concurrent: int) -> int:
        """Bytes between memory and a cache of `cache` bytes that `concurrent` programs share, in and out."""
        programs = list(self.programs.values())
        held: OrderedDict[int, bool] = OrderedDict()  # sector -> whether it was written
        room, moved = cache // SECTOR, 0
        for first in range(0, len(programs), concurrent):
            wave = programs[first : first + concurrent]
            for step in range(max(map(len, wave))):
                for accesses in wave:
                    if step >= len(accesses):
                        continue
                    writes, sectors = accesses[step]
                    for sector in sectors.tolist():
                        if sector in held:
                            held.move_to_end(sector)
                            held[sector] |= writes
                            continue
                        moved += not writes  # what is written first is not read
                        held[sector] = writes
                        if len(held) > room:
                            moved += held.popitem(last=False)[1]
        return SECTOR * (moved + sum(held.values()))


@contextmanager
def recorded() -> Iterator[Trace]:
    """Record what the kernels do that are launched inside."""
    builder, trace = InterpreterBuilder, Trace()
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    load, store, atomic = stock = [getattr(builder, name) for name in names]

    def itemsize(pointers: Any) -> int:
        return max(1, getattr(pointers.get_element_ty(), "primitive_bitwidth", 8) // 8)

    def record_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        trace.add(False, pointers.data, mask.data, itemsize(pointers))
        return load(self, pointers, mask, *rest)

    def record_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        trace.add(True, pointers.data, mask.data, itemsize(pointers))
        return store(self, pointers, value, mask, *rest)

    def record_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        trace.add(False, pointers.data, mask.data, itemsize(pointers))
        trace.add(True, pointers.data, mask.data, itemsize(pointers))
        return atomic(self, op, pointers, value, mask, *rest)

    try:
        for name, function in zip(names, (record_load, record_store, record_atomic), strict=True):
            setattr(builder, name, function)
        yield trace
    finally:
        for name, function in zip(names, stock, strict=True):
            setattr(builder, name, function)
