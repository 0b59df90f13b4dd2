"""Shared memory of many blocks: bounds, alignment, uninitialised reads, races, and what is under way in it.

A copy (cp.async) under way may land at any time before it is waited for, so nobody may touch its destination. A product
(wgmma) under way may read at any time before it is waited for, so nobody may write its operands. What threads write is
seen by a tensor core's own reads only after fence.proxy.async.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.bytes import Bytes
from tests.gpu.ptx.findings import Misaligned, OutOfBounds
from tests.gpu.ptx.moment import Moment
from tests.gpu.ptx.races import ATOMIC, READ, WRITE, Accesses, Events, races

Array = NDArray[Any]
COPY, OPERAND = 4, 16  # bytes of the smallest copy, and of the smallest piece of an operand
ALIGNMENT = 1024  # of a block's memory: swizzled operands depend on addresses modulo 1024


class SharedMemory:
    """Args: the moment; block of each thread; bytes of a block; whether tensor cores read it by themselves."""

    def __init__(self, moment: Moment, block_of: Array, size: int, proxies: bool) -> None:
        self.moment = moment
        self.size = size
        stride = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        self.base = block_of.astype(np.int64) * stride
        total = stride * (int(block_of.max()) + 1)
        self.values = Bytes(total, fill=0xFF)  # NaN in every float type
        self.initialised = Bytes(total)
        self.copying = np.zeros(total // COPY, np.int16)
        self.copies = 0  # all of `copying`
        self.multiplied = np.zeros(total // OPERAND, np.int16)
        self.products = 0  # all of `multiplied`
        self.unfenced = np.zeros(total // COPY, np.int32) if proxies else None  # 1 + thread; -1: before a barrier
        self.fetched: Array | None = None  # number of the fetch that brought each piece since the last barrier
        self.observed = np.ones((1, len(block_of)), bool)  # [fetches, threads], who has waited for it; 0: no fetch
        self.accesses = Accesses()
        self.spans = np.zeros(len(block_of), np.int32)  # barriers of its warp that a thread has passed
        self.split = False  # whether there was such a barrier in this interval

    def offsets(self, threads: Array, addresses: Array, width: int, what: str) -> Array:
        """Where the threads' addresses lie; raises if one is outside its block or misaligned."""
        if len(addresses) and (addresses.min() < 0 or int(addresses.max()) + width > self.size):
            bad = addresses[(addresses < 0) | (addresses + width > self.size)][0]
            raise OutOfBounds(
                f"{what} of {width} bytes at {bad} of {self.size} bytes of shared memory by {self.moment.text()}"
            )
        if (addresses % width).any():
            bad = addresses[addresses % width != 0][0]
            raise Misaligned(f"{what} of {width} bytes at {bad} of shared memory by {self.moment.text()}")
        return addresses + self.base[threads]

    def touch(self, threads: Array, offsets: Array, width: int, kind: int, values: Array | None = None) -> None:
        """Log an access to offsets [n], and find what is under way there."""
        self._log(threads, offsets, width, kind, values)
        if self.copies and self._of(self.copying, COPY, offsets, width).any():
            what = "read" if kind == READ else "write"
            self.moment.find("unwaited copy", f"a {what} of shared memory where an asynchronous copy is under way")
        if self.fetched is not None and len(threads):
            which = self._of(self.fetched, OPERAND, offsets, width)
            if which.ndim > 1:
                which = which.max(1)
            if not self.observed[which, threads].all():
                self.moment.find("unwaited copy", "a use of what the copy engine brought by a thread that did not wait")

    def _log(self, threads: Array, offsets: Array, width: int, kind: int, values: Array | None) -> None:
        spans, instruction = self.spans[threads], self.moment.instruction
        self.accesses.add(offsets, width, threads, spans, kind, instruction, values)

    @staticmethod
    def _of(counts: Array, unit: int, offsets: Array, width: int) -> Array:
        """The entries of an array with one for each `unit` bytes, for accesses of `width` bytes."""
        if width <= unit:
            return counts[offsets // unit]
        return counts.reshape(-1, width // unit)[offsets // width]

    def _written(self, threads: Array, offsets: Array, width: int) -> None:
        if self.products and self._of(self.multiplied, OPERAND, offsets, width).any():
            self.moment.find("unwaited product", "a write to shared memory that a product under way reads")
        if self.unfenced is not None:
            if width <= COPY:
                self.unfenced[offsets // COPY] = threads + 1
            else:
                self.unfenced.reshape(-1, width // COPY)[offsets // width] = threads[:, None] + 1

    def load(self, threads: Array, addresses: Array, width: int) -> Array:
        """Bytes [n, width] that threads [n] read."""
        offsets = self.offsets(threads, addresses, width, "a read")
        self.touch(threads, offsets, width, READ)
        if not self.initialised.all_set(offsets, width).all():
            self.moment.find("uninitialised", "a read of shared memory that nothing has written")
        return self.values.get(offsets, width)

    def store(self, threads: Array, addresses: Array, values: Array) -> None:
        """Threads [n] write bytes [n, width]."""
        width = values.shape[1]
        offsets = self.offsets(threads, addresses, width, "a write")
        self.touch(threads, offsets, width, WRITE, values)
        self._written(threads, offsets, width)
        self.values.put(offsets, values)
        self.initialised.fill(offsets, width, 0xFF)

    def change(self, threads: Array, addresses: Array, width: int, compute: Callable[[Array, Array], Array]) -> None:
        """Threads [n] change atomically, in their order; all as in GlobalMemory.change."""
        offsets = self.offsets(threads, addresses, width, "an atomic change")
        self.touch(threads, offsets, width, ATOMIC)
        if not self.initialised.all_set(offsets, width).all():
            self.moment.find("uninitialised", "an atomic change of shared memory that nothing has written")
        self._written(threads, offsets, width)
        self.values.put(offsets, compute(offsets, self.values.get(offsets, width)))

    def begin_copy(self, threads: Array, addresses: Array, values: Array) -> Array:
        """From now on copies may write bytes [n, width] there; returns the offsets for `finish_copy`."""
        width = values.shape[1]
        offsets = self.offsets(threads, addresses, width, "an asynchronous copy")
        self.touch(threads, offsets, width, WRITE, values)
        self._written(threads, offsets, width)
        np.add.at(self.copying.reshape(-1, width // COPY), offsets // width, 1)
        self.copies += len(offsets)
        return offsets

    def finish_copy(self, threads: Array, offsets: Array, values: Array) -> None:
        """The copies of threads [n] to offsets [n] have landed, and these threads know it."""
        width = values.shape[1]
        np.add.at(self.copying.reshape(-1, width // COPY), offsets // width, -1)
        self.copies -= len(offsets)
        self._log(threads, offsets, width, WRITE, values)
        self.values.put(offsets, values)
        self.initialised.fill(offsets, width, 0xFF)

    def begin_fetch(self, thread: int, addresses: Array, values: Array) -> Array:
        """From now on the copy engine may write pieces [n, 16] there; returns the offsets for `finish_fetch`."""
        threads = np.full(len(addresses), thread)
        offsets = self.offsets(threads, addresses, OPERAND, "a copy of the copy engine")
        self.touch(threads, offsets, OPERAND, WRITE, values)
        if self.products and self.multiplied[offsets // OPERAND].any():
            self.moment.find("unwaited product", "a copy to shared memory that a product under way reads")
        self.copying.reshape(-1, OPERAND // COPY)[offsets // OPERAND] += 1
        self.copies += len(offsets)
        return offsets

    def finish_fetch(self, offsets: Array, values: Array) -> int:
        """What the copy engine brings is there, for those who `observe` the number that this returns."""
        self.copying.reshape(-1, OPERAND // COPY)[offsets // OPERAND] -= 1
        self.copies -= len(offsets)
        self.values.put(offsets, values)
        self.initialised.fill(offsets, OPERAND, 0xFF)
        if self.unfenced is not None:  # tensor cores and the copy engine see each other's writes
            self.unfenced.reshape(-1, OPERAND // COPY)[offsets // OPERAND] = 0
        if self.fetched is None:
            self.fetched = np.zeros(len(self.copying) // (OPERAND // COPY), np.int32)
        self.fetched[offsets // OPERAND] = len(self.observed)
        self.observed = np.concatenate([self.observed, np.zeros((1, self.observed.shape[1]), bool)])
        return len(self.observed) - 1

    def observe(self, threads: Array, fetches: list[int]) -> None:
        """These threads have waited for these fetches of this interval."""
        self.observed[np.asarray(fetches, int)[:, None], threads] = True

    def begin_operand(self, threads: Array, addresses: Array) -> tuple[Array, Array]:
        """A tensor core reads pieces of 16 bytes; returns their bytes [n, 16] and what `finish_operand` takes."""
        if self.unfenced is None:
            raise ValueError("this memory was made without proxies")
        offsets = self.offsets(threads, addresses, OPERAND, "an operand")
        self.touch(threads, offsets, OPERAND, READ)
        if not self.initialised.all_set(offsets, OPERAND).all():
            self.moment.find("uninitialised", "an operand in shared memory that nothing has written")
        if self._of(self.unfenced, COPY, offsets, OPERAND).any():
            self.moment.find("missing fence", "an operand that threads have written, without fence.proxy.async since")
        np.add.at(self.multiplied, offsets // OPERAND, 1)
        self.products += len(offsets)
        return self.values.get(offsets, OPERAND), offsets

    def finish_operand(self, offsets: Array) -> None:
        """The product that reads there is done."""
        np.add.at(self.multiplied, offsets // OPERAND, -1)
        self.products -= len(offsets)

    def fence_proxy(self, threads: Array) -> None:
        """What these threads wrote, or saw by a barrier, is now seen by their tensor cores."""
        if self.unfenced is not None:
            fenced = np.zeros(len(self.spans) + 2, bool)  # indexed by `unfenced`, -1 is the last
            fenced[threads + 1] = fenced[-1] = True
            self.unfenced[fenced[self.unfenced]] = 0

    def sync_warps(self, threads: Array) -> None:
        """These threads, whole warps, have met."""
        self.spans[threads] += 1
        self.split = True

    def barrier(self) -> None:
        """All threads of every block have met, or are done: look for races before that."""
        if len(self.accesses):
            self._races()
        self.accesses.clear()
        self.split = False
        self.fetched, self.observed = None, self.observed[:1]
        if self.unfenced is not None:
            self.unfenced[self.unfenced > 0] = -1

    def _races(self) -> None:
        events = self.accesses.events()
        owners, places = events.thread, events.place
        if self.split:  # between warps, then within a warp between its barriers
            self._note(events, places, owners // 32)
            keys = np.stack([places, owners // 32, events.span], 1)
            places = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
        self._note(events, places, owners)

    def _note(self, events: Events, places: Array, owners: Array) -> None:
        for first, second in races(events, places, owners):
            self.moment.find_pair("race", "threads race in shared memory, no barrier between", first, second)
