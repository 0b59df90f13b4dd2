"""What every entry of every weight costs the model's outputs: its own layer's loss times what that layer is worth.

It measures on the dense model; a budget says what follows from it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.models import PrunableWeight
from rmtkern.progress import progress
from rmtkern.pruning.calibrate import evaluating, forward_passes, output_gradients, second_moments
from rmtkern.pruning.memory import give_memory_back
from rmtkern.pruning.repair import damped, definite
from rmtkern.pruning.stages import Call, Stage, find_stages
from rmtkern.pruning.visit import visit_stages
from rmtkern.ranks import Ranks

__all__ = ["Sensitivity", "sensitivities"]

_FLOOR = 1e-3
_ENOUGH = 8


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of one weight [N, K].

    Args:
        rows: [N] float32, > 0: how much the model's outputs change, in squares, with each output of the weight.
        columns: [G, K] float32, > 0: how much an output changes, in squares, with each entry if the others make up for
            it as well as they can; G > 1 where blocks of rows see different inputs.
    """

    rows: Tensor
    columns: Tensor

    def of(self, matrix: Tensor) -> Tensor:
        """rows_n w_nk^2 columns_k, [N, K] float32, >= 0: what the model loses if one entry goes and no other."""
        columns = self.columns.repeat_interleave(len(matrix) // len(self.columns), 0)
        return matrix.float().square() * columns * self.rows[:, None]

    def weighted(self, matrix: Tensor) -> Tensor:
        """The matrix [N, K] with its rows times the root of what they are worth, 1 in the mean of squares."""
        return matrix * (self.rows / self.rows.mean()).sqrt().to(matrix.dtype)[:, None]


def sensitivities(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    images: Tensor | Iterable[Any],
    *,
    show_progress: bool | None = None,
) -> dict[str, Sensitivity]:
    """Measure on calibration images what the entries of some weights cost the outputs of the model.

    One pass backward over a part of the images, and one forward, block by block, over as many as it takes until each
    block has seen 8 inputs for each entry. The model is not changed.

    Args:
        model: runs its layers in one order, whatever the batch; differentiable.
        weights: of the model.
        images: as for calibrate.calibrate; can be read twice.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        One for each weight, by name. An output on which the model's outputs do not depend counts as 1e-3 of the mean of
        its weight; a weight without any, as the least of all weights.

    Raises:
        TypeError: a batch of another type.
        NoGradientsError: the model's outputs have no gradients.
        ValueError: no image, inputs or gradients with NaN or Inf, a weight that no image reaches, batches that the
            model treats differently, or second moments that stay singular.

    Source: docs/calibrated.md; one entry's loss w^2 / [H^-1]_kk is Hassibi and Stork 1993.
    """
    ranks = Ranks.current()
    gradients = output_gradients(model, weights, images)
    give_memory_back()
    rows = {name: found[0] for name, found in gradients.features.items()}
    wanted = max(_ENOUGH * weight.shape[1] * gradients.images / gradients.inputs[weight.name] for weight in weights)
    least = min((float(one.mean()) for one in rows.values() if bool(one.any())), default=1.0)
    columns: dict[str, Tensor] = {}
    steps = iter(progress(range(len(weights)), "measure layer by layer", show=show_progress))

    def runs() -> Iterator[Any]:
        seen = 0
        for run, count in forward_passes(model, images, ranks=ranks):
            yield run
            seen += count
            if seen * ranks.world >= wanted:
                return

    def visit(stage: Stage, calls: list[Call]) -> list[Any]:
        moments, outputs = second_moments(stage, calls, enough=_ENOUGH)
        give_memory_back()
        for name in list(moments):
            columns[name] = _columns(damped(moments.pop(name)))
            give_memory_back()
            next(steps, None)
        return outputs

    with torch.no_grad(), evaluating(model):
        visit_stages(find_stages(model, weights), runs(), visit)
    next(steps, None)
    found = {name: Sensitivity(_floored(one, least).to(columns[name]), columns[name]) for name, one in rows.items()}
    for one in found.values():  # where roundings of other machines may differ, and budgets go by every bit
        ranks.share_(one.rows)
        ranks.share_(one.columns)
    return found


def _floored(rows: Tensor, least: float) -> Tensor:
    mean = float(rows.mean())
    return rows.clamp(min=_FLOOR * mean) if mean > 0 else torch.full_like(rows, least)


def _columns(moments: Tensor) -> Tensor:
    """1 / [H^-1]_kk of each [K, K], float32."""
    with definite():
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return 1 / inverse.diagonal(dim1=-2, dim2=-1).float()
