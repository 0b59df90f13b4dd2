"""In what shape entries go: which of them a pattern lets go, alone or in mini-blocks. Knows no budget."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "PATTERNS", "SPIKES", "coarsest", "divides", "kth_smallest", "parse_pattern", "pattern_name", "smallest_units",
    "unit_entries", "unit_of", "unit_scores", "whole_units",
]  # fmt: skip


def unstructured(score: Tensor, params: dict[str, int]) -> Tensor:
    """Any entry may go; returns bool [N, K]."""
    return torch.ones_like(score, dtype=torch.bool)


def n_of_m(score: Tensor, params: dict[str, int]) -> Tensor:
    """At most n of m consecutive inputs stay: the m - n entries of lowest score in each group may go.

    Args:
        score: [N, K], K divisible by m; equal scores go in order of index.
        params: {"n": n, "m": m}, 1 <= n < m.

    Returns:
        bool [N, K] with exactly m - n entries true in each group.
    """
    n, m = params["n"], params["m"]
    groups = score.reshape(score.shape[0], -1, m)
    order = groups.argsort(dim=-1, stable=True)
    may_go = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], True)
    return may_go.reshape(score.shape)


PATTERNS: dict[str, Callable[[Tensor, dict[str, int]], Tensor]] = {
    "unstructured": unstructured,
    "n:m": n_of_m,
    "rxc": unstructured,
}
"""Name -> function(score of the units, params) -> the units that may go, bool. A unit is an entry, or a mini-block."""

SPIKES = "spectral"
"""In the place of a pattern: spikes become low-rank factors, and what they leave is pruned without a pattern."""

_SIDES = (16, 32, 64, 128)
"""Outputs and inputs of the blocks that are larger than mini-blocks: what GPU kernels multiply as tiles."""


def unit_of(params: dict[str, int]) -> tuple[int, int]:
    """(outputs, inputs) that go or stay together: (r, c) of mini-blocks, (r, 1) of n:mxr, else (1, 1)."""
    return params.get("r", 1), params.get("c", 1)


def divides(pattern: str, shape: tuple[int, int]) -> bool:
    """Whether a weight [N, K] consists of whole mini-blocks, or groups, of a pattern."""
    _, params = parse_pattern(pattern)
    r, c = unit_of(params)
    return shape[0] % r == 0 and shape[1] % params.get("m", c) == 0


def coarsest(patterns: Sequence[str]) -> str:
    """The pattern with the most entries in a mini-block, n:m before none; of equal ones, the first."""
    params = {pattern: parse_pattern(pattern)[1] for pattern in patterns}
    return max(patterns, key=lambda pattern: (math.prod(unit_of(params[pattern])), bool(params[pattern])))


def unit_scores(score: Tensor, unit: tuple[int, int]) -> Tensor:
    """Scores of the units [N / r, K / c]: the mean over each unit's entries."""
    return score if unit == (1, 1) else _units(score, unit).mean((1, 3))


def whole_units(mask: Tensor, unit: tuple[int, int]) -> Tensor:
    """Which units are true in all their entries, bool [N / r, K / c]."""
    return mask if unit == (1, 1) else _units(mask, unit).all(3).all(1)


def unit_entries(mask: Tensor, unit: tuple[int, int]) -> Tensor:
    """A mask of units [N / r, K / c] as a mask of entries [N, K]."""
    return mask if unit == (1, 1) else mask.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)


def smallest_units(scores: Tensor, counts: Tensor) -> Tensor:
    """The counts[i] smallest scores of each row i of [R, U], bool [R, U]; equal scores in order of index."""
    if len(counts) == 1 and 0 < (count := int(counts[0])) <= scores.shape[1]:
        limit = kth_smallest(scores, count)
        chosen = scores < limit
        ties = (scores[0] == limit).nonzero().flatten()[: count - int(chosen.sum())]
        chosen[0, ties] = True
        return chosen
    first = torch.arange(scores.shape[1], device=scores.device) < counts.to(scores.device)[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(dim=1, stable=True), first)


def kth_smallest(values: Tensor, k: int) -> float:
    """The k-th smallest of all values, k >= 1; no NaN."""
    flat = values.flatten()
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        return float(np.partition(flat.numpy(), k - 1)[k - 1])  # takes less than half of the time of kthvalue
    return float(flat.kthvalue(k).values)


def _units(matrix: Tensor, unit: tuple[int, int]) -> Tensor:
    (n, k), (r, c) = matrix.shape, unit
    return matrix.reshape(n // r, r, k // c, c)


def parse_pattern(pattern: str) -> tuple[str, dict[str, int]]:
    """The key of PATTERNS and the parameters that a pattern's name stands for.

    Args:
        pattern: "unstructured"; n:m such as "2:4" (at most 2 of 4 consecutive inputs stay); n:mxr such as "2:4x4" (the
            same inputs stay in 4 consecutive outputs); or rxc such as "4x1" (mini-blocks of 4 outputs x 1 input go or
            stay whole) or "32x32" (so do blocks).

    Raises:
        TypeError: not a string.
        ValueError: unknown pattern, n not in [1, m), r not in [2, 64], or a block of fewer than 2 or more than 64
            entries whose sides are not among 16, 32, 64 and 128.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: expected a string, got {type(pattern).__name__}")
    if pattern == "unstructured":
        return pattern, {}
    if match := re.fullmatch(r"(\d+)x(\d+)", pattern):
        r, c = int(match[1]), int(match[2])
        if not (2 <= r * c <= 64 or (r in _SIDES and c in _SIDES)):
            raise ValueError(
                f"pattern {pattern!r}: expected mini-blocks of 2 to 64 entries, such as '4x1', or blocks with sides of "
                f"{', '.join(map(str, _SIDES))}, such as '32x32'"
            )
        return "rxc", {"r": r, "c": c}
    match = re.fullmatch(r"(\d+):(\d+)(?:x(\d+))?", pattern)
    if match is None:
        raise ValueError(
            f"unknown pattern {pattern!r}; expected 'unstructured', n:m such as '2:4', n:mxr such as '2:4x4' or rxc"
            " such as '4x1'"
        )
    n, m, r = int(match[1]), int(match[2]), int(match[3] or 1)
    if not 1 <= n < m:
        raise ValueError(f"pattern {pattern!r}: expected 1 <= n < m, such as '2:4'")
    if match[3] is None:
        return "n:m", {"n": n, "m": m}
    if not 2 <= r <= 64:
        raise ValueError(f"pattern {pattern!r}: expected 2 to 64 outputs that share a pattern, such as '2:4x4'")
    return "n:m", {"n": n, "m": m, "r": r}


def pattern_name(params: Mapping[str, int]) -> str:
    """The inverse of `parse_pattern`: the name of the pattern with these parameters; {"rank": R}: SPIKES."""
    if "rank" in params:
        return SPIKES
    if "n" in params:
        return f"{params['n']}:{params['m']}" + (f"x{params['r']}" if "r" in params else "")
    return f"{params['r']}x{params['c']}" if params else "unstructured"
