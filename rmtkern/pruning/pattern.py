"""In what shape entries go: which of them a pattern lets go, given their scores. Knows no budget."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PATTERNS", "parse_pattern"]


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


PATTERNS: dict[str, Callable[[Tensor, dict[str, int]], Tensor]] = {"unstructured": unstructured, "n:m": n_of_m}
"""Name -> function(score [N, K], params) -> the entries that may go, bool [N, K]."""


def parse_pattern(pattern: str) -> tuple[str, dict[str, int]]:
    """The key of PATTERNS and the parameters that a pattern's name stands for.

    Args:
        pattern: "unstructured", or n:m such as "2:4" (at most 2 of 4 consecutive inputs stay).

    Raises:
        TypeError: not a string.
        ValueError: unknown pattern, or n not in [1, m).
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: expected a string, got {type(pattern).__name__}")
    if pattern == "unstructured":
        return pattern, {}
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f"unknown pattern {pattern!r}; expected 'unstructured' or n:m such as '2:4'")
    n, m = int(match[1]), int(match[2])
    if not 1 <= n < m:
        raise ValueError(f"pattern {pattern!r}: expected 1 <= n < m, such as '2:4'")
    return "n:m", {"n": n, "m": m}
