"""The verbs on whole models: analyze and prune_. It joins models, spectra and pruning; it knows no layout or kernel."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern import evaluation
from rmtkern.errors import NoGradientsError
from rmtkern.models import PrunableWeight, check_values, prunable_weights
from rmtkern.places import place_
from rmtkern.pruning.budget import HILL
from rmtkern.pruning.calibrate import Moments, calibrate
from rmtkern.pruning.cycles import layer_weights, make_masks, masks_of_choices, matrices
from rmtkern.pruning.held_out import hold_out, model_outputs, relative_change
from rmtkern.pruning.layerwise import prune_layerwise
from rmtkern.pruning.memory import give_memory_back
from rmtkern.pruning.mixing import Choice, choose_patterns
from rmtkern.pruning.pattern import SPIKES, coarsest, parse_pattern, unit_of, whole_units
from rmtkern.pruning.permute import permute_
from rmtkern.pruning.plan import GIVEN, PRIORS, Count, LayerPlan, PruneConfig, PrunePlan, mask_hash
from rmtkern.pruning.presets import AUTO_NO_GRADIENTS, BEST, BEST_OF
from rmtkern.pruning.pruned import Pruned
from rmtkern.pruning.residual import permute_stream_
from rmtkern.pruning.sensitivity import Sensitivity, sensitivities
from rmtkern.pruning.spikes import divide_spikes_
from rmtkern.pruning.target import Target, search
from rmtkern.pruning.times import PatternTimes
from rmtkern.ranks import Ranks
from rmtkern.spectral_linear import spectral_linears
from rmtkern.spectrum.fit import SpectralFits, fit_spectra
from rmtkern.training.reallocate import reallocate

__all__ = ["analyze", "prune_"]

_log = logging.getLogger(__name__)

OVER_PRUNED = 0.03
"""Fraction of the selected weights that `restore` removes beyond the sparsity and gives back; docs/math.md (25)."""


def analyze(
    model: nn.Module,
    *,
    targets: str | Iterable[str] | None = "all",
    ignore: str | Iterable[str] = (),
    split_qkv: bool = False,
    alpha: float = 0.25,
    edge: str = "mp",
    beta: float | None = None,
    k_hill: int | None = 20,
    legacy: bool = False,
    max_bytes: int | None = None,
    show_progress: bool | None = None,
) -> SpectralFits:
    """Fit the Marchenko-Pastur law to every weight matrix of a model.

    Weights on a GPU are decomposed there, by CuPy where it is installed, else by torch (docs/gpu.md). Beside the model
    it holds copies and Gram matrices of one batch of weights, within `max_bytes` (docs/benchmarks.md, Memory). With
    several processes (torch.distributed) call it on every rank: each decomposes its share, all get all fits.

    Args:
        model: any module; not changed.
        targets: "all" (every Linear, Conv2d and attention projection: 50 matrices in ViT-B/16), roles, groups or
            globs; None: attention and MLP projections. See models.prunable_weights.
        ignore: roles, groups or globs to leave out.
        split_qkv: fit q, k and v of a fused projection as matrices of their own.
        alpha: share of eigenvalues left out at either end of the fit, (0, 0.5).
        edge: "mp" or "tw"; see spectrum.fit.fit_spectrum, which has the options below too.
        beta: level of the Tracy-Widom edge, (0, 1); None: 0.1, or the published 0.8 with `legacy`.
        k_hill: eigenvalues in the Hill estimate, >= 2; None: half of them.
        legacy: the published (buggy) numbers.
        max_bytes: bound on the memory of matrices computed together; None: the default of spectrum.fit.fit_spectra.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Name -> SpectralFit, in the order of the model; prints as a table. A grouped convolution has one entry for
        each group ("name[group 0]"), a split projection one for q, k and v ("name[q]").

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing to analyse, a target that matches nothing, weights with NaN or Inf, on the meta device, or
            sharded.
        PackedModelError: the model is packed.

    Source: docs/math.md (1)-(15).
    """
    weights = prunable_weights(model, targets, ignore)
    _refuse_nothing(weights, "analyse")
    _refuse_sharded(weights)
    check_values(weights)
    found = {
        label: weight.as_matrix()[rows]
        for weight in weights
        for label, rows in (weight.split() if split_qkv else weight.blocks()).items()
    }
    return _fit(
        found, alpha=alpha, edge=edge, beta=beta, k_hill=k_hill, legacy=legacy, max_bytes=max_bytes,
        show_progress=show_progress,
    )  # fmt: skip


def _fit(found: Mapping[str, Tensor], **options: Any) -> SpectralFits:
    """fit_spectra, each rank of torch.distributed its share of the matrices: the largest dealt out first."""
    ranks = Ranks.current()
    if ranks.world == 1:
        return fit_spectra(found, **options)
    names = sorted(found, key=lambda name: -found[name].numel() * min(found[name].shape))  # stable, so alike on all
    own = {name: found[name] for name in names[ranks.rank :: ranks.world]}
    fits = {name: fit for part in ranks.gather(dict(fit_spectra(own, **options))) for name, fit in part.items()}
    return SpectralFits({name: fits[name] for name in found})


def prune_(
    model: nn.Module,
    sparsity: float | PruneConfig | None = None,
    method: str = "auto",
    pattern: str | Sequence[str] = "unstructured",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    config: PruneConfig | None = None,
    budget: str | None = None,
    score: str | None = None,
    repair: str | None = None,
    restore: str | None = None,
    permute: bool | str | None = None,
    prior: str | Mapping[str, Tensor] | None = None,
    alpha: float = 0.5,
    haar: float = 0.0,
    alpha_regime: bool = False,
    theta: str = "haar",
    soft_threshold: float = 0.0,
    legacy: bool = False,
    seed: int = 0,
    spikes: float = 1.0,
    timings: PatternTimes | None = None,
    linear_speedup: float | None = None,
    max_drop: float | None = None,
    evaluate: Any = None,
    tolerance: float = 0.01,
    speedup: float | None = None,
    example: Any = None,
    show_progress: bool | None = None,
) -> PrunePlan:
    """Set weights of a model to zero, in place and nothing else: it stays an ordinary, trainable module.

    A pruned weight is exactly 0.0, so the zero pattern is the mask; weights that are zero already stay zero and count
    towards the sparsity. With methods "obs", "admm" and "rmt" or haar > 0 the surviving weights change too, as those
    methods say. If anything fails, the model is bit for bit as it was. Without calibration images the default method
    and "magnitude" hold what they remove, until all is written, and no more than half of the dense weights besides
    (docs/benchmarks.md, Memory).

    With several processes, call torch.distributed.init_process_group() first and this on every rank with the same
    model, not sharded yet: spectra and calibration images are divided (a tensor or a pair here; a loader gives each
    rank its own part, by a DistributedSampler), moments and gradients are summed, and all end with the same bits. If
    one rank fails alone, as for a bad image in its part, the others wait for it.

    Args:
        model: any module with Linear, Conv2d or MultiheadAttention weights, float32, float16 or bfloat16.
        sparsity: fraction of the selected weights to be zero, [0, 1), met to the single weight; or a PruneConfig.
            None: 0.5, or with `max_drop` whatever that allows.
        method: "auto", "magnitude", "uniform", "row", "seb", "rmt", "alphapruning", "wanda", "ser", "ser-gradient",
            "hybrid", "obs", "admm", "cast" (n:m patterns only), "sensitivity", "edge-sensitivity" or "random"; see
            PruneConfig and PRESETS.
            "auto" with calibration images is "sensitivity", or "admm" for a model that cannot run backward.
        pattern: "unstructured", n:m such as "2:4", n:mxr such as "2:4x4" (shared by 4 outputs), or mini-blocks of
            outputs x inputs such as "4x1". "spectral" makes low-rank factors of the spikes above the edge and prunes
            the rest: then every such nn.Linear is a SpectralLinear (new parameters, so make optimizers afterwards),
            which finetune_ trains, pack_ stores as it is, and merge_factors_ takes back. A list of patterns: each
            weight gets the one, and the share of zeros, at which all lose least for the time that they take by
            `timings`; a layer that none makes faster stays dense. The sparsity is then met to one mini-block in all.
        targets: roles, groups ("attn", "mlp", "other"), globs, or "all"; None: attention and MLP projections.
        ignore: roles, groups or globs to leave out.
        calibration: images for methods that use them: a tensor [B, C, H, W], a pair (images, labels), or a loader of
            tensors, of tuples whose first item is the images, or of mappings (keyword arguments, as text models take).
            With labels for "ser", "ser-gradient" and "hybrid" above 20 %.
        config: a PruneConfig with all the fields; then none of the others may be given.
        budget: overrides the method's budget. "best" tries those by the Marchenko-Pastur edge, by measured losses and
            by both, each from the dense weights, and takes the one that changes the model's outputs least on the last
            eighth of the calibration images, which nothing else sees then (three times the time, two more copies of the
            weights).
        score: overrides the method's score.
        repair: overrides the method's repair: "none", or "obs" (the survivors of any method's mask are refit to the
            layer's outputs on the calibration images).
        restore: overrides the method's restore: "none", "movement" or "gradient" (3 % more than asked is removed, and
            what is missed most comes back).
        permute: with mini-blocks or an n:m pattern and calibration images, first let hidden units, and channels within
            a head, change places (weights and biases) so that mini-blocks hold what costs alike, or n:m groups dear and
            cheap inputs each; the model computes the same. The channels of the residual stream, which all blocks share,
            do so too where the model allows it and the summed loss falls, so that features taken from inside the model
            come in another order; with "blocks" they do not. None: "blocks" for mini-blocks where method "auto" has
            images.
        prior: for method "cast", a mask that the pattern stays close to: the name of a method without labels and
            layer-by-layer choice, whose unstructured mask of the same sparsity it is; or tensors by parameter name (the
            state dict of a pruned model), whose zeros it is. Their other values are not used: to project a pruned and
            trained model with free restoration, fill its zeros with the dense weights and pass its state dict of
            before.
        alpha: what that is worth, >= 0: each entry that differs costs `alpha` mean costs of its group's patterns.
            Without a prior it has no effect.
        haar: z of the singular-vector step before pruning; 0: none.
        alpha_regime: budget "edge" at s <= 0.20 uses the Hill exponents, as published.
        theta: "haar" or "legacy", the unit of the singular-vector thresholds of method "rmt".
        soft_threshold: by how many times the published amount the weights that stay shrink after each cycle of method
            "rmt", >= 0; 0: not at all.
        legacy: budgets by the spectrum, and method "rmt" with its thresholds and its shrinking, as the published code
            has them, defects included.
        seed: of score "random", and of the order of images with `restore`.
        spikes: for pattern "spectral", the share of the spikes that become factors, the largest first, (0, 1].
        timings: how long each weight takes in each of several patterns, as `time_patterns(model, example)` measured it
            here or `PatternTimes.load` read it.
        linear_speedup: with several patterns and instead of a sparsity: prune until the selected weights are together
            so many times as fast as dense by `timings`, >= 1.
        max_drop: find the highest sparsity whose top-1 on `evaluate` falls by at most this much, [0, 1); 0.01 is one
            point. By bisection, each trial pruned anew from the dense weights; one copy of the weights to return to and
            one of the best trial are held. Every trial is in the plan.
        evaluate: held-out images for `max_drop`, as evaluation.evaluate takes them: a loader of (x, y), a pair of
            tensors, or an image folder; seen once for each trial, and never the images that you report on. Of several
            ranks each scores what it is given, all of it or its part.
        tolerance: width in sparsity at which a search stops, (0, 1).
        speedup: find the lowest sparsity at which the packed model is so many times as fast as the strongest dense form
            here, > 0, by bisection with times of whole models; see speed.prune_to_speed_, which has more options and
            also returns every trial.
        example: inputs for `speedup`, as `pack_` takes them.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        The plan: config, spectra, and what was decided for each layer, with a hash of its zeros.

    Raises:
        TypeError: an argument of the wrong type, `max_drop` with a sparsity or without `evaluate`, `speedup` with one
            of these or without `example`, several patterns without `timings`, or `linear_speedup` with a sparsity.
        ValueError: a value out of range or an unknown name; nothing to prune; NaN or Inf weights; weights on the meta
            device, or sharded; K not divisible by m; calibration images missing, given in autocast or not what the
            model takes; `max_drop` with an n:m pattern, no images to evaluate, a model that has no more accuracy than
            `max_drop`, or a drop that no sparsity keeps; a score that needs an n:m pattern, a prior that it does not
            take, or tensors that do not fit the model; timings without one of the weights, or by which the patterns do
            not get as far as asked; a speed-up that is not reached.
        PackedModelError: the model is packed.
    """
    given = {
        "sparsity": sparsity, "method": method, "pattern": pattern, "targets": targets, "ignore": ignore,
        "budget": budget, "score": score, "haar": haar, "alpha_regime": alpha_regime, "theta": theta, "seed": seed,
        "repair": repair, "restore": restore, "permute": permute, "prior": prior, "alpha": alpha,
        "soft_threshold": soft_threshold, "linear_speedup": linear_speedup, "spikes": spikes,
        "legacy": legacy,
    }  # fmt: skip
    tensors = None if prior is None or isinstance(prior, str) else prior
    if tensors is not None:
        given["prior"] = None if config is not None or isinstance(sparsity, PruneConfig) else GIVEN
    config = _config(given, config)
    _check_prior(config, tensors)
    _check_timings(config, timings)
    if speedup is not None or example is not None:
        _check_speed(sparsity, config, speedup, example, max_drop, evaluate)
        from rmtkern.speed import prune_to_speed_  # which packs and times: this file knows no storage

        found = prune_to_speed_(
            model, speedup or 0, example, config, calibration, tolerance=tolerance, show_progress=show_progress
        )
        return found.plan
    target = None
    if max_drop is not None:
        target = Target(max_drop, tolerance, accuracy=0.0, images=0)
        _check_search(sparsity, config, calibration, evaluate)
    elif evaluate is not None or tolerance != 0.01:
        raise TypeError("prune_: evaluate= and tolerance= are for the search with max_drop=; pass max_drop too")
    if config.linear_speedup is not None and isinstance(sparsity, int | float):
        raise TypeError("prune_: got a sparsity and linear_speedup, which finds the sparsity; pass one of them")
    divided: dict[str, nn.Module] = {}
    if config.pattern == SPIKES and calibration is not None:
        weights = _selected(model, config.resolve(calibration is not None))
        calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
        divided = divide_spikes_(model, weights, config.spikes, calibration, show_progress=show_progress)
    try:
        if target is not None:
            return _search_(model, config, calibration, target, evaluate, timings, show_progress)
        return _prune_(model, config, calibration, timings, show_progress, tensors)
    except BaseException:
        place_(model, divided)
        raise


def _prune_(
    model: nn.Module,
    config: PruneConfig,
    calibration: Tensor | Iterable[Any] | None,
    timings: PatternTimes | None,
    show_progress: bool | None,
    tensors: Mapping[str, Tensor] | None = None,
) -> PrunePlan:
    asked, config = config, config.resolve(calibration is not None)
    weights = _selected(model, config)
    if calibration is not None and torch._C._is_any_autocast_enabled():
        raise ValueError(
            "autocast is on, and what the images give would be rounded to its dtype; call prune_ outside of it"
        )
    priors = None if tensors is None else _zeros(weights, tensors)
    if config.needs_calibration and isinstance(calibration, Iterator):
        calibration = list(calibration)  # which may be read twice
    held_out = None
    if config.budget == BEST and calibration is not None:
        calibration, held_out = hold_out(calibration)
    choose_ = _choose_ if held_out is None else partial(_best_, held_out)
    costs = None
    if (config.measured or config.permute) and calibration is not None:
        try:
            costs = sensitivities(model, weights, calibration, show_progress=show_progress)
        except NoGradientsError as error:
            if asked.mixed:
                raise
            config = replace(asked, method=AUTO_NO_GRADIENTS).resolve(True)  # which permutes only if asked to
            if asked.method != "auto" or config.measured or config.permute:
                raise
            _log.warning("%s; pruning by method %r instead", error, config.method)
    if costs is None or not config.permute or calibration is None:
        return choose_(model, weights, config, calibration, costs, priors, timings, show_progress)
    dense = _values(model)
    try:
        pattern = coarsest(config.patterns)
        costs = permute_(model, weights, costs, pattern, calibration, show_progress)
        if config.permute is True:
            costs = permute_stream_(
                model, weights, costs, pattern, config.sparsity, calibration, show_progress=show_progress
            )
        return choose_(model, weights, config, calibration, costs, priors, timings, show_progress)
    except BaseException:
        _set_(model, dense)
        raise


def _best_(
    held_out: Any, model: nn.Module, weights: Sequence[PrunableWeight], config: PruneConfig, *how: Any
) -> PrunePlan:
    """`_choose_` with the budget that changes the outputs on held-out images least."""
    ranks = Ranks.current()
    dense, wanted = _values(model), model_outputs(model, held_out, ranks=ranks)
    changes: dict[str, float] = {}
    try:
        for budget in BEST_OF:
            _set_(model, dense)
            plan = _choose_(model, weights, replace(config, budget=budget), *how)
            changes[budget] = relative_change(wanted, model_outputs(model, held_out, ranks=ranks))
            if min(changes, key=changes.__getitem__) == budget:
                best, values = plan, _values(model)
    except BaseException:
        _set_(model, dense)
        raise
    _set_(model, values)
    return replace(best, budgets=changes)


def _choose_(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    config: PruneConfig,
    calibration: Tensor | Iterable[Any] | None,
    costs: Mapping[str, Sensitivity] | None,
    priors: Sequence[Pruned] | None,
    timings: PatternTimes | None,
    show_progress: bool | None,
) -> PrunePlan:
    if not config.measured:
        costs = None
    choices: dict[str, Choice] | None = None
    if timings is not None and costs is not None:
        sparsity = config.sparsity if config.linear_speedup is None else None
        choices = choose_patterns(
            weights, costs, config.patterns, timings, sparsity=sparsity, speedup=config.linear_speedup
        )
    if calibration is not None and not config.needs_calibration:
        _log.warning(
            "method %s with score %s uses no calibration images; they were ignored", config.method, config.score
        )
    masks_of, fits, images = _masks_of(model, weights, config, calibration, costs, show_progress, choices)
    pruned = masks_of()
    if config.needs_labels:
        unit = unit_of(parse_pattern(config.patterns[0])[1])
        count = sum(int(whole_units(one.mask(), unit).sum()) for one in pruned)
        total = sum(math.prod(one.shape) for one in pruned) // (unit[0] * unit[1])
        more = min(OVER_PRUNED, (1 - config.sparsity) / 2)
        favour = [1.0] * len(weights)
        if config.budget == "edge":
            at = layer_weights(weights, fits, config.sparsity + more, alpha_regime=config.alpha_regime)
            favour = [1 / weight for weight in at]
        pruned, images = reallocate(
            model, weights, masks_of(goal=count + round(more * total)), favour, calibration,
            restore=config.restore or "", count=count, unit=unit, seed=config.seed, show_progress=show_progress,
        )  # fmt: skip
    if config.layerwise and calibration is not None:
        if config.prior in PRIORS:
            priors = _prior_masks(model, weights, config, calibration, show_progress)
        pruned, images = prune_layerwise(
            model, weights, config, pruned, calibration,
            patterns=None if choices is None else {name: choice.pattern for name, choice in choices.items()},
            sensitivities=costs, priors=priors, show_progress=show_progress,
        )  # fmt: skip
    pruned = [one.shared(Ranks.current()) for one in pruned]
    plan = _plan(model, config, weights, pruned, fits, images, choices)
    _write_(weights, pruned)
    return plan


def _masks_of(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    config: PruneConfig,
    calibration: Tensor | Iterable[Any] | None,
    costs: Mapping[str, Sensitivity] | None,
    show_progress: bool | None,
    choices: Mapping[str, Choice] | None = None,
) -> tuple[Callable[..., list[Pruned]], SpectralFits, int]:
    """make_masks with all that a config needs of the model, the spectra that it goes by, and the images it saw.

    Of several patterns masks_of_choices.
    """
    moments = Moments()
    if config.score == "activation" and calibration is not None:
        moments = calibrate(model, weights, calibration, show_progress=show_progress)

    if choices is not None and costs is not None:
        chosen = partial(masks_of_choices, weights, config, choices, moments.features, costs)
        return chosen, SpectralFits({}), moments.images

    def fit(found: Mapping[str, Tensor]) -> SpectralFits:
        k_hill = HILL.get(config.budget or "", 20)
        return _fit(found, k_hill=k_hill, legacy=config.legacy, show_progress=show_progress)

    fits = fit(matrices(weights)) if config.needs_fits else SpectralFits({})
    masks_of = partial(
        make_masks, weights, config, fits, moments.features, fit, sensitivities=costs, show_progress=show_progress
    )
    return masks_of, fits, moments.images


def _prior_masks(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    config: PruneConfig,
    calibration: Tensor | Iterable[Any],
    show_progress: bool | None,
) -> list[Pruned]:
    """What the method that a config names as prior would remove, without a pattern, at the same sparsity."""
    asked = PruneConfig(
        config.sparsity,
        config.prior or "",
        alpha_regime=config.alpha_regime,
        theta=config.theta,
        seed=config.seed,
        legacy=config.legacy,
    ).resolve(True)
    masks_of, _, _ = _masks_of(model, weights, asked, calibration, None, show_progress)
    zeros = sum(int((weight.parameter == 0).sum()) for weight in weights)
    goal = round(config.sparsity * sum(weight.parameter.numel() for weight in weights))
    return masks_of(goal=max(zeros, goal))


def _check_prior(config: PruneConfig, tensors: Any) -> None:
    if tensors is None and config.prior == GIVEN:
        raise TypeError(f"prior: a config with prior={GIVEN!r} needs the tensors too; pass prior= a state dict")
    if tensors is None:
        return
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise TypeError(
            "prior: expected the name of a method or tensors by parameter name, such as the state dict of a pruned "
            f"model, got {type(tensors).__name__}"
        )
    if config.prior != GIVEN:
        raise TypeError(f"prior: got tensors and a PruneConfig with prior={config.prior!r}; give it prior={GIVEN!r}")


def _zeros(weights: Sequence[PrunableWeight], tensors: Mapping[str, Tensor]) -> list[Pruned]:
    """Where the tensors of the weights' names are zero."""
    masks = []
    for weight in weights:
        found = next((tensors[name] for name in (weight.name, *weight.tied) if name in tensors), None)
        if found is None or found.shape != weight.parameter.shape:
            got = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(
                f"prior: expected a tensor of shape {tuple(weight.parameter.shape)} for {weight.name}, got {got}; pass "
                "the state dict of a pruned copy of this model"
            )
        masks.append(replace(weight, parameter=nn.Parameter(found.detach() == 0, requires_grad=False)).as_matrix())
    if not any(bool(mask.any()) for mask in masks):
        raise ValueError("prior: the tensors have no zero in the selected weights; pass those of a pruned model")
    return [Pruned.of(mask.to(weight.parameter.device)) for weight, mask in zip(weights, masks, strict=True)]


