"""Where budget, score and pattern meet: from matrices and a resolved config to zero patterns, in one go or in cycles.

It changes no model: what comes back are masks and, where a singular-vector step ran, new matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.models import PrunableWeight, layer_type
from rmtkern.progress import progress
from rmtkern.pruning.budget import BUDGETS, Layer, cycle_targets, edge_weights
from rmtkern.pruning.mixing import Choice
from rmtkern.pruning.pattern import (
    PATTERNS,
    parse_pattern,
    smallest_units,
    unit_entries,
    unit_of,
    unit_scores,
    whole_units,
)
from rmtkern.pruning.plan import PruneConfig
from rmtkern.pruning.pruned import Pruned
from rmtkern.pruning.score import LAYERWISE, SCORES
from rmtkern.pruning.sensitivity import Sensitivity
from rmtkern.pruning.smallest import held, take_smallest
from rmtkern.spectrum.denoise import (
    legacy_shrinkage,
    legacy_stage,
    legacy_theta,
    sparsify_haar,
    sparsify_singular_vectors,
)
from rmtkern.spectrum.fit import SpectralFit

__all__ = ["layer_weights", "make_masks", "masks_of_choices", "matrices"]

Fits = Mapping[str, SpectralFit]


def matrices(weights: Sequence[PrunableWeight], values: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """The matrices to fit: one for each block of each weight, without depthwise convolutions.

    Args:
        weights: any.
        values: [N, K] for each weight, instead of its own values.
    """
    if values is None:
        values = [weight.as_matrix() for weight in weights]
    return {
        label: value[rows]
        for weight, value in zip(weights, values, strict=True)
        if not weight.depthwise
        for label, rows in weight.blocks().items()
    }


def make_masks(
    weights: Sequence[PrunableWeight],
    config: PruneConfig,
    fits: Fits,
    moments: Mapping[str, Tensor],
    fit: Callable[[Mapping[str, Tensor]], Fits],
    *,
    goal: int | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    show_progress: bool | None = None,
) -> list[Pruned]:
    """Decide which entries go, to the single weight, or to the single mini-block of an rxc pattern.

    Entries that are zero already stay zero and count; with an n:m pattern a group that has more zeros than the
    pattern asks keeps them.

    Args:
        weights: the selected weights; with an n:m pattern K must be divisible by m, with rxc N by r and K by c.
        config: resolved.
        fits: of `matrices(weights)`; may be empty if the config needs none.
        moments: weight name -> [G, K] second moments; may be empty if the score needs none.
        fit: fits matrices again, for the later cycles of budget "cycle".
        goal: units that are zero afterwards; None: as many as the sparsity asks. The budget sees the
            sparsity of `config` all the same.
        sensitivities: weight name -> what its entries cost; None if the budget needs none.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        One for each weight; the masks have round(sparsity * total) true entries (mini-blocks) in all.

    Raises:
        ValueError: more weights are zero already than the sparsity asks for.
    """
    kind, params = parse_pattern(config.patterns[0])
    values = [weight.as_matrix() for weight in weights]
    masks = [value == 0 for value in values]
    unit = unit_of(params)
    total = sum(mask.numel() for mask in masks) // (unit[0] * unit[1])
    goal = round(config.sparsity * total) if goal is None else goal
    zeros = sum(int(whole_units(mask, unit).sum()) for mask in masks)
    if zeros > goal and kind != "n:m":
        raise ValueError(
            f"sparsity {config.sparsity:g} asks for {goal} zeros, but {zeros} of {total} selected weights are zero "
            f"already and stay so; ask for at least {zeros / total:.6g}"
        )
    if config.haar:
        values = _by_block(weights, values, masks, fits, _haar(fits, config.haar))
    changes = config.haar > 0 or config.budget == "cycle"
    cycles = count(1) if config.budget == "cycle" else range(1, 2)
    for cycle in progress(cycles, "prune", show=show_progress):
        if cycle > 1:
            fits = fit(matrices(weights, values))
        if config.budget == "cycle" and cycle % 2 == 0:
            theta = "legacy" if config.legacy else config.theta
            values = _by_block(weights, values, masks, fits, _sparsify(theta, cycle))
        layers = _layers(weights, values, masks, fits, moments, sensitivities or {}, config, kind, params)
        left = goal - sum(layer.zeros for layer in layers)
        if kind == "n:m":
            left = sum(int(torch.isfinite(layer.scores()).sum()) - layer.zeros for layer in layers)
        take = left
        if config.budget == "cycle":  # the last cycle is trimmed, so that the count is exact
            take = min(left, max(1, round(sum(cycle_targets(layers, cycle)))))
        keys = BUDGETS[config.budget or ""](layers, config.sparsity, alpha_regime=config.alpha_regime, cycle=cycle)
        for mask, more in zip(masks, take_smallest(keys, take), strict=True):
            mask |= unit_entries(more, unit)
        del keys, layers  # as large as the weights
        if changes:
            values = [value.masked_fill(mask, 0) for value, mask in zip(values, masks, strict=True)]
        if config.budget == "cycle" and config.soft_threshold > 0:
            values = [_keep_zeros(value, mask, _shrunk(weight, value, fits, config, cycle))
                      for weight, value, mask in zip(weights, values, masks, strict=True)]  # fmt: skip
        if take == left:
            break
    return [Pruned.of(masks.pop(0), value) for value in (values if changes else [None] * len(masks))]


def _layers(
    weights: Sequence[PrunableWeight],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    fits: Fits,
    moments: Mapping[str, Tensor],
    sensitivities: Mapping[str, Sensitivity],
    config: PruneConfig,
    kind: str,
    params: dict[str, int],
) -> list[Layer]:
    layers, unit = [], unit_of(params)
    for index, (weight, value, mask) in enumerate(zip(weights, values, masks, strict=True)):
        cost = sensitivities.get(weight.name)
        loss = None if cost is None else unit_scores(cost.of(value), unit)
        moment = moments.get(weight.name)
        scores: Callable[[], Tensor] = partial(_unit_score, index, value, mask, moment, loss, config, kind, params)
        if loss is not None or kind == "n:m":  # measured losses are written over, and groups are sorted: once only
            scores = held(scores())
        found = [fits[label] for label in weight.blocks() if label in fits]
        layers.append(
            Layer(
                layer_type(weight.role),
                (value.shape[0] // unit[0], value.shape[1] // unit[1]),
                scores,
                int(whole_units(mask, unit).sum()),
                *_signals(found),
                randomness=_randomness(found),
                loss=loss,
            )
        )
    return layers


def _unit_score(
    index: int,
    value: Tensor,
    mask: Tensor,
    moment: Tensor | None,
    loss: Tensor | None,
    config: PruneConfig,
    kind: str,
    params: dict[str, int],
) -> Tensor:
    """Scores of the units of the weight of that number, -1 where a unit is zero already, inf where it may not go."""
    unit, gone = unit_of(params), whole_units(mask, unit_of(params))
    if loss is not None and config.score in LAYERWISE:
        score = loss  # only how many go is used, and a score would need as much memory
    else:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        score = SCORES[config.score or ""](value, moment, generator)
        score = score if unit == (1, 1) else unit_scores(score.masked_fill_(mask, 0.0), unit)
    score.masked_fill_(gone, -1.0)
    return score.masked_fill_(~(PATTERNS[kind](score, params) | gone), torch.inf)


def masks_of_choices(
    weights: Sequence[PrunableWeight],
    config: PruneConfig,
    choices: Mapping[str, Choice],
    moments: Mapping[str, Tensor],
    sensitivities: Mapping[str, Sensitivity],
) -> list[Pruned]:
    """Which units go where pattern and number are chosen for each weight: those of lowest score; zeros stay.

    Args:
        weights: the selected weights.
        config: resolved, with several patterns.
        choices: of each weight, by name.
        moments: as for `make_masks`.
        sensitivities: weight name -> what its entries cost.

    Returns:
        One for each weight.
    """
    pruned: list[Pruned] = []
    for index, weight in enumerate(weights):
        choice, value = choices[weight.name], weight.as_matrix()
        kind, params = parse_pattern(choice.pattern)
        unit, mask = unit_of(params), value == 0
        loss = unit_scores(sensitivities[weight.name].of(value), unit)
        score = _unit_score(index, value, mask, moments.get(weight.name), loss, config, kind, params)
        if kind == "n:m":
            goes = score < torch.inf
        else:
            goes = smallest_units(score.reshape(1, -1), torch.tensor([choice.units])).reshape(score.shape)
        pruned.append(Pruned.of(mask | unit_entries(goes, unit)))
    return pruned


def layer_weights(
    weights: Sequence[PrunableWeight], fits: Fits, sparsity: float, *, alpha_regime: bool = False
) -> list[float]:
    """The weights w_l of budget "edge" at a sparsity, one for each weight; see budget.edge_weights."""
    unscored = held(torch.empty(0))
    layers = [
        Layer(layer_type(weight.role), weight.shape, unscored, 0,
              *_signals([fits[label] for label in weight.blocks() if label in fits])) for weight in weights
    ]  # fmt: skip
    return edge_weights(layers, sparsity, alpha_regime=alpha_regime)


def _signals(found: Sequence[SpectralFit]) -> tuple[float | None, float | None]:
    """Edge and Hill exponent of a weight: means over its blocks."""
    return _mean([one.sigma_plus for one in found]), _mean([one.hill_alpha for one in found])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _randomness(found: Sequence[SpectralFit]) -> float:
    """(1 - mu) gamma, averaged over the blocks of a weight; 1, the neutral signal, without a fit."""
    mean = _mean([None if one.mu is None or one.gamma is None else (1 - one.mu) * one.gamma for one in found])
    return 1.0 if mean is None else max(0.0, mean)


def _keep_zeros(before: Tensor, mask: Tensor, after: Tensor) -> Tensor:
    """`after` in the dtype of `before`: zero where `mask` is and nowhere else, so that counts stay exact."""
    after = after.to(before.dtype)
    return torch.where(after == 0, before, after).masked_fill(mask, 0)


Step = Callable[[Tensor, list[float], list[float | None]], Tensor]
"""(blocks [B, N, K], their sigma_plus, their hill_alpha) -> blocks [B, N, K]."""

_TOGETHER = 1 << 30
"""Bytes that one batch of blocks may need on a GPU."""


def _by_block(
    weights: Sequence[PrunableWeight], values: Sequence[Tensor], masks: Sequence[Tensor], fits: Fits, step: Step
) -> list[Tensor]:
    """Apply a step to each block of each weight that has an edge; other blocks stay, and so do zeros and non-zeros."""
    changed: list[Tensor] = list(values)
    for group in _groups(weights, values):
        blocks: list[tuple[int, slice, SpectralFit]] = [
            (index, rows, fit)
            for index in group
            for label, rows in weights[index].blocks().items()
            if (fit := fits.get(label)) is not None and fit.sigma_plus
        ]
        after = {index: values[index].to(torch.promote_types(values[index].dtype, torch.float32), copy=True)
                 for index in group}  # fmt: skip
        if blocks:
            batch = torch.stack([after[index][rows] for index, rows, _ in blocks])
            edges = [float(fit.sigma_plus or 0) for _, _, fit in blocks]
            found = step(batch, edges, [fit.hill_alpha for _, _, fit in blocks])
            for (index, rows, _), block in zip(blocks, found, strict=True):
                after[index][rows] = block
        for index in group:
            changed[index] = _keep_zeros(values[index], masks[index], after[index])
    return changed


def _groups(weights: Sequence[PrunableWeight], values: Sequence[Tensor]) -> list[list[int]]:
    """Which weights are decomposed together: on a GPU those whose blocks have one shape, as far as memory allows.

    On a CPU, where a batch is a loop and only costs memory, each weight alone.
    """
    groups: list[list[int]] = []
    last: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for index, (weight, value) in enumerate(zip(weights, values, strict=True)):
        (n, k), count = value.shape, len(weight.blocks())
        key = (n, k, count, value.dtype, value.device) if value.device.type == "cuda" else (index,)
        needed = 8 * (4 * n * k + 3 * count * min(n // count, k) ** 2)  # float64: both factors, copies, Gram matrices
        group, used = last.get(key, ([], 0))
        if not group or used + needed > _TOGETHER:
            group, used = [], 0
            groups.append(group)
        group.append(index)
        last[key] = group, used + needed
    return groups


def _haar(fits: Fits, z: float) -> Step:
    """The Haar step of docs/math.md (17), scaled by the layer's Hill exponent over the mean of all layers."""
    mean = _mean([fit.hill_alpha for fit in fits.values()])

    def step(blocks: Tensor, edges: list[float], alphas: list[float | None]) -> Tensor:
        scales = [alpha / mean if alpha and mean else 1.0 for alpha in alphas]
        return sparsify_haar(blocks, edges, z=z, power=3, scale=scales)

    return step


