"""Which weights of one matrix go in n:m groups by what each group's removed weights cost together: CAST.

It sees no further than a group and changes no weight that stays; it returns a mask only.
"""

from functools import partial
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from rmtkern.pruning.pattern import smallest_units, unit_entries, unit_of, whole_units

__all__ = ["cast_mask"]

_ENUMERATED = 20_000
_FLOATS = 1 << 22


def cast_mask(
    matrix: Tensor,
    moment: Tensor,
    start: Tensor,
    counts: Tensor,
    kind: str,
    params: dict[str, int],
    *,
    prior: Tensor | None = None,
    alpha: float = 0.5,
) -> Tensor:
    """The n:m pattern whose removed weights change the outputs least, group by group (certificate-aware projection).

    In row i and group g, with d = 1 for what goes (m - n entries) and 0 for what stays, the least dᵀ A d with A_ab =
    w_a w_b E[x_a x_b], summed over the rows that share a pattern. A prior adds `alpha` times the mean of dᵀ A d over
    all patterns for each entry that differs from it; the sum is quadratic in d too. Up to 20,000 patterns (every m up
    to 16) are all compared; of more, swaps of two entries descend from the m - n smallest of diag(A) while one helps.

    Args:
        matrix: [N, K], any float dtype; K divisible by m.
        moment: [K, K] second moments of the inputs, positive semidefinite, not damped.
        start: bool [N, K]; what is zero already and stays so.
        counts: not used; the pattern says itself how many go.
        kind: "n:m".
        params: of the pattern.
        prior: bool [N, K], true where another method's mask lets a weight go, in any pattern; None: no prior.
        alpha: what the prior is worth, >= 0; without a prior it has no effect, as every pattern has m - n zeros.

    Returns:
        bool [N, K], true where a weight goes; `start` is part of it, and counts towards m - n.

    Raises:
        ValueError: another pattern than n:m.

    Source: docs/math.md (29); arXiv 2606.02608, CAST.
    """
    if kind != "n:m":
        raise ValueError(f"score 'cast' compares whole n:m groups, got a pattern of kind {kind!r}; take one like '2:4'")
    m, goes, unit = params["m"], params["m"] - params["n"], unit_of(params)
    groups, patterns = matrix.shape[1] // m, comb(m, goes)
    blocks = moment.reshape(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    values = matrix.to(moment.dtype).masked_fill(start, 0)
    width, choose = m * m, partial(_descend, goes=goes)
    if patterns <= _ENUMERATED:
        table = _patterns(m, goes, matrix.device)
        width, choose = max(width, patterns), partial(_enumerate, table=table, products=_products(table, values.dtype))
    step = max(1, _FLOATS // (groups * width)) * unit[0]
    chosen = []
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        wanted = None if prior is None else prior[rows]
        costs = _quadratic(values[rows], blocks, start[rows], params, wanted, alpha).flatten(0, 1)
        chosen.append(choose(costs).reshape(-1, groups * m))
    return start | unit_entries(torch.cat(chosen), unit)


def _quadratic(
    values: Tensor, blocks: Tensor, start: Tensor, params: dict[str, int], prior: Tensor | None, alpha: float
) -> Tensor:
    """A of every group, [N / r, G, m, m]: dᵀ A d is what it costs that d goes, up to a constant."""
    groups, m, _ = blocks.shape
    unit = unit_of(params)
    shape = (-1, unit[0], groups, m)
    parts = values.reshape(shape)
    costs = torch.einsum("irga,irgb->igab", parts, parts) * blocks
    diagonal = costs.diagonal(dim1=2, dim2=3)
    if prior is not None:
        mean = _mean_cost(costs, m - params["n"])
        scale = torch.where(mean > 0, mean, 1.0)  # where nothing costs anything, the prior decides
        # d differs from p in d (1 - 2 p) + p entries
        diagonal += alpha * scale[..., None] * (1 - 2 * prior.to(values.dtype)).reshape(shape).sum(1)
    gone = whole_units(start, unit).reshape(-1, groups, m)
    if bool(gone.any()):
        size = costs.abs().sum((2, 3))  # no choice of the others saves more than twice that
        diagonal -= gone * torch.where(size > 0, 3 * size, 1.0)[..., None]
    return costs


def _mean_cost(costs: Tensor, goes: int) -> Tensor:
    """The mean of dᵀ A d over all d with so many ones, from E d_a = q / m and E d_a d_b = q (q - 1) / (m (m - 1))."""
    m = costs.shape[-1]
    trace = costs.diagonal(dim1=-2, dim2=-1).sum(-1)
    rest = costs.sum((-2, -1)) - trace
    return goes / m * trace + goes * (goes - 1) / (m * (m - 1)) * rest


def _patterns(m: int, goes: int, device: torch.device) -> Tensor:
    """All choices of `goes` out of m, bool [P, m]; of equal cost the first is taken, which drops the lower indices."""
    chosen = torch.tensor(list(combinations(range(m), goes)), device=device)
    return torch.zeros(len(chosen), m, dtype=torch.bool, device=device).scatter_(1, chosen, True)


def _products(table: Tensor, dtype: torch.dtype) -> Tensor:
    """d_a d_b of patterns [P, m] for a <= b, twice where a < b: [m (m + 1) / 2, P]."""
    a, b = torch.triu_indices(table.shape[1], table.shape[1], device=table.device)
    return ((table[:, a] & table[:, b]).to(dtype) * torch.where(a == b, 1, 2)).t().contiguous()


def _enumerate(costs: Tensor, *, table: Tensor, products: Tensor) -> Tensor:
    """The pattern of `table` that costs least for each of [C, m, m], bool [C, m]: one matrix product for all."""
    a, b = torch.triu_indices(table.shape[1], table.shape[1], device=table.device)
    return table[(costs[:, a, b] @ products).argmin(1)]


def _descend(costs: Tensor, *, goes: int) -> Tensor:
    """A choice of `goes` out of m for each of [C, m, m] that no swap of two entries betters, bool [C, m]."""
    diagonal = costs.diagonal(dim1=1, dim2=2)
    chosen = smallest_units(diagonal, torch.full((len(costs),), goes, device=costs.device))
    least = 8 * torch.finfo(costs.dtype).eps * costs.abs().sum((1, 2))  # more than the change is off by rounding
    going = torch.arange(len(costs), device=costs.device)
    while len(going):
        a, d, now = costs[going], diagonal[going], chosen[going]
        slope = 2 * (a @ now.to(a.dtype)[:, :, None])[:, :, 0]
        change = (d + slope)[:, :, None] + (d - slope)[:, None, :] - 2 * a  # the first goes, the second stays
        change = change.masked_fill_(now[:, :, None] | ~now[:, None, :], torch.inf)
        best, at = change.flatten(1).min(1)
        helps = best < -least[going]
        going, at = going[helps], at[helps]
        chosen[going, at // costs.shape[-1]] = True
        chosen[going, at % costs.shape[-1]] = False
    return chosen
