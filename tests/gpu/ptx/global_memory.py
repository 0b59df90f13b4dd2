"""Global memory: the buffers that a kernel was given, each alone in its address range, and how they are used.

An access outside every buffer cannot fall into a neighbour. Arguments that share memory are one buffer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.gpu.ptx.bytes import WIDEST, Bytes
from tests.gpu.ptx.findings import Misaligned, OutOfBounds, Traffic
from tests.gpu.ptx.moment import Moment
from tests.gpu.ptx.races import ATOMIC, READ, WRITE, Accesses, races

Array = NDArray[Any]
APART = 40  # buffers are 2^40 bytes apart
PAGE = 4096  # addresses keep their remainder, and so their alignment


def extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes [begin, end) of a view, not of its storage."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _bytes_of(tensor: Tensor, begin: int, end: int) -> Array:
    """The bytes [begin, end) of a tensor's storage, without a copy."""
    storage = tensor.untyped_storage()
    all_bytes = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return all_bytes.numpy()[begin - storage.data_ptr() : end - storage.data_ptr()]


@dataclass
class Buffer:
    """Memory of one or more arguments: the host's bytes, the device's copy, and its use."""

    name: str
    base: int
    origin: int
    host: Array
    values: Bytes
    was_read: Bytes
    was_written: Bytes
    accesses: Accesses
    traffic: Traffic

    @property
    def size(self) -> int:
        """Bytes that may be accessed, from `base` on."""
        return len(self.host)


