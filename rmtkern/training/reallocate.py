"""Spectral edge reallocation: which of the entries that a budget would remove come back, by what a loss says of them.

It trains (or differentiates) the candidates alone, on copies; the model is not changed. It knows no budget.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rmtkern.models import PrunableWeight
from rmtkern.progress import progress
from rmtkern.pruning.calibrate import checked, evaluating
from rmtkern.pruning.pattern import unit_entries, unit_scores, whole_units
from rmtkern.pruning.pruned import Pruned
from rmtkern.pruning.smallest import take_smallest
from rmtkern.ranks import Ranks
from rmtkern.training.batches import Batch, read_batch, split
from rmtkern.training.loss import objective

__all__ = ["SELECTIONS", "reallocate"]

_BATCH = 32
_LR, _LR_END = 8 * 5e-5, 0.25
_LOGIT_WEIGHT = 1.0


def reallocate(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    removed: Sequence[Pruned],
    favour: Sequence[float],
    data: Any,
    *,
    restore: str,
    count: int,
    unit: tuple[int, int] = (1, 1),
    seed: int = 0,
    show_progress: bool | None = None,
) -> tuple[list[Pruned], int]:
    """Give entries that were removed back, until `count` units are zero; the highest evidence times favour first.

    Candidates are the entries that `removed` takes and the model still has. They come back with the value that they
    have in the model.

    Args:
        model: a classifier, with its weights before pruning; its logits are the reference. It runs in eval mode.
        weights: of the model.
        removed: one for each weight, with more zeros than wanted.
        favour: rho of each weight, > 0.
        data: labelled images: a pair (images, labels), or a loader with a length; seen once.
        restore: key of SELECTIONS.
        count: units that are zero afterwards.
        unit: outputs and inputs that go or stay together.
        seed: of the order of a pair's images.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        One for each weight, and the number of images.

    Raises:
        TypeError: data of another kind.
        ValueError: no labels, labels outside the classes, images that the model does not take, or a loss that is NaN or
            infinite.

    Source: arXiv 2606.02608, algorithm SER; docs/math.md (25).
    """
    start = [weight.as_matrix() == 0 for weight in weights]
    candidates = [one.mask() & ~zero for one, zero in zip(removed, start, strict=True)]
    ranks = Ranks.current()
    source, _ = split(data, None, fraction=0, batch_size=_BATCH, seed=seed, ranks=ranks)
    if ranks.differ(len(source)):
        raise ValueError(f"calibration: the processes have different numbers of batches (this one {len(source)})")
    first = weights[0].parameter
    steps, seen = len(source), 0

    def batches() -> Iterator[Batch]:
        nonlocal seen
        for raw in progress(source.epoch(0), "reallocate", total=steps, show=show_progress):
            batch = read_batch(raw, first.device, first.dtype)
            if batch.labels is None:
                raise ValueError(
                    f"restore {restore!r} needs labels; pass calibration=(images, labels), or a loader of such pairs"
                )
            seen += batch.size
            yield batch

    with evaluating(model), torch.enable_grad():
        evidence = SELECTIONS[restore](_Pruned(model, weights, removed, candidates, ranks), batches(), steps)
    left = count - sum(int(whole_units(zero, unit).sum()) for zero in start)
    open_ = [whole_units(one, unit) for one in candidates]
    keys = [(unit_scores(found, unit) * rho).masked_fill_(~one, torch.inf)
            for found, rho, one in zip(evidence, favour, open_, strict=True)]  # fmt: skip
    masks = [zero | unit_entries(one, unit) for zero, one in zip(start, take_smallest(keys, left), strict=True)]
    after = [None if (matrix := one.matrix()) is None else torch.where(may & ~mask, weight.as_matrix(), matrix)
             for weight, mask, may, one in zip(weights, masks, candidates, removed, strict=True)]  # fmt: skip
    return [Pruned.of(mask, matrix) for mask, matrix in zip(masks, after, strict=True)], int(ranks.total([seen])[0])


class _Pruned:
    """The over-pruned model as a function of what is added to its candidates."""

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[PrunableWeight],
        removed: Sequence[Pruned],
        candidates: Sequence[Tensor],
        ranks: Ranks,
    ) -> None:
        self.model, self.weights, self.candidates, self.ranks = model, weights, candidates, ranks
        self.matrices = [weight.as_matrix().masked_fill(one.mask(), 0) if (matrix := one.matrix()) is None else matrix
                         for weight, one in zip(weights, removed, strict=True)]  # fmt: skip
        self.added = [
            torch.zeros_like(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32), requires_grad=True)
            for matrix in self.matrices
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        changed = {
            weight.name: weight.to_parameter(matrix + (more * one).to(matrix.dtype))
            for weight, matrix, more, one in zip(self.weights, self.matrices, self.added, self.candidates, strict=True)
        }
        return functional_call(self.model, changed, args, kwargs)

    def gradient(self, batch: Batch) -> list[Tensor]:
        """Of cross-entropy + (mean squared difference of the logits to the reference) by what is added, over all ranks.

        The mean over the batches that the ranks have now.
        """
        with torch.no_grad():
            wanted = batch.logits(checked(self.model))
        logits = batch.logits(self)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = objective(logits, batch.labels, None, smoothing=0.0, distill=0.0, temperature=1.0)
        loss = loss + _LOGIT_WEIGHT * F.mse_loss(logits, wanted.to(logits.dtype))
        if not self.ranks.all(bool(torch.isfinite(loss))):
            raise ValueError(
                f"reallocation: the loss of the pruned model is {float(loss.detach())} (of this process); check the "
                "images and labels"
            )
        share = batch.size / self.ranks.total([batch.size])[0]
        return [self.ranks.sum(one * share) for one in torch.autograd.grad(loss, self.added)]


def movement(pruned: _Pruned, batches: Iterator[Batch], steps: int) -> list[Tensor]:
    """How far each candidate moves from 0 when the candidates alone are trained, [N, K] float32, >= 0.

    One pass of Adam; the learning rate falls linearly from 4e-4 to a quarter of that.

    Source: docs/math.md (25), selection phase A.
    """
    optimizer = torch.optim.AdamW(pruned.added, lr=_LR, weight_decay=0.0)
    for step, batch in enumerate(batches):
        for added, gradient in zip(pruned.added, pruned.gradient(batch), strict=True):
            added.grad = gradient
        for options in optimizer.param_groups:
            options["lr"] = _LR * (1 - (1 - _LR_END) * step / max(1, steps - 1))
        optimizer.step()
    return [added.detach().abs().float() for added in pruned.added]


def gradient(pruned: _Pruned, batches: Iterator[Batch], steps: int) -> list[Tensor]:
    """|g W|, [N, K] float32: by how much the loss would change, to first order, if a candidate came back.

    g is the mean gradient over the images at the pruned model, W the weight that was removed.

    Source: the first-order substitute of docs/math.md (25).
    """
    sums = [torch.zeros_like(added) for added in pruned.added]
    for batch in batches:
        for total, part in zip(sums, pruned.gradient(batch), strict=True):
            total.add_(part, alpha=pruned.ranks.total([batch.size])[0])
    return [
        (total * weight.as_matrix()).abs().float()
        for total, weight in zip(sums, pruned.weights, strict=True)
    ]  # fmt: skip


SELECTIONS = {"movement": movement, "gradient": gradient}
"""Name -> function(pruned model, batches, number of batches) -> evidence for each weight's candidates, >= 0."""
