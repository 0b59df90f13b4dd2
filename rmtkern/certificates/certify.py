"""The verb certify: what can be guaranteed about a pruned model next to its dense self. Joins walk and statements."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.api import prune_
from rmtkern.certificates import statements
from rmtkern.certificates.images import batches
from rmtkern.certificates.inputs import gains_of
from rmtkern.certificates.report import (
    ESTIMATE,
    EVERY,
    THESE,
    Bound,
    Certificate,
    Measured,
    StepCertificate,
    least,
    ratio,
)
from rmtkern.certificates.walk import Seen, Step, Walk, join, unfused
from rmtkern.models import prunable_weights
from rmtkern.progress import progress
from rmtkern.pruning.plan import PrunePlan
from rmtkern.spectral_linear import spectral_linears

__all__ = ["certify"]

Penalty = float | Mapping[str, float | Tensor]


def certify(
    model: nn.Module,
    reference: nn.Module | Mapping[str, Tensor] | PrunePlan,
    images: Any,
    *,
    l2: Penalty = 0.0,
    l1: Penalty = 0.0,
    restore: bool = False,
    local: bool = False,
    dtype: torch.dtype | None = None,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> Certificate:
    """Bound what pruning did to the logits, labels and loss of a classifier, and say what each bound is worth.

    The weights go from dense to pruned one by one, in the order in which the model uses them, with a forward pass
    after each: M + 1 passes over the images for M weights. Neither model is changed; memory beyond them is one batch
    and, in float64, the largest weight a few times.

    Args:
        model: the pruned model; or the dense one, if `reference` is a plan.
        reference: the dense model, its state dict, or the plan of a data-free prune_ call, which is then repeated on a
            copy of `model`.
        images: [B, ...] tensor, a pair (images, labels [B]), or an iterable of batches (tensors, pairs, or mappings of
            keyword arguments with "labels"); a few hundred. Read once.
        l2: weight of sum A^2 in the objective J = CE + sum l2 A^2 + sum l1 |A|, >= 0; or one for each parameter name:
            a number, or a tensor of the parameter's shape.
        l1: weight of sum |A|, in the same way.
        restore: also measure the model with each single weight restored (M more passes).
        local: also estimate each step from gradients (one backward pass for each class).
        dtype: run both models in it; None: in their own. The inequalities on measured logits hold in any dtype; with
            torch.float64 the a-priori bounds hold without float32's rounding between them and the logits.
        batch_size: images at a time, >= 1.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Certificate.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: models that do not fit each other or are equal, a plan that cannot be repeated, no images, labels
            outside the classes, a penalty that is negative, fewer than two classes, NaN or Inf logits.
        PackedModelError: a model is packed.

    Source: docs/certificates.md.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    _check_penalty("l2", l2)
    _check_penalty("l1", l1)
    walk = _walk(model, reference, dtype)
    parts: list[Seen] = []
    labelled = False
    classes = 0
    with unfused():
        loader = batches(images, batch_size, walk.device, walk.input_dtype)
        for call, count, labels in progress(loader, "certify", show=show_progress):
            if not parts:
                one = next(batches(_one(call), 1, walk.device, walk.input_dtype))[0]
                classes = walk.logits(one).shape[1]
                walk.sort_(one)
            parts.append(walk.measure(call, count, labels, restore=restore, local=local))
            labelled = labels is not None
    if not parts:
        raise ValueError("images: expected at least one image, got none")
    return _certificate(walk, join(parts), classes, labelled, (l2, l1))


def _check_penalty(name: str, penalty: Any) -> None:
    for value in penalty.values() if isinstance(penalty, Mapping) else [penalty]:
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            raise TypeError(f"{name}: expected a number, or one (or a tensor) per name, got {type(value).__name__}")
        low = float(value.min()) if isinstance(value, Tensor) else value
        if not (math.isfinite(low) and low >= 0):
            raise ValueError(f"{name}: expected finite numbers >= 0, got {low}")