def _selected(model: nn.Module, config: PruneConfig) -> list[PrunableWeight]:
    """The weights that a config asks for, checked."""
    weights = prunable_weights(model, config.targets, config.ignore)
    _refuse_nothing(weights, "prune")
    _refuse_sharded(weights)
    check_values(weights)
    places: dict[int, str] = {}
    for weight in weights:
        data = weight.parameter
        if (other := places.setdefault(data.data_ptr(), weight.name)) != weight.name:
            raise ValueError(
                f"{other} and {weight.name} share their memory and are two parameters, so that neither can be pruned"
                " alone; make them one, as in b.weight = a.weight, or add one to ignore="
            )
        if any(stride == 0 and size > 1 for stride, size in zip(data.stride(), data.shape, strict=True)):
            raise ValueError(
                f"{weight.name} is an expanded tensor, whose entries share memory; give it its own: .clone()"
            )
    if not config.mixed:
        _check_divisible(weights, config.patterns[0])
    return weights


def _check_timings(config: PruneConfig, timings: Any) -> None:
    if timings is not None and not isinstance(timings, PatternTimes):
        raise TypeError(
            f"timings: expected PatternTimes, got {type(timings).__name__}; rmtkern.time_patterns makes them"
        )
    if config.mixed and timings is None:
        raise TypeError(
            "prune_: several patterns need timings=, which time_patterns(model, example, patterns) measures or "
            "PatternTimes.load(file) reads"
        )
    if timings is not None and not config.mixed:
        raise TypeError(f"prune_: got timings and one pattern, {config.pattern!r}; pass several, or no timings")


