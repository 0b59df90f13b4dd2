"""An order of columns in which n:m groups lose little: dear ones are dealt to different groups, then swapped.

It knows costs of entries, and neither channels nor models.
"""

import torch
from torch import Tensor

__all__ = ["group_loss", "spread_columns"]

_ROUNDS = 48
_ENOUGH = 1e-4


def spread_columns(costs: Tensor, n: int, m: int) -> Tensor:
    """An order of the columns of [N, K] in which groups of m neighbours lose little if each row keeps its n dearest.

    Columns are sorted by their sums and dealt out, one of each of m equal parts to a group. Then groups are paired at
    random, and each pair swaps the two columns that lower its loss most, if any does; at most 48 times, or until one
    round gains less than 1e-4 of the loss. Where all of this does not better the order as it is, that stays.

    Args:
        costs: [N, K] float32, >= 0: what each entry costs if it goes; K divisible by m.
        n: entries of a group that stay in each row, 1 <= n < m.
        m: columns in a group.

    Returns:
        int64 [K]: column order[i] goes to place i.

    Source: arXiv 2606.02608, alignment of channels for k:n patterns (the deal); Pool and Yu 2021, "Channel Permutations
    for N:M Sparsity" (swaps between groups).
    """
    count = costs.shape[1] // m
    identity = torch.arange(costs.shape[1], device=costs.device)
    order = costs.sum(0).argsort(descending=True, stable=True).reshape(m, count).t().flatten()
    generator = torch.Generator().manual_seed(0)
    loss = group_loss(costs[:, order], n, m)
    for _ in range(_ROUNDS if count > 1 else 0):
        pairs = torch.randperm(count, generator=generator)[: count // 2 * 2].reshape(2, -1).to(costs.device)
        gain = _swap_(order, costs, pairs, n, m)
        loss -= gain
        if gain <= _ENOUGH * loss:
            break
    return order if group_loss(costs[:, order], n, m) < group_loss(costs, n, m) else identity


def group_loss(costs: Tensor, n: int, m: int) -> float:
    """What goes, summed over rows and groups, if each row keeps the n dearest of each group of m columns of [N, K]."""
    groups = costs.reshape(len(costs), -1, m)
    return float(groups.sum(dtype=torch.float64) - groups.topk(n, dim=2).values.sum(dtype=torch.float64))


def _swap_(order: Tensor, costs: Tensor, pairs: Tensor, n: int, m: int) -> float:
    """Swap one column between the groups of each pair [2, P] where that keeps more; returns how much more in all."""
    places = order.reshape(-1, m)
    first, second = places[pairs[0]], places[pairs[1]]
    one, other = (costs[:, part.flatten()].reshape(-1, *part.shape) for part in (first, second))
    (kept, rest, least), (kept2, rest2, least2) = _without(one, n), _without(other, n)
    # a group without column i that gets x keeps `rest_i + max(least_i, x)`
    base = rest.sum(0)[:, :, None] + rest2.sum(0)[:, None, :] - (kept + kept2)[:, None, None]
    gains = torch.stack(
        [
            torch.maximum(least[:, :, i, None], other).sum(0) + torch.maximum(least2, one[:, :, i, None]).sum(0)
            for i in range(m)
        ],
        dim=1,
    )
    best, at = (gains + base).flatten(1).max(1)
    helps = best > 0
    i, j, where = at[helps] // m, at[helps] % m, pairs[:, helps]
    places[where[0], i], places[where[1], j] = places[where[1], j], places[where[0], i]
    return float(best[helps].sum())


def _without(groups: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups [N, P, m]: what each keeps, [P], and what it is without each column, both [N, P, m].

    The latter are the sum of the n - 1 dearest of the other columns, and the n-th of them.
    """
    values, ranks = groups.sort(dim=2, descending=True)
    last, after = values[..., n - 1 : n], values[..., n : n + 1]
    kept = values[..., :n].sum(2, keepdim=True)
    inside = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, ranks[..., :n], True)
    # of the n dearest, the others are left, and the next one follows; of the rest, all but the last of the n come first
    return kept.sum((0, 2)), torch.where(inside, kept - groups, kept - last), torch.where(inside, after, last)
