"""The verbs on whole models: analyze and prune_. It joins models, spectra and pruning; it knows no layout or kernel."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.models import PrunableWeight, check_values, prunable_weights
from rmtkern.pruning.calibrate import Moments, calibrate
from rmtkern.pruning.cycles import Pruned, make_masks, matrices
from rmtkern.pruning.layerwise import prune_layerwise
from rmtkern.pruning.pattern import parse_pattern, unit_of
from rmtkern.pruning.plan import Count, LayerPlan, PruneConfig, PrunePlan, mask_hash
from rmtkern.spectrum.fit import SpectralFits, fit_spectra

__all__ = ["analyze", "prune_"]

_log = logging.getLogger(__name__)


def analyze(
    model: nn.Module,
    *,
    targets: str | Iterable[str] | None = "all",
    ignore: str | Iterable[str] = (),
    split_qkv: bool = False,
    alpha: float = 0.25,
    edge: str = "mp",
    beta: float | None = None,
    k_hill: int = 20,
    legacy: bool = False,
    max_bytes: int | None = None,
    show_progress: bool | None = None,
) -> SpectralFits:
    """Fit the Marchenko-Pastur law to every weight matrix of a model.

    Args:
        model: any module; not changed.
        targets: "all" (every Linear, Conv2d and attention projection: 50 matrices in ViT-B/16), roles, groups or
            globs; None: attention and MLP projections. See models.prunable_weights.
        ignore: roles, groups or globs to leave out.
        split_qkv: fit q, k and v of a fused projection as matrices of their own.
        alpha: share of eigenvalues left out at either end of the fit, (0, 0.5).
        edge: "mp" or "tw"; see spectrum.fit.fit_spectrum, which has the options below too.
        beta: level of the Tracy-Widom edge, (0, 1); None: 0.1, or the published 0.8 with `legacy`.
        k_hill: eigenvalues in the Hill estimate, >= 2.
        legacy: the published (buggy) numbers.
        max_bytes: bound on the memory of one batch of equal shapes; None: the default of spectrum.fit.fit_spectra.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Name -> SpectralFit, in the order of the model; prints as a table. A grouped convolution has one entry for
        each group ("name[group 0]"), a split projection one for q, k and v ("name[q]").

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing to analyse, a target that matches nothing, weights with NaN or Inf, or on the meta device.
        PackedModelError: the model is packed.

    Source: docs/math.md (1)-(15).
    """
    weights = prunable_weights(model, targets, ignore)
    _refuse_nothing(weights, "analyse")
    check_values(weights)
    found = {
        label: weight.as_matrix()[rows]
        for weight in weights
        for label, rows in (weight.split() if split_qkv else weight.blocks()).items()
    }
    return fit_spectra(
        found, alpha=alpha, edge=edge, beta=beta, k_hill=k_hill, legacy=legacy, max_bytes=max_bytes,
        show_progress=show_progress,
    )  # fmt: skip


def prune_(
    model: nn.Module,
    sparsity: float | PruneConfig = 0.5,
    method: str = "auto",
    pattern: str = "unstructured",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    config: PruneConfig | None = None,
    budget: str | None = None,
    score: str | None = None,
    repair: str | None = None,
    haar: float = 0.0,
    alpha_regime: bool = False,
    theta: str = "haar",
    seed: int = 0,
    show_progress: bool | None = None,
) -> PrunePlan:
    """Set weights of a model to zero, in place and nothing else: it stays an ordinary, trainable module.

    A pruned weight is exactly 0.0, so the zero pattern is the mask; weights that are zero already stay zero and count
    towards the sparsity. With methods "obs", "admm" and "rmt" or haar > 0 the surviving weights change too, as those
    methods say. If anything fails, the model is bit for bit as it was.

    Args:
        model: any module with Linear, Conv2d or MultiheadAttention weights, float32, float16 or bfloat16.
        sparsity: fraction of the selected weights to be zero, [0, 1), met to the single weight; or a PruneConfig.
        method: "auto", "magnitude", "uniform", "row", "seb", "rmt", "wanda", "obs", "admm" or "random"; see PruneConfig
            and PRESETS. "auto" with calibration images is "admm".
        pattern: "unstructured", n:m such as "2:4", or mini-blocks of outputs x inputs such as "4x1".
        targets: roles, groups ("attn", "mlp", "other"), globs, or "all"; None: attention and MLP projections.
        ignore: roles, groups or globs to leave out.
        calibration: images for methods that use them: a tensor [B, C, H, W], a pair (images, labels), or a loader of
            tensors, of tuples whose first item is the images, or of mappings (keyword arguments, as text models take).
        config: a PruneConfig with all the fields; then none of the others may be given.
        budget: overrides the method's budget.
        score: overrides the method's score.
        repair: overrides the method's repair: "none", or "obs" (the survivors of any method's mask are refit to the
            layer's outputs on the calibration images).
        haar: z of the singular-vector step before pruning; 0: none.
        alpha_regime: budget "edge" at s <= 0.20 uses the Hill exponents, as published.
        theta: "haar" or "legacy", the unit of the singular-vector thresholds of method "rmt".
        seed: of score "random".
        show_progress: progress bar; None: only on a terminal.

    Returns:
        The plan: config, spectra, and what was decided for each layer, with a hash of its zeros.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or an unknown name; nothing to prune; NaN or Inf weights; weights on the meta
            device; K not divisible by m; calibration images missing.
        PackedModelError: the model is packed.
    """
    given = {
        "sparsity": sparsity, "method": method, "pattern": pattern, "targets": targets, "ignore": ignore,
        "budget": budget, "score": score, "haar": haar, "alpha_regime": alpha_regime, "theta": theta, "seed": seed,
        "repair": repair,
    }  # fmt: skip
    config = _config(given, config).resolve(calibration is not None)
    weights = prunable_weights(model, config.targets, config.ignore)
    _refuse_nothing(weights, "prune")
    check_values(weights)
    if config.pattern != "unstructured":
        _check_divisible(weights, config.pattern)
    moments = Moments()
    if config.needs_calibration and isinstance(calibration, Iterator):
        calibration = list(calibration)  # which may be read twice
    if config.score == "activation" and calibration is not None:
        moments = calibrate(model, weights, calibration, show_progress=show_progress)
    elif calibration is not None and not config.layerwise:
        _log.warning(
            "method %s with score %s uses no calibration images; they were ignored", config.method, config.score
        )

    def fit(found: Mapping[str, Tensor]) -> SpectralFits:
        return fit_spectra(found, show_progress=show_progress)

    fits = fit(matrices(weights)) if config.needs_fits else SpectralFits({})
    pruned = make_masks(weights, config, fits, moments.features, fit, show_progress=show_progress)
    images = moments.images
    if config.layerwise and calibration is not None:
        masks = [mask for mask, _ in pruned]
        pruned, images = prune_layerwise(model, weights, config, masks, calibration, show_progress=show_progress)
    plan = _plan(model, config, weights, pruned, fits, images)
    _write_(weights, [matrix for _, matrix in pruned])
    return plan


def _config(given: Mapping[str, Any], config: PruneConfig | None) -> PruneConfig:
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
) -> PrunePlan:
    _, params = parse_pattern(config.pattern)
    layers = tuple(
        LayerPlan(weight.name, weight.role, weight.shape, int(mask.sum()), mask_hash(mask), params)
        for weight, (mask, _) in zip(weights, pruned, strict=True)
    )
    chosen = {layer.name for layer in layers}
    everything = prunable_weights(model, "all")
    zeros = sum(layer.zeros for layer in layers) + sum(
        int((weight.parameter == 0).sum()) for weight in everything if weight.name not in chosen
    )
    prunable = Count(zeros, sum(weight.parameter.numel() for weight in everything))
    parameters = Count(zeros, sum(parameter.numel() for parameter in model.parameters()))
    return PrunePlan(config, layers, prunable, parameters, fits, images)


@torch.no_grad()
def _write_(weights: Sequence[PrunableWeight], values: Sequence[Tensor]) -> None:
    """Copy new values into the parameters; if one fails, put back those already written and raise."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for weight, value in zip(weights, values, strict=True):
            before.append((weight.parameter, weight.parameter.detach().clone()))
            weight.parameter.copy_(weight.to_parameter(value))
    except BaseException:
        for parameter, old in before:
            parameter.copy_(old)
        raise