def _check_search(sparsity: Any, config: PruneConfig, calibration: Any, images: Any) -> None:
    """Refuse what a search for a sparsity cannot do, before anything is computed."""
    if isinstance(sparsity, int | float) or config.sparsity != _DEFAULTS["sparsity"]:
        raise TypeError("prune_: got a sparsity and max_drop, which finds the sparsity; pass one of them")
    if images is None:
        raise TypeError("prune_: max_drop needs evaluate=, held-out images with labels")
    if config.linear_speedup is not None:
        raise TypeError("prune_: got linear_speedup and max_drop; pass one of them")
    if config.one_sparsity:
        raise ValueError(
            f"pattern {config.pattern!r} has one sparsity only, so max_drop has nothing to find; take 'unstructured' "
            "or mini-blocks such as '4x1'"
        )
    for name, given in (("evaluate", images), ("calibration", calibration)):
        if isinstance(given, Iterator):
            raise TypeError(
                f"{name}: got {type(given).__name__}, which can be read once only, and max_drop reads it for every "
                "trial; pass a list, a DataLoader or tensors"
            )


def _check_speed(sparsity: Any, config: PruneConfig, speedup: Any, example: Any, max_drop: Any, evaluate: Any) -> None:
    """Refuse what a search for a speed-up does not take, before anything is computed."""
    if speedup is None or example is None:
        raise TypeError("prune_: speedup= and example= go together: how many times as fast, on which inputs")
    if isinstance(sparsity, int | float) or config.sparsity != _DEFAULTS["sparsity"]:
        raise TypeError("prune_: got a sparsity and speedup, which finds the sparsity; pass one of them")
    if max_drop is not None or evaluate is not None:
        raise TypeError("prune_: got max_drop or evaluate, and speedup; pass one of the two searches")
    if config.prior == GIVEN:
        raise TypeError("prune_: a prior that is given as tensors has one sparsity; pass prior= a method")


