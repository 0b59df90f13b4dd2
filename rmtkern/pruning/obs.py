"""Which weights of one matrix go by the full second moment of its inputs: the Optimal Brain Surgeon, column by column.

It chooses and moves on as if what it removed were repaired in the columns to the right; it returns a mask only.
"""

import torch
from torch import Tensor

from rmtkern.pruning.pattern import PATTERNS, smallest_units, unit_entries, unit_of, unit_scores, whole_units
from rmtkern.pruning.repair import definite

__all__ = ["obs_mask"]

_WIDTH = 128


def obs_mask(
    matrix: Tensor, moment: Tensor, start: Tensor, counts: Tensor, kind: str, params: dict[str, int]
) -> Tensor:
    """The zero pattern that loses least of the outputs, one block of 128 columns after the other.

    In a block, the loss of a weight is w_j^2 / [H^-1]_jj, with H over the columns from j on; that of a mini-block is
    the sum over its rows of w_Jᵀ ([H^-1]_JJ)^-1 w_J. What goes is made up for in the columns to its right, on a copy.

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

    Raises:
        ValueError: `moment` is not positive definite.

    Source: Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1; units of two columns as in Hassibi and Stork 1993.
    """
    unit, columns = unit_of(params), matrix.shape[1]
    with definite():
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    weight = matrix.to(moment.dtype, copy=True)
    mask = start.clone()
    step = params.get("m", unit[1])
    width = max(1, _WIDTH // step) * step if kind != "n:m" else step
    open_ = ~whole_units(start, unit)
    left = counts - (~open_).reshape(len(counts), -1).sum(1)
    for first in range(0, columns, width):
        last = min(columns, first + width)
        part, factor = weight[:, first:last], upper[first:last, first:last]
        if kind == "n:m":
            loss = unit_scores((part / factor.diagonal()).square().masked_fill(start[:, first:last], 0.0), unit)
            loss = loss.masked_fill(whole_units(start[:, first:last], unit), -1.0)
            mask[:, first:last] |= unit_entries(PATTERNS[kind](loss, params), unit)
        else:
            at, to = first // unit[1], last // unit[1]
            here = open_[:, at:to].reshape(len(counts), -1)
            loss = _losses(part, factor, unit).reshape(len(counts), -1).masked_fill(~here, torch.inf)
            rest = open_[:, at:].reshape(len(counts), -1).sum(1)
            take = torch.where(rest > 0, (left * here.sum(1) / rest).round().long(), 0)
            left = left - take
            goes = smallest_units(loss, take).reshape(-1, to - at)
            mask[:, first:last] |= unit_entries(goes, unit)
        errors = _eliminate_(part, factor, mask[:, first:last])
        weight[:, last:] -= errors @ upper[first:last, last:]
    return mask


def _losses(part: Tensor, factor: Tensor, unit: tuple[int, int]) -> Tensor:
    """What each unit [N / r, B / c] of a block of columns costs, the columns to its left being fixed."""
    r, c = unit
    rows, groups = len(part) // r, part.shape[1] // c
    # H^-1 of the columns from a unit on, restricted to the unit, is UᵀU of the unit's own c x c part of U
    own = factor.reshape(groups, c, groups, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    values = part.reshape(-1, groups, c).transpose(0, 1)  # [groups, N, c]; w (UᵀU)^-1 wᵀ = |w U^-1|^2
    solved = torch.linalg.solve_triangular(own, values, upper=True, left=False)
    return solved.square().sum(2).t().reshape(rows, r, groups).sum(1)


def _eliminate_(part: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
    """Set the masked columns of a block to zero one by one, in place; returns what the columns to the right owe."""
    errors = torch.zeros_like(part)
    for j in range(part.shape[1]):
        errors[:, j] = torch.where(mask[:, j], part[:, j], 0) / factor[j, j]
        part[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
    return errors
