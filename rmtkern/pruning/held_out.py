"""Calibration images that no pruning sees, and how far a pruned model's outputs on them are from the dense one's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rmtkern.pruning.calibrate import all_tensors, check_batches, evaluating, forward_passes, tensors_of
from rmtkern.ranks import Ranks

__all__ = ["hold_out", "model_outputs", "relative_change"]

_SHARE = 1 / 8


def hold_out(images: Tensor | Iterable[Any]) -> tuple[Any, Any]:
    """Take the last eighth of calibration images away: rows of tensors, or of a loader the last batches.

    Args:
        images: as for calibrate.calibrate; a loader is read once, and its batches are kept.

    Returns:
        What is left and what was taken, both as calibrate.calibrate takes them.

    Raises:
        TypeError: neither a tensor nor iterable.
        ValueError: fewer than two images.
    """
    if isinstance(images, Tensor) or _is_pair(images):
        return _rows(images)
    check_batches(images)
    batches: Sequence[Any] = list(images)
    if len(batches) == 1:
        left, taken = _rows(batches[0])
        return [left], [taken]
    at = len(batches) - max(1, round(_SHARE * len(batches)))
    if at < 1:
        raise ValueError("calibration: expected at least 2 images, one of them to hold out, got none")
    return batches[:at], batches[at:]


def _is_pair(images: Any) -> bool:
    """Whether it is (images, labels) and not two batches."""
    pair = isinstance(images, tuple) and len(images) == 2 and all(isinstance(one, Tensor) for one in images)
    return pair and images[0].ndim > 1 and images[1].ndim <= 1


def _rows(batch: Any) -> tuple[Any, Any]:
    """The same for one batch: a tensor, a sequence or a mapping, of these too; what has no rows goes to both."""
    count = max((len(one) for one in all_tensors(batch) if one.ndim), default=0)
    at = count - max(1, round(_SHARE * count))
    if at < 1:
        raise ValueError(f"calibration: expected at least 2 images, one of them to hold out, got {count}")

    def take(part: Any, rows: slice) -> Any:
        if isinstance(part, Mapping):
            return {name: take(one, rows) for name, one in part.items()}
        if isinstance(part, tuple | list):
            return tuple(take(one, rows) for one in part)
        return part[rows] if isinstance(part, Tensor) and part.ndim and len(part) == count else part

    return take(batch, slice(at)), take(batch, slice(at, None))


def model_outputs(model: nn.Module, images: Tensor | Iterable[Any], *, ranks: Ranks | None = None) -> list[Tensor]:
    """All floating-point outputs of a model in eval mode, batch by batch.

    Args:
        model: takes one batch of images as its first argument.
        images: as for calibrate.calibrate.
        ranks: each runs its part; None: one process.
    """
    with evaluating(model):
        return [tensor.clone() for run, _ in forward_passes(model, images, ranks=ranks) for tensor in tensors_of(run())]


def relative_change(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """|found - wanted|^2 / |wanted|^2, the squares summed over all outputs on all ranks, >= 0.

    The square is what the measured sensitivity and the layers' losses are about (docs/calibrated.md).

    Raises:
        ValueError: outputs that are not finite, or wanted ones that are all zero.
    """
    change = total = 0.0
    for old, new in zip(wanted, found, strict=True):
        change += float((new.double() - old.double()).square().sum())
        total += float(old.double().square().sum())
    change, total = Ranks.current().total([change, total])
    if not (total > 0 and math.isfinite(total) and math.isfinite(change)):
        raise ValueError(
            "the model's outputs on (held-out) calibration images are all zero, NaN or Inf, so nothing can be told by "
            "them; check the images, or name a budget instead of 'best'"
        )
    return change / total