class GlobalMemory:
    """Args: the moment; argument's name -> tensor on the CPU."""

    def __init__(self, moment: Moment, tensors: Mapping[str, Tensor]) -> None:
        self.moment = moment
        self.buffers: list[Buffer] = []
        self.address: dict[str, int] = {}
        self.block_of = np.zeros(0, np.int64)  # of every thread so far
        self.shift = 0  # what makes a machine's thread numbers different from those of the machines before
        ranges = sorted((*extent(tensor), name) for name, tensor in tensors.items())
        while ranges:
            begin, end, name = ranges.pop(0)
            names = [(name, begin)]
            while ranges and ranges[0][0] < end:
                other_begin, other_end, other = ranges.pop(0)
                names.append((other, other_begin))
                end = max(end, other_end)
            base = (len(self.buffers) + 1 << APART) + begin % PAGE
            host = _bytes_of(tensors[name], begin, end)
            lead = base % WIDEST  # offsets in `values` count from a multiple of the widest access
            values, was_read, was_written = (Bytes(lead + len(host)) for _ in range(3))
            values.data[lead : lead + len(host)] = host
            joined = "=".join(name for name, _ in names)
            self.buffers.append(
                Buffer(joined, base, base - lead, host, values, was_read, was_written, Accesses(), Traffic())
            )
            self.address |= {name: base + start - begin for name, start in names}

    def enter(self, block_of: Array) -> None:
        """From now on threads are those of further blocks; `block_of` [threads] numbers them over the whole grid."""
        self.shift = len(self.block_of)
        self.block_of = np.concatenate([self.block_of, block_of])

    def _find(self, addresses: Array, width: int, what: str) -> list[tuple[Buffer, Array, Array | slice]]:
        """(buffer, offsets in its `values`, which of the accesses) for every buffer that is accessed."""
        if (addresses % width).any():
            bad = int(addresses[addresses % width != 0][0])
            raise Misaligned(f"{what} of {width} bytes at {self._place(bad)} by {self.moment.text()}")
        numbers = (addresses >> APART) - 1
        found: list[tuple[Buffer, Array, Array | slice]] = []
        for number in np.unique(numbers):
            chosen = slice(None) if (numbers == number).all() else np.flatnonzero(numbers == number)
            there = addresses[chosen]
            buffer = self.buffers[number] if 0 <= number < len(self.buffers) else None
            if buffer is None or there.min() < buffer.base or there.max() + width > buffer.base + buffer.size:
                inside = np.zeros(len(there), bool)
                if buffer is not None:
                    inside = (there >= buffer.base) & (there + width <= buffer.base + buffer.size)
                bad = int(there[~inside][0])
                raise OutOfBounds(
                    f"{what} of {width} bytes at {self._place(bad)}, in {int((~inside).sum())} lanes,"
                    f" by {self.moment.text()}"
                )
            found.append((buffer, there - buffer.origin, chosen))
        return found

    def _place(self, address: int) -> str:
        """Such as "byte 160 of x_ptr (160 bytes)"."""
        number = (address + (1 << APART - 1) >> APART) - 1  # a little before a buffer is its place too
        if not 0 <= number < len(self.buffers):
            return f"address {address:#x}, which is in no argument,"
        buffer = self.buffers[number]
        return f"byte {address - buffer.base} of {buffer.name} ({buffer.size} bytes)"

    def _use(
        self, buffer: Buffer, offsets: Array, width: int, threads: Array, kind: int, values: Array | None = None
    ) -> None:
        spans = np.full(len(threads), self.moment.interval, np.int32)
        buffer.accesses.add(offsets, width, threads + self.shift, spans, kind, self.moment.instruction, values)
        # what several threads of a warp ask for in one instruction is asked for once
        asked = width * len(np.unique(offsets * (1 << 20) + threads // 32))
        if kind != WRITE:
            buffer.traffic.read += asked
            buffer.was_read.fill(offsets, width, 0xFF)
        if kind != READ:
            buffer.traffic.written += asked
            buffer.was_written.fill(offsets, width, 0xFF)

    def load(self, threads: Array, addresses: Array, width: int) -> Array:
        """Bytes [n, width] that threads [n] read."""
        values = np.empty((len(addresses), width), np.uint8)
        for buffer, offsets, chosen in self._find(addresses, width, "a read"):
            self._use(buffer, offsets, width, threads[chosen], READ)
            values[chosen] = buffer.values.get(offsets, width)
        return values

    def store(self, threads: Array, addresses: Array, values: Array) -> None:
        """Threads [n] write bytes [n, width]."""
        width = values.shape[1]
        for buffer, offsets, chosen in self._find(addresses, width, "a write"):
            self._use(buffer, offsets, width, threads[chosen], WRITE, values[chosen])
            buffer.values.put(offsets, values[chosen])

    def change(self, threads: Array, addresses: Array, width: int, compute: Callable[[Array, Array], Array]) -> None:
        """Threads [n] change atomically, in their order.

        Args:
            threads: who.
            addresses: where.
            width: bytes.
            compute: (a number for each place, old bytes [n, width]) -> new bytes.
        """
        found = self._find(addresses, width, "an atomic change")
        values = np.empty((len(addresses), width), np.uint8)
        for buffer, offsets, chosen in found:
            self._use(buffer, offsets, width, threads[chosen], ATOMIC)
            values[chosen] = buffer.values.get(offsets, width)
        values = compute(addresses, values)
        for buffer, offsets, chosen in found:
            buffer.values.put(offsets, values[chosen])

    def finish(self) -> dict[str, Traffic]:
        """Copy the bytes back, look for races, and say what was moved."""
        traffic = {}
        for buffer in self.buffers:
            lead = buffer.base - buffer.origin
            if buffer.traffic.written:
                buffer.host[:] = buffer.values.data[lead : lead + buffer.size]
                self._races(buffer)
            buffer.traffic.distinct_read = int(np.count_nonzero(buffer.was_read.data))
            buffer.traffic.distinct_written = int(np.count_nonzero(buffer.was_written.data))
            traffic[buffer.name] = buffer.traffic
        return traffic

    def _races(self, buffer: Buffer) -> None:
        """Blocks are ordered by nothing, the threads of one by its barriers."""
        events = buffer.accesses.events()
        changed = np.zeros(int(events.place.max()) + 1, bool)
        changed[events.place[events.kind != READ]] = True
        events = events.where(changed[events.place])
        blocks = self.block_of[events.thread]
        in_block = np.unique(np.stack([events.place, blocks, events.span], 1), axis=0, return_inverse=True)[1].ravel()
        for who, places, owners in (("blocks", events.place, blocks), ("threads", in_block, events.thread)):
            for first, second in races(events, places, owners):
                self.moment.find_pair("race", f"{who} race in {buffer.name}, no barrier between", first, second)