_CYCLE_Z = 0.5


def _sparsify(theta: str, cycle: int) -> Step:
    """The singular-vector step of an even cycle, docs/math.md (16) and (23): thresholds grow by 1.02 with each cycle.

    "legacy" takes the published theta; "haar" takes 0.5 * 1.02^i standard deviations of a random unit vector's
    coordinate on either side, whatever the shape.
    """

    def step(blocks: Tensor, edges: list[float], alphas: list[float | None]) -> Tensor:
        if theta == "legacy":
            return sparsify_singular_vectors(blocks, edges, legacy_theta(cycle, (blocks.shape[1], blocks.shape[2])))
        return sparsify_singular_vectors(blocks, edges, _CYCLE_Z * 1.02**cycle, haar_units=True)

    return step


def _shrunk(weight: PrunableWeight, value: Tensor, fits: Fits, config: PruneConfig, cycle: int) -> Tensor:
    """The soft threshold sign(w) max(|w| - strength delta, 0), block by block, with the delta of `legacy_shrinkage`.

    Legacy: with that of each entry, of `legacy_stage`. A block without a fit counts as noise, mu = 0.
    """
    strength = config.soft_threshold
    out = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    for label, rows in weight.blocks().items():
        fit = fits.get(label)
        mu = 0.0 if fit is None or fit.mu is None else fit.mu
        if config.legacy:
            out[rows] = legacy_stage(out[rows], cycle, mu, strength)
        else:
            out[rows] = F.softshrink(out[rows], strength * legacy_shrinkage(cycle, mu))
    return out
