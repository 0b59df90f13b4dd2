"""The smallest of all keys over all layers, to the single entry: keys that are held, or that follow from ranks.

It knows neither what a key means nor how it was found.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmtkern.pruning.memory import give_memory_back
from rmtkern.pruning.pattern import smallest_units

__all__ = ["Keys", "RankKeys", "held", "take_smallest"]


@dataclass(frozen=True, eq=False)
class RankKeys:
    """Keys of one layer that follow from the ranks of its entries: (rank - before + 0.5) / share, in float64.

    Ranks start at 0; equal scores are ranked in order of index. Nothing of the layer's size is held: how many entries
    have a key up to a number follows from that number, and which these are from the scores, one layer after the other.

    Args:
        shape: (N, K).
        scores: makes [N, K] float32, no NaN; entries with a negative or infinite score may not go. It is called twice,
            the second time when the layer's turn has come.
        by_row: whether ranks are those in a row, or in the whole layer.
        share: >= 0; with 0, or so little that a key is infinite, no entry may go.
        before: ranks below it are of entries that may not go.
    """

    shape: tuple[int, int]
    scores: Callable[[], Tensor]
    by_row: bool
    share: float
    before: int = 0

    def key(self, rank: int) -> float:
        """Of an entry of that rank."""
        return (rank - self.before + 0.5) / self.share if self.share > 0 else math.inf


Keys = Sequence[Tensor] | Sequence[Callable[[], Tensor]] | Sequence[RankKeys]
"""One for each layer: [N, K] float32 or float64, all of one dtype; or what makes that; or what it follows from."""


def held(tensor: Tensor) -> Callable[[], Tensor]:
    """What makes this tensor."""
    return lambda: tensor


def take_smallest(keys: Keys, count: int) -> Iterator[Tensor]:
    """The `count` smallest keys over all layers; ties by layer, then by flat index.

    Nothing is sorted but, for RankKeys, the rows of one layer at a time, and no more than one layer is copied.

    Args:
        keys: one for each layer; entries whose key is negative or inf may not go. What makes keys is called for every
            16 bits of them, and when the layer's turn has come.
        count: 0 to the number of entries that may go.

    Yields:
        One bool [N, K] per layer; exactly `count` true in all.

    Raises:
        ValueError: fewer than `count` entries may go.
    """
    ranked = [key for key in keys if isinstance(key, RankKeys)]
    made = [held(key) if isinstance(key, Tensor) else key for key in keys if not isinstance(key, RankKeys)]
    yield from _by_rank(ranked, count) if ranked else _by_radix(made, count)


def _check(count: int, available: int) -> None:
    if not 0 <= count <= available:
        raise ValueError(f"count: expected 0 to {available} (the entries that may go), got {count}")


def _by_radix(keys: Sequence[Callable[[], Tensor]], count: int) -> Iterator[Tensor]:
    """A radix search on the bit patterns: those of non-negative floats are ordered like the numbers."""
    infinity = _bits(torch.tensor([torch.inf], dtype=keys[0]().dtype))
    digits, width = 16, 8 * infinity.itemsize
    prefix, below = 0, 0
    for shift in range(width - digits, -1, -digits):  # the bits of the threshold, 16 at a time
        counts = torch.zeros(1 << digits, dtype=torch.int64)
        for key in keys:
            bits = _bits(key())
            if shift < width - digits:
                bits = bits[(bits >> (shift + digits)) == prefix]
            digit = (bits >> shift) & ((1 << digits) - 1)
            counts += torch.bincount(digit.long(), minlength=1 << digits).cpu()
        give_memory_back()
        if shift == width - digits:
            _check(count, int(counts[: int(infinity >> shift)].sum()))
        total = counts.cumsum(0) + below
        found = int(torch.searchsorted(total, count))
        below = int(total[found] - counts[found])
        prefix = (prefix << digits) | found
    ties = count - below
    for key in keys:
        made = key()
        bits = _bits(made)
        chosen = bits < prefix
        if ties:
            equal = (bits == prefix).nonzero().flatten()[:ties]
            chosen[equal] = True
            ties -= len(equal)
        yield chosen.reshape(made.shape)


def _bits(key: Tensor) -> Tensor:
    """Non-negative integers in the order of the keys, flat; the largest of all where a key is negative."""
    kind = torch.int64 if key.dtype == torch.float64 else torch.int32
    bits = (key + 0.0).flatten().view(kind)  # -0.0 becomes 0.0
    return bits.masked_fill_(bits < 0, torch.iinfo(kind).max)


class _Rows:
    """The ranks that may go in each row of a layer: from `first` on, `count` of them, both int64 [R]."""

    def __init__(self, keys: RankKeys) -> None:
        self.keys = keys
        scores = self._scores()
        self.length = scores.shape[1]
        self.first = (scores < 0).sum(1).cpu().numpy()
        self.count = self.length - self.first - (scores == torch.inf).sum(1).cpu().numpy()
        if keys.key(self.length - 1) == math.inf:
            self.count = np.zeros_like(self.first)

    def _scores(self) -> Tensor:
        """A row for all entries that are ranked together."""
        scores = self.keys.scores()
        return scores if self.keys.by_row else scores.reshape(1, -1)

    def up_to(self, limit: float) -> np.ndarray:
        """How many entries of each row may go and have a key <= limit."""
        if not self.count.any():
            return self.count
        share, before = self.keys.share, self.keys.before
        ranks = max(0, math.floor(min(limit * share, self.length - before) + before + 0.5))
        while ranks < self.length and self.keys.key(ranks) <= limit:  # where the line above was rounded
            ranks += 1
        while ranks and self.keys.key(ranks - 1) > limit:
            ranks -= 1
        return np.clip(ranks - self.first, 0, self.count)

    def smallest(self, goes: np.ndarray) -> Tensor:
        """The first goes[i] of these in each row i, bool in the shape of the scores."""
        scores = self._scores()
        chosen = smallest_units(scores, torch.from_numpy(self.first + goes)) & (scores >= 0)
        return chosen.reshape(self.keys.shape)


def _by_rank(keys: Sequence[RankKeys], count: int) -> Iterator[Tensor]:
    """Bisection for the largest key that goes; then how many go from each row, and which these are."""
    layers = []
    for key in keys:
        layers.append(_Rows(key))
        give_memory_back()
    _check(count, sum(int(layer.count.sum()) for layer in layers))
    low, high = 0, int(np.float64(np.finfo(np.float64).max).view(np.int64))
    while low < high:  # over the bit patterns of non-negative floats, which are ordered like the numbers
        middle = (low + high) // 2
        if sum(int(layer.up_to(_float(middle)).sum()) for layer in layers) >= count:
            high = middle
        else:
            low = middle + 1
    below = [layer.up_to(_float(low - 1)) if low else np.zeros_like(layer.first) for layer in layers]
    ties = count - sum(int(one.sum()) for one in below)
    for layer, goes in zip(layers, below, strict=True):
        more = layer.up_to(_float(low)) - goes
        goes = goes + np.clip(ties - (more.cumsum() - more), 0, more)
        ties = max(0, ties - int(more.sum()))
        yield layer.smallest(goes)
        give_memory_back()


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
