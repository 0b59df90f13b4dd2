"""What fine-tuning minimises: cross-entropy, distillation, and penalties on weights. Knows logits and matrices only."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["REGULARISERS", "Regulariser", "objective"]


def objective(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | None,
    *,
    smoothing: float,
    distill: float,
    temperature: float,
) -> Tensor:
    """(1 - d) CE(logits, smoothed labels) + d T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean over images.

    Args:
        logits: [B, classes], any float dtype; computed in float32 or better.
        labels: [B] int64; None: only distillation, whatever `distill` is.
        teacher: [B, classes]; None: only cross-entropy, whatever `distill` is.
        smoothing: share of the target spread over all classes, [0, 1).
        distill: d, [0, 1].
        temperature: T > 0.

    Returns:
        Scalar. Source: the distillation fine-tune of arXiv 2606.02608 (T = 2, d = 0.5, smoothing 0.1).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    share = 0.0 if teacher is None else 1.0 if labels is None else distill
    loss = logits.new_zeros(())
    if labels is not None and share < 1:
        loss = loss + (1 - share) * F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if teacher is not None and share > 0:
        wanted = (teacher.to(logits.dtype) / temperature).log_softmax(1)
        found = (logits / temperature).log_softmax(1)
        loss = loss + share * temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return loss


@dataclass(frozen=True)
class Regulariser:
    """A penalty on one weight matrix [N, K] and its gradient, which is 0 wherever the weight is."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]


def _row_norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True)


def _lasso_gradient(matrix: Tensor) -> Tensor:
    norms = _row_norms(matrix)
    return matrix * (matrix.shape[1] ** 0.5 / torch.where(norms > 0, norms, 1.0))


REGULARISERS: dict[str, Regulariser] = {
    "l1": Regulariser(lambda w: w.abs().sum(), torch.sign),
    "l2": Regulariser(lambda w: w.square().sum(), lambda w: 2 * w),
    "group-lasso": Regulariser(lambda w: w.shape[1] ** 0.5 * _row_norms(w).sum(), _lasso_gradient),
}
"""Name -> sum of |w|, sum of w^2, or the sum over rows (outputs) of sqrt(K) times the row's length."""
