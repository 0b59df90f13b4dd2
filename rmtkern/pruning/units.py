"""Which inputs of a weight go, whole columns in groups: by least squares with repair, or by norms without images.

It knows a matrix and moments, and neither what a unit is in a model nor how many go.
"""

import torch
from torch import Tensor

__all__ = ["loss_share", "norm_units", "remove_units"]

_STEPS = 256


def norm_units(matrix: Tensor, producers: list[Tensor], size: int, count: int) -> Tensor:
    """The units of least norm: of their columns, times that of their rows in every producer.

    Args:
        matrix: [N, units size] weight that takes the units.
        producers: [units, D] each: what makes the units, all rows of one unit in a row here.
        size: columns for each unit.
        count: how many go, < units.

    Returns:
        int64 [count], ascending.
    """
    norms = matrix.float().square().sum(0).reshape(-1, size).sum(1).sqrt()
    for producer in producers:
        norms = norms * producer.float().square().sum(1).sqrt()
    return norms.argsort(stable=True)[:count].sort().values


def remove_units(matrix: Tensor, moment: Tensor, units: int, count: int, size: int = 1) -> tuple[Tensor, Tensor]:
    """The units whose removal loses least of the outputs when the others make up for them, one after the other.

    A unit of columns J costs tr(W_J ([H^-1]_JJ)^-1 W_Jᵀ). After each step W and H^-1 are those of the columns that are
    left, repaired: the same zeros in every row leave one elimination, where repair.obs solves for each row. Of many
    units a few go in one step, so that there are at most 256.

    Args:
        matrix: [N, K], any float dtype; of its K columns the first units x size belong to units, the others stay.
        moment: [K, K] second moments of the inputs, positive definite (see repair.damped).
        units: how many there are.
        count: how many go.
        size: columns for each unit, >= 1.

    Returns:
        The units that go, int64 [count], ascending; the repaired matrix [N, K], float64, exactly 0 in their columns.

    Source: Hassibi and Stork 1993; for units, Kurtic, Frantar and Alistarh 2023 (ZipLM), arXiv 2302.04089.
    """
    values = matrix.double()
    inverse = torch.linalg.inv(moment.double())
    width = units * size
    offsets = torch.arange(size, device=matrix.device)
    left = torch.ones(units, dtype=torch.bool, device=matrix.device)
    step = max(1, -(-units // _STEPS))
    while (missing := count - int((~left).sum())) > 0:
        costs = _costs(values[:, :width], inverse[:width, :width], units, size).masked_fill(~left, float("inf"))
        goes = costs.argsort(stable=True)[: min(step, missing)]
        left[goes] = False
        columns = (goes[:, None] * size + offsets).flatten()
        right = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        values = values - values[:, columns] @ right
        inverse -= inverse[:, columns] @ right
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
        values[:, columns] = 0
    return (~left).nonzero().flatten(), values


def _costs(values: Tensor, inverse: Tensor, units: int, size: int) -> Tensor:
    """What each unit's removal loses, [units]."""
    if size == 1:
        return values.square().sum(0) / inverse.diagonal()
    own = inverse.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = values.reshape(len(values), units, size).permute(1, 2, 0)
    return (parts * torch.linalg.solve(own, parts)).sum((1, 2))


def loss_share(before: Tensor, after: Tensor, moment: Tensor) -> float:
    """The mean square of what a weight's output changes over that of the output: tr(D H Dᵀ) / tr(W H Wᵀ).

    Args:
        before: [N, K].
        after: [N, K], the same columns; zero where they went.
        moment: [K, K] of the inputs.
    """
    wide, change, inputs = before.double(), (after - before).double(), moment.double()
    whole = float(((wide @ inputs) * wide).sum())
    return float(((change @ inputs) * change).sum()) / whole if whole > 0 else 0.0