def _search_(
    model: nn.Module,
    config: PruneConfig,
    calibration: Tensor | Iterable[Any] | None,
    target: Target,
    images: Any,
    timings: PatternTimes | None,
    show_progress: bool | None,
) -> PrunePlan:
    weights = _selected(model, config.resolve(calibration is not None))

    def score() -> tuple[float, int]:
        found = evaluation.evaluate(model, images, show_progress=show_progress)
        hits, count = Ranks.current().total([round(found.top1 * found.count), found.count])
        return hits / count, int(count)

    accuracy, number = score()
    target = replace(target, accuracy=accuracy, images=number)
    if accuracy <= target.max_drop:
        raise ValueError(
            f"the model scores {accuracy:.2%} before pruning, no more than max_drop={target.max_drop:g} may lose; "
            "check that the labels of evaluate= are numbered as the model's classes are"
        )
    zeros = sum(int((weight.parameter == 0).sum()) for weight in weights)
    least = zeros / sum(weight.parameter.numel() for weight in weights)
    dense = _values(model)
    plans: list[PrunePlan] = []

    def attempt(sparsity: float) -> float:
        _set_(model, dense)
        plans.append(_prune_(model, replace(config, sparsity=sparsity), calibration, timings, show_progress))
        found, count = score()
        if count != number:
            raise ValueError(
                f"evaluate: gave {number} images at first and {count} for a trial; pass the same every time"
            )
        return found

    try:
        (plan, pruned), target = search(target, least, attempt, lambda: (plans[-1], _values(model)))
    except BaseException:
        _set_(model, dense)
        raise
    _set_(model, pruned)
    return replace(plan, target=target)


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers: a method may repair more than it prunes."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def _set_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        value.copy_(values[name])


