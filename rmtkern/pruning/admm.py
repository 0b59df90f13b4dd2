"""Which weights of one matrix go by the full second moment of its inputs: all at once, by alternating projections.

Slower than obs.obs_mask and with less loss, at every pattern; it returns a mask only.
"""

import torch
from torch import Tensor

from rmtkern.pruning.pattern import (
    PATTERNS,
    kth_smallest,
    smallest_units,
    unit_entries,
    unit_of,
    unit_scores,
    whole_units,
)
from rmtkern.pruning.products import product

__all__ = ["admm_mask"]

_STEPS, _PENALTY, _GROWTH = 35, 0.03, 1.18


def admm_mask(
    matrix: Tensor, moment: Tensor, start: Tensor, counts: Tensor, kind: str, params: dict[str, int]
) -> Tensor:
    """The zero pattern that loses least of the outputs, by the alternating direction method of multipliers.

    Minimises (v - w)ᵀ H (v - w) per row over v = d, where d has the pattern: v by a ridge regression towards d, d by
    dropping the units of v with the smallest squares, both in coordinates where H has a unit diagonal; the penalty on
    v - d grows from 0.03 by 1.18 for 35 steps.

    Args:
        matrix: [N, K], any float dtype.
        moment: [K, K] second moments of the inputs, positive definite (see repair.damped).
        start: bool [N, K]; what is zero already and stays so.
        counts: int64 [R]; units that are zero afterwards, with those of `start`: of the whole matrix (R = 1) or of each
            row of units (R = N / r). Not used for n:m, which says itself how many go.
        kind: key of PATTERNS.
        params: of the pattern.

    Returns:
        bool [N, K], true where a weight goes; `start` is part of it.

    Source: Meng et al. 2024, arXiv 2406.07831 (ALPS), algorithm 1, with a penalty that grows at a fixed rate.
    """
    scale = moment.diagonal().sqrt()
    values, vectors = torch.empty_like(scale), (moment / scale[:, None]).div_(scale).t()
    torch.linalg.eigh(vectors, out=(values, vectors))  # in place, as its columns lie in memory: a copy less
    whole, rows, columns = matrix.to(moment.dtype) * scale, vectors.t().contiguous(), vectors.contiguous()
    del vectors
    kept, dual, penalty, mask = whole, torch.zeros_like(whole), _PENALTY, start
    for step in range(1, _STEPS + 1):
        # v = (w H + penalty d - dual) (H + penalty)^-1, without w H, whose rounding the inverse would enlarge
        pull = (kept - whole).mul_(penalty).sub_(dual)
        if step == 1:
            free = whole  # there is no pull yet
        elif len(matrix) > len(moment):  # then one product with the inverse costs less, with what the inverse costs
            free = product(pull, product(columns / (values + penalty), columns)).add_(whole)
        else:
            free = product(product(pull, rows).div_(values + penalty), columns).add_(whole)
        shifted = torch.add(free, dual, alpha=1 / penalty)
        mask = _project(shifted, start, counts, kind, params, exact=step == _STEPS)
        kept = shifted.masked_fill(mask, 0)
        dual.add_(free, alpha=penalty).sub_(kept, alpha=penalty)
        penalty *= _GROWTH
    return mask


def _project(
    values: Tensor, start: Tensor, counts: Tensor, kind: str, params: dict[str, int], *, exact: bool
) -> Tensor:
    """The units of least square that go; not `exact`: of equal ones at the threshold all may go."""
    unit = unit_of(params)
    gone = whole_units(start, unit)
    scores = unit_scores(values.square().masked_fill(start, 0), unit).masked_fill(gone, -1.0)
    if kind == "n:m":
        return start | unit_entries(PATTERNS[kind](scores, params), unit)
    scores = scores.reshape(len(counts), -1)
    count = int(counts[0])
    if exact or len(counts) > 1:
        goes = smallest_units(scores, counts)
    elif count == 0:
        goes = torch.zeros_like(scores, dtype=torch.bool)
    else:
        goes = scores <= kth_smallest(scores, count)
    return start | unit_entries(goes.reshape(gone.shape), unit)