def _walk(model: nn.Module, reference: Any, dtype: torch.dtype | None) -> Walk:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(spectral_linears(one) for one in (model, reference) if isinstance(one, nn.Module)):
        raise ValueError(
            "model: it has low-rank plus sparse linears, and certificates compare whole weights; call "
            "rmtkern.merge_factors_ on a copy of it"
        )
    if isinstance(reference, PrunePlan):
        return Walk(model, _state(model), _state(_repeat(model, reference)), dtype)
    if isinstance(reference, nn.Module):
        return Walk(model, _state(reference), _state(model), dtype)
    if isinstance(reference, Mapping):
        return Walk(model, reference, _state(model), dtype)
    raise TypeError(
        "reference: expected the dense model, its state dict, or a PrunePlan with the dense model as first argument, "
        f"got {type(reference).__name__}"
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    prunable_weights(model, "all")  # refuses a packed model
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _repeat(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of the dense model, pruned as the plan says."""
    if plan.calibration_images:
        raise ValueError(
            f"the plan used {plan.calibration_images} calibration images, so it cannot be repeated from the dense "
            "model alone; pass the pruned model first and the dense one second"
        )
    pruned = copy.deepcopy(model)
    try:
        prune_(pruned, plan.config)
        plan.verify(pruned)
    except ValueError as error:
        raise ValueError(
            f"the plan cannot be repeated on this model ({error}); with a plan, the model must be the dense one that "
            "the plan was made for"
        ) from error
    return pruned


def _one(call: Any) -> Any:
    """The first image of a batch, as a loader of one batch."""
    if isinstance(call, Mapping):
        return [{name: value[:1] if isinstance(value, Tensor) and value.ndim else value
                 for name, value in call.items()}]  # fmt: skip
    return call[:1]


def _penalty(penalty: tuple[Penalty, Penalty], name: str, value: Tensor) -> float:
    """Sum of l2 A^2 + l1 |A| over one parameter, in float64."""
    a, total = value.double(), 0.0
    for weight, size in zip(penalty, (a.square(), a.abs()), strict=True):
        factor = weight.get(name, 0.0) if isinstance(weight, Mapping) else weight
        total += float((factor.to(a.device) * size if isinstance(factor, Tensor) else factor * size).sum())
    return total


def _mean(values: Tensor) -> float | None:
    """Mean over images; None if nothing was seen."""
    return None if bool(values.isnan().any()) else float(values.mean())


def _step(
    step: Step,
    changed: Sequence[tuple[str, Tensor, Tensor]],
    seen: Seen,
    index: int,
    penalty: tuple[Penalty, Penalty],
) -> tuple[StepCertificate, tuple[Tensor, Tensor, Tensor]]:
    """One step's row, and for each image its bounds L ||R psi||, L min(V1, V2) and L any_input (inf if unknown)."""
    eta = seen.eta[index]
    lower = sum(_penalty(penalty, name, dense) - _penalty(penalty, name, pruned) for name, dense, pruned in changed)
    unknown = torch.full_like(eta, torch.inf)
    saves = _mean(seen.rest_eta[index])
    if saves is not None:
        saves = statements.budget(seen.total_eta) - 2 * saves
    if step.weight is None or step.dense is None or step.pruned is None:
        row = StepCertificate(
            step.name, "other", None, False, 0.0, 0.0, float(eta.mean()), statements.budget(eta), None, None, None,
            None, None, None, None, None, None, None, None, lower, saves,
            None if saves is None else statements.restoring_helps(saves, 0.0, lower),
        )  # fmt: skip
        return row, (unknown, unknown, unknown)
    dense, pruned = step.matrices()
    removed = dense - pruned
    gains = gains_of(removed)
    v1, v2, v3 = gains.row_l1 * seen.sup[index], gains.row_l2 * seen.two[index], gains.spectral * seen.two[index]
    norms, change = torch.minimum(v1, v2), seen.change[index]
    lipschitz = step.path.lipschitz if math.isfinite(step.path.lipschitz) else None
    anywhere = _any_input(removed, step.path.norm)
    known = lipschitz is not None and not bool(change.isnan().any())
    a_priori = change * lipschitz if known and lipschitz is not None else unknown
    a_priori_norms = norms * lipschitz if known and lipschitz is not None else unknown
    every = torch.full_like(eta, anywhere * lipschitz) if anywhere is not None and lipschitz is not None else unknown
    mean_change, mean_sup, local = _mean(change), _mean(seen.sup[index]), _mean(seen.local[index] * change)
    mean_norms = _mean(norms)
    row = StepCertificate(
        name=step.name,
        role=step.weight.role,
        shape=step.weight.shape,
        mask=not bool((removed[pruned != 0] != 0).any()),
        removed_l2=float(removed.norm()),
        removed_l1=float(removed.abs().sum()),
        logit=float(eta.mean()),
        budget=statements.budget(eta),
        change=mean_change,
        v1=_mean(v1),
        v2=_mean(v2),
        v3=_mean(v3),
        slack=None if mean_norms is None or mean_change is None else ratio(mean_norms, mean_change),
        any_input=anywhere,
        lipschitz=lipschitz,
        a_priori=float(a_priori.mean()) if known else None,
        a_priori_norms=float(a_priori_norms.mean()) if known else None,
        local=local,
        proxy=None if mean_sup is None else gains.spectral * mean_sup,
        penalty=lower,
        restoring_saves=saves,
        restoring_helps=None if saves is None else statements.restoring_helps(saves, 0.0, lower),
    )
    return row, (a_priori, a_priori_norms, every)


def _any_input(removed: Tensor, norm: tuple[Tensor | None, Tensor | None] | None) -> float | None:
    """Largest ||R psi||_inf over all outputs psi = gain u + bias of a LayerNorm: ||u||_2 <= sqrt(K), sum u = 0."""
    if norm is None:
        return None
    gain, bias = norm
    scaled = removed if gain is None else removed * gain.detach().double()
    centred = scaled - scaled.mean(1, keepdim=True)
    size = centred.norm(dim=1) * math.sqrt(removed.shape[1])
    return float((size if bias is None else size + (removed @ bias.detach().double()).abs()).max())


def _certificate(walk: Walk, seen: Seen, classes: int, labelled: bool, penalty: tuple[Penalty, Penalty]) -> Certificate:
    found = [_step(step, walk.changed(step), seen, index, penalty) for index, step in enumerate(walk.steps)]
    steps = tuple(row for row, _ in found)
    asked = any(isinstance(weight, Mapping) or weight > 0 for weight in penalty)
    lowered = sum(step.penalty for step in steps) if asked else None

    measured = Measured(
        logit=float(seen.total_eta.mean()),
        logit_max=float(seen.total_eta.max()),
        kept=float(seen.kept.double().mean()),
        loss=float((seen.loss[1] - seen.loss[0]).abs().mean()) if labelled else None,
        loss_change=float((seen.loss[1] - seen.loss[0]).mean()) if labelled else None,
        accuracy=float(seen.hit[0].double().mean()) if labelled else None,
        accuracy_pruned=float(seen.hit[1].double().mean()) if labelled else None,
    )

    def bound(name: str, holds: str, eta: Tensor, sharp: bool = False) -> Bound:
        """From [S] bounds on ||dz||_inf, or on osc(dz) if sharp."""
        truth = seen.total_spread if sharp else seen.total_eta
        spreads = eta if sharp else 2 * eta
        if sharp and labelled:
            loss = statements.sharp_loss_bound(eta, seen.right[0], seen.right[1])
        else:
            loss = float(spreads.mean())
        return Bound(
            name,
            holds,
            float(eta.mean()),
            ratio(float(eta.mean()), float(truth.mean())),
            least([float(b / t) for b, t in zip(eta, truth, strict=True) if t > 0]),
            loss,
            ratio(loss, measured.loss) if measured.loss is not None else None,
            float(statements.keeps_label(seen.gap, spreads).double().mean()),
            statements.accuracy_bound(seen.margin, spreads) if labelled else None,
            None if lowered is None else statements.objective_bound(loss, lowered, 0.0),
        )

    bounds = [
        bound("end to end, osc", THESE, seen.total_spread, sharp=True),
        bound("end to end, 2 eta", THESE, seen.total_eta),
        bound("stepwise, osc", THESE, seen.spread.sum(0), sharp=True),
        bound("stepwise, 2 eta", THESE, seen.eta.sum(0)),
    ]
    for name, holds, position in (
        ("a priori, L ||R psi||", THESE, 0),
        ("a priori, L and norms of R", THESE, 1),
        ("any input, L and norms of R", EVERY, 2),
    ):
        total = torch.stack([totals[position] for _, totals in found]).sum(0)
        if bool(torch.isfinite(total).all()):
            bounds.append(bound(name, holds, total))
    if not bool(seen.local.isnan().all()):
        bounds.append(bound("local gradients", ESTIMATE, (seen.local * seen.change).nansum(0)))
    proxies = [step.proxy for step in steps if step.proxy is not None]
    objective = None
    if lowered is not None and measured.loss_change is not None:
        objective = measured.loss_change - lowered
    return Certificate(
        images=len(seen.gap),
        classes=classes,
        dtype=str(walk.input_dtype).removeprefix("torch."),
        measured=measured,
        bounds=tuple(bounds),
        steps=steps,
        proxy=sum(proxies) if proxies else None,
        objective_change=objective,
    )