def _config(given: Mapping[str, Any], config: PruneConfig | None) -> PruneConfig:
    if given["sparsity"] is None:
        given = {**given, "sparsity": _DEFAULTS["sparsity"]}
    changed = [name for name, value in given.items() if name != "sparsity" and value != _DEFAULTS[name]]
    if isinstance(given["sparsity"], PruneConfig):
        if config is not None:
            raise TypeError("prune_: got two PruneConfig, as sparsity and as config; pass one")
        config = given["sparsity"]
    elif config is not None and given["sparsity"] != _DEFAULTS["sparsity"]:
        changed = ["sparsity", *changed]
    if config is None:
        return PruneConfig(**given)
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")
    if changed:
        raise TypeError(f"prune_: got a PruneConfig and {', '.join(changed)}; put everything into the PruneConfig")
    return config


_DEFAULTS = asdict(PruneConfig())


def _refuse_nothing(weights: Sequence[PrunableWeight], verb: str) -> None:
    if not weights:
        raise ValueError(
            f"nothing to {verb}: targets= and ignore= leave no Linear, Conv2d or attention weight of the model; "
            "pass a model with such layers, or wider targets"
        )


def _refuse_sharded(weights: Sequence[PrunableWeight]) -> None:
    for weight in weights:
        if hasattr(weight.parameter, "to_local"):
            raise ValueError(
                f"{weight.name} is sharded (a DTensor), and scores and spectra need whole weights; call this before "
                "fully_shard, on every rank"
            )


