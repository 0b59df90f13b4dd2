"""Layer by layer over calibration images: each weight is chosen and repaired for the inputs that the pruned ones give.

It joins stages, second moments, obs and repair; what goes from each layer is decided before (cycles).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.models import PrunableWeight
from rmtkern.progress import progress
from rmtkern.pruning.admm import admm_mask
from rmtkern.pruning.calibrate import evaluating, forward_passes, second_moment, weights_in_order
from rmtkern.pruning.cast import cast_mask
from rmtkern.pruning.memory import give_memory_back
from rmtkern.pruning.obs import obs_mask
from rmtkern.pruning.pattern import parse_pattern, unit_of, whole_units
from rmtkern.pruning.plan import PruneConfig
from rmtkern.pruning.pruned import Pruned
from rmtkern.pruning.repair import REPAIRS, damped
from rmtkern.pruning.score import GROUPED
from rmtkern.pruning.sensitivity import Sensitivity
from rmtkern.pruning.stages import Call, Stage, find_stages
from rmtkern.pruning.visit import visit_stages
from rmtkern.ranks import Ranks

__all__ = ["MASKS", "prune_layerwise"]

MASKS: dict[str, Callable[..., Tensor]] = {"obs": obs_mask, "admm": admm_mask, "cast": cast_mask}
"""Score that is known layer by layer -> function(matrix, moment, start, counts, kind, params) -> mask [N, K]; those of
score.GROUPED take prior and alpha too."""

_UNDAMPED = ("cast",)
"""The scores that invert no second moment and take it as it is."""


def prune_layerwise(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    config: PruneConfig,
    chosen: Sequence[Pruned],
    images: Tensor | Iterable[Any],
    *,
    patterns: Mapping[str, str] | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    priors: Sequence[Pruned] | None = None,
    show_progress: bool | None = None,
) -> tuple[list[Pruned], int]:
    """Choose (scores of MASKS) and repair every weight for the inputs that the layers pruned before it give.

    The model runs once over the images, block by block. Until a block is passed it holds its pruned weights (with a
    score of score.GROUPED and no repair, those of before); at the end, and if anything fails, it is bit for bit as it
    was.

    Args:
        model: runs its layers in one order, whatever the batch.
        weights: of the model.
        config: resolved, with a score of MASKS or a repair other than "none".
        chosen: one for each weight: the mask, or with a score of MASKS how many units go from each weight (with budget
            "row", from each row).
        images: as for calibrate.calibrate.
        patterns: weight name -> its pattern, where the config has several.
        sensitivities: weight name -> what its outputs are worth against each other; None: all the same.
        priors: for each weight the mask to stay close to, for a score of score.GROUPED; None: no prior.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        What each weight becomes, and the number of images.

    Raises:
        TypeError: a batch of another type.
        ValueError: no image, inputs with NaN or Inf, a weight that no image reaches, batches that the model treats
            differently.
    """
    masks = {weight.name: one for weight, one in zip(weights, chosen, strict=True)}
    near = {weight.name: one for weight, one in zip(weights, priors or [], strict=priors is not None)}
    alone = config.score in GROUPED and config.repair == "none"  # as published; see docs/calibrated.md
    found: dict[str, Pruned] = {}
    stages = find_stages(model, weights)
    steps = iter(progress(range(len(weights)), "prune layer by layer", show=show_progress))
    seen, ranks = 0, Ranks.current()

    def runs() -> Iterator[Any]:
        nonlocal seen
        for run, count in forward_passes(model, images, ranks=ranks):
            seen += count
            yield run

    with torch.no_grad(), evaluating(model), _restored() as before:

        def visit(stage: Stage, calls: list[Call]) -> None:
            for weight, uses in weights_in_order(stage, calls[0]):
                moments = [second_moment(stage, weight, uses, calls)]  # taken out below, so that it can go
                give_memory_back()
                prior, cost = near.get(weight.name), (sensitivities or {}).get(weight.name)
                mask, matrix = _prune(
                    weight, masks[weight.name].mask(), moments.pop(), config, cost,
                    None if prior is None else prior.mask(),
                    pattern=config.patterns[0] if patterns is None else patterns[weight.name],
                )  # fmt: skip
                if alone:
                    found[weight.name] = Pruned.of(mask, matrix)
                else:
                    before[weight.name] = weight, weight.parameter.detach().clone()
                    weight.parameter.copy_(weight.to_parameter(matrix))
                del mask, matrix
                give_memory_back()
                next(steps, None)

        def leave(stage: Stage) -> None:
            for weight in stage.weights:
                if weight.name in before:
                    matrix = weight.as_matrix()
                    found[weight.name] = Pruned.of(matrix == 0, matrix)
                    weight.parameter.copy_(before[weight.name][1])
                    del before[weight.name]

        visit_stages(stages, runs(), visit, leave)
        next(steps, None)
    return [found[weight.name] for weight in weights], int(ranks.total([seen])[0])


@contextmanager
def _restored() -> Iterator[dict[str, tuple[PrunableWeight, Tensor]]]:
    """Weights and their values, to be put back into those that are still in it at the end, whatever happens."""
    before: dict[str, tuple[PrunableWeight, Tensor]] = {}
    try:
        yield before
    finally:
        for weight, value in before.values():
            weight.parameter.copy_(value)


def _prune(
    weight: PrunableWeight,
    chosen: Tensor,
    moments: Tensor,
    config: PruneConfig,
    cost: Sensitivity | None,
    prior: Tensor | None,
    *,
    pattern: str,
) -> tuple[Tensor, Tensor]:
    """One weight's mask and repaired matrix, block by block of the rows that see inputs of their own."""
    matrix, kind_params = weight.as_matrix(), parse_pattern(pattern)
    mask, undamped, moments = chosen, moments if config.score in _UNDAMPED else None, damped(moments)
    if config.score in MASKS:
        seen = moments if undamped is None else undamped
        r, _ = unit_of(kind_params[1])
        aligned = seen if len(matrix) // len(seen) % r == 0 else seen.mean(0, keepdim=True)
        valued = matrix if cost is None else cost.weighted(matrix)
        count = len(aligned)
        priors = [None] * count if prior is None else prior.chunk(count)
        parts = zip(valued.chunk(count), chosen.chunk(count), aligned, priors, strict=True)
        mask = torch.cat([_choose(*part, config, *kind_params) for part in parts])
    repaired = [
        REPAIRS[config.repair or ""](part, gone, moment)
        for part, gone, moment in zip(matrix.chunk(len(moments)), mask.chunk(len(moments)), moments, strict=True)
    ]
    value = torch.cat(repaired).to(matrix.dtype)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{weight.name}: the repair overflows {matrix.dtype}; prune a float32 model")
    return mask, torch.where(value == 0, matrix, value).masked_fill(mask, 0)  # zero on the mask and nowhere else


def _choose(
    matrix: Tensor,
    chosen: Tensor,
    moment: Tensor,
    prior: Tensor | None,
    config: PruneConfig,
    kind: str,
    params: dict[str, int],
) -> Tensor:
    goes = whole_units(chosen, unit_of(params))
    counts = goes.sum(1) if config.budget == "row" else goes.sum()[None]
    more = {} if prior is None else {"prior": prior, "alpha": config.alpha}
    return MASKS[config.score or ""](matrix, moment, matrix == 0, counts, kind, params, **more)
