"""Which accesses of a memory are ordered by nothing: same place, different threads, at least one of them a write.

It knows no instruction and no barrier: its caller says between what accesses there is none. Threads that store equal
bytes by the same instruction do not race: Triton stores what several threads hold from each of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.types import RAW

Array = NDArray[Any]
READ, WRITE, ATOMIC = 0, 1, 2
SHOWN = 200  # places that are looked at for who races there


@dataclass
class Events:
    """Accesses as columns, one row for each access and place; a place is as wide as the narrowest access."""

    place: Array
    thread: Array
    span: Array
    kind: Array
    instruction: Array
    value: Array

    def where(self, chosen: Array) -> "Events":
        """Some of the rows."""
        columns = (self.place, self.thread, self.span, self.kind, self.instruction, self.value)
        return Events(*(column[chosen] for column in columns))


class Accesses:
    """A log of accesses."""

    def __init__(self) -> None:
        self._entries: list[tuple[Array, int, Array, Array, int, int, Array | None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        offsets: Array,
        width: int,
        threads: Array,
        spans: Array,
        kind: int,
        instruction: int,
        values: Array | None = None,
    ) -> None:
        """Note accesses.

        Args:
            offsets: [n], multiples of `width`.
            width: bytes, at most 32.
            threads: [n], who.
            spans: [n], between what barriers; any number that grows.
            kind: READ, WRITE or ATOMIC.
            instruction: its number.
            values: bytes [n, width] that are written.
        """
        self._entries.append((offsets, width, threads, spans, kind, instruction, values))

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def events(self) -> Events:
        """The log as columns."""
        unit = min((entry[1] for entry in self._entries), default=1)
        unit = min(unit, 8)
        columns: list[list[Array]] = [[np.zeros(0, kind)] for kind in (int, int, int, np.int8, np.int32, np.uint64)]
        for offsets, width, threads, spans, kind, instruction, values in self._entries:
            times = width // unit
            places = ((offsets // unit)[:, None] + np.arange(times)).ravel()
            value = np.zeros(len(places), np.uint64)
            if values is not None:
                value = np.ascontiguousarray(values).view(RAW[unit]).ravel().astype(np.uint64)
            row: tuple[Array, ...] = (
                places,
                np.repeat(threads, times),
                np.repeat(spans, times),
                np.full(len(places), kind, np.int8),
                np.full(len(places), instruction, np.int32),
                value,
            )
            for column, part in zip(columns, row, strict=True):
                column.append(part)
        return Events(*map(np.concatenate, columns))


def _clashes(places: Array, owners: Array, kinds: Array) -> Array:
    """Which accesses are to a place of several owners that is not only read, and not only atomically changed."""
    size = int(places.max()) + 1
    first = np.empty(size, owners.dtype)
    first[places] = owners
    many, changed, plain = np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, bool)
    many[places[first[places] != owners]] = True
    changed[places[kinds != READ]] = True
    plain[places[kinds != ATOMIC]] = True
    return np.asarray((many & changed & plain)[places])


def _one_owner_of_equal_stores(places: Array, owners: Array, events: Events) -> Array:
    """Owners, but those of stores of one value to a place by one instruction are the first of them."""
    keys = np.stack([places, events.instruction, events.value.view(np.int64)], 1)
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return np.where(events.kind == WRITE, owners[first[group.ravel()]], owners)


def races(events: Events, places: Array, owners: Array) -> Iterator[tuple[int, int]]:
    """Pairs (a changing instruction, one of another owner) that clash, each once.

    Args:
        events: the accesses.
        places: where each is; events of different places do not clash, whatever their `place`.
        owners: accesses of one owner are ordered.
    """
    for exactly in (False, True):  # equal stores are looked for only if there seems to be a race
        if not len(places):
            return
        owners = _one_owner_of_equal_stores(places, owners, events) if exactly else owners
        bad = _clashes(places, owners, events.kind)
        events, places, owners = events.where(bad), places[bad], owners[bad]
    if not len(places):
        return
    seen = set()
    order = np.argsort(places, kind="stable")
    begins = np.flatnonzero(np.r_[True, np.diff(places[order]) != 0])
    for begin, end in list(zip(begins, [*begins[1:], len(order)], strict=True))[:SHOWN]:
        rows = order[begin:end]
        kinds = events.kind[rows]
        change = int(np.argmax(kinds == WRITE if (kinds == WRITE).any() else kinds == ATOMIC))
        other = int(np.argmax(owners[rows] != owners[rows[change]]))
        pair = (int(events.instruction[rows[change]]), int(events.instruction[rows[other]]))
        if pair not in seen:
            seen.add(pair)
            yield pair