def _check_divisible(weights: Sequence[PrunableWeight], pattern: str) -> None:
    _, params = parse_pattern(pattern)
    r, c = unit_of(params)
    for weight in weights:
        if weight.shape[0] % r or weight.shape[1] % c:
            raise ValueError(
                f"{weight.name} is {weight.shape[0]}x{weight.shape[1]} (out x in features), which pattern {pattern!r} "
                "does not divide; add it to ignore="
            )
        if "m" in params and weight.shape[1] % params["m"]:
            raise ValueError(
                f"{weight.name} has {weight.shape[1]} in features, not divisible by {params['m']} as pattern "
                f"{pattern!r} needs; add it to ignore="
            )


def _plan(
    model: nn.Module,
    config: PruneConfig,
    weights: Sequence[PrunableWeight],
    pruned: Sequence[Pruned],
    fits: SpectralFits,
    images: int,
    choices: Mapping[str, Choice] | None = None,
) -> PrunePlan:
    divided = spectral_linears(model)

    def layer_plan(weight: PrunableWeight, mask: Tensor) -> LayerPlan:
        choice = None if choices is None else choices[weight.name]
        _, params = parse_pattern(config.patterns[0] if choice is None else choice.pattern)
        owner = divided.get(weight.name.rpartition(".")[0])
        if owner is not None and not params:
            params = {"rank": owner.rank}
        times = {} if choice is None else {"ms": choice.ms, "dense_ms": choice.dense_ms}
        zeros, found = int(mask.sum()), mask_hash(mask)
        return LayerPlan(weight.name, weight.role, weight.shape, zeros, found, params, **times)

    layers = tuple(layer_plan(weight, one.mask()) for weight, one in zip(weights, pruned, strict=True))
    if config.linear_speedup is not None:
        config = replace(config, sparsity=sum(layer.zeros for layer in layers) / sum(layer.total for layer in layers))
    chosen = {layer.name for layer in layers}
    everything = prunable_weights(model, "all")
    zeros = sum(layer.zeros for layer in layers) + sum(
        int((weight.parameter == 0).sum()) for weight in everything if weight.name not in chosen
    )
    prunable = Count(zeros, sum(weight.parameter.numel() for weight in everything))
    parameters = Count(zeros, sum(parameter.numel() for parameter in model.parameters()))
    return PrunePlan(config, layers, prunable, parameters, fits, images)


@torch.no_grad()
def _write_(weights: Sequence[PrunableWeight], pruned: list[Pruned]) -> None:
    """Write zeros or new values into the parameters; if one fails, put back those already written and raise.

    What is written leaves `pruned`, so that old and new values together take little more than the model's size once.
    """
    undo: list[Callable[[], object]] = []
    try:
        for weight in weights:
            give_memory_back()
            one, parameter = pruned.pop(0), weight.parameter
            value = one.matrix()
            if value is None:
                gone = weight.to_parameter(one.mask())
                undo.append(partial(parameter.masked_scatter_, gone, parameter.detach()[gone]))
                parameter.masked_fill_(gone, 0)
            else:
                undo.append(partial(parameter.copy_, parameter.detach().clone()))
                parameter.copy_(weight.to_parameter(value))
    except BaseException:
        for restore in undo:
            restore()
        raise
