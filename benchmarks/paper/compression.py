"""How few numbers a trained fully connected network needs: factors, small entries out, masked fine-tuning, no loss.

Every choice is made on images that training did not see; the test images only report.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import against, hits_of
from rmtkern.demo.train import accuracy
from rmtkern.gradual import prune_gradually_
from rmtkern.models import prunable_weights
from rmtkern.pruning.bulk import cut_bulk
from rmtkern.spectrum.denoise import split
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

__all__ = ["CALIBRATION", "RECIPES", "TUNING", "compressed", "factored", "numbers", "smallest", "tuned"]

RECIPES: dict[str, tuple[bool, str, tuple[float, ...]]] = {
    "magnitude": (False, "magnitude", (0.6, 0.4, 0.25, 0.15, 0.09, 0.06, 0.04)),
    "factors + calibrated": (True, "sensitivity", (0.15, 0.09, 0.06, 0.04)),
}
"""Name -> whether matrices lose their bulk and become factors first, where that is free; method of prune_; and shares
of all weights that are left, one step after another."""

CALIBRATION = 2048
"""Training images that method "sensitivity" sees."""

FACTOR_DROP = 0.02
"""Top-1 that may go with the bulk of all matrices before the fine-tuning."""

TUNING = FinetuneConfig(
    epochs=1, lr=0.01, optimizer="sgd", weight_decay=0.0, batch_size=64, warmup=0.0, floor=0.0, clip=None, distill=0.0,
    label_smoothing=0.0, autocast="bfloat16",
)  # fmt: skip
"""The fine-tuning of the unpruned network that pruned ones are compared with; after each step, at another rate."""

Images = tuple[Tensor, Tensor]
"""Images [B, K] and labels [B]."""


def numbers(model: nn.Module) -> int:
    """Weights and biases that are not zero; where they stand (a bit or an index each) is not counted."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def tuned(model: nn.Sequential, train: Images, held_out: Images, how: FinetuneConfig) -> nn.Sequential:
    """A copy with the fine-tuning of one step and no zeros: what a pruned one has to be compared with."""
    other = copy.deepcopy(model)
    finetune_(other, None, train, held_out=held_out, config=how, show_progress=False)
    return other.eval()


@torch.no_grad()
def factored(model: nn.Sequential, held_out: Images, max_drop: float) -> nn.Sequential:
    """A copy in which what is smaller as two factors, once its bulk is gone, is two linears.

    Layer by layer the singular values below the Marchenko-Pastur edge go (pruning.bulk.cut_bulk, whatever the fit),
    unless the network is then more than `max_drop` worse than it was, in top-1 on the held-out images.
    """
    small = copy.deepcopy(model).eval()
    allowed = accuracy(small, *held_out) - max_drop
    for weight in prunable_weights(small, "all"):
        before = weight.parameter.clone()
        weight.parameter.copy_(cut_bulk(before, 0.0, gate=1.0)[0])
        if accuracy(small, *held_out) < allowed:
            weight.parameter.copy_(before)
    return nn.Sequential(*(part for layer in small for part in _factors(layer)))


def _factors(layer: nn.Module) -> list[nn.Module]:
    """A linear as two of its rank, if they need fewer numbers."""
    if not isinstance(layer, nn.Linear):
        return [layer]
    matrix = layer.weight.detach()
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    parts = split(matrix, 1e-6 * largest, 0.0, min_dim=1) if largest > 0 else None
    if parts is None:
        return [layer]
    second, first = (nn.Linear(part.shape[1], part.shape[0]) for part in parts)
    for linear, part in zip((second, first), parts, strict=True):
        linear.weight.copy_(part)
    first.register_parameter("bias", None)
    second.bias.copy_(layer.bias)
    return [first, second]


def smallest(
    model: nn.Sequential,
    train: Images,
    held_out: Images,
    *,
    method: str,
    weights: int,
    allowed: float,
    shares: Sequence[float],
    how: FinetuneConfig,
) -> tuple[nn.Sequential, float] | None:
    """The last of a series of networks with ever fewer weights that is as good on held-out images as it has to be.

    In each step entries go as a method says, and the rest is fine-tuned; the first network that is not good enough
    ends the series.

    Args:
        model: linears and activations; not changed.
        train: images that fine-tuning sees.
        held_out: images that choose the epoch and end the series.
        method: of prune_; it may calibrate on the first CALIBRATION training images.
        weights: of which `shares` are; more than `model` has where it is factored.
        allowed: least top-1 on the held-out images, [0, 1].
        shares: falling, (0, 1]; those that `model` is below already, without its zeros, are left out.
        how: the fine-tuning of a step.

    Returns:
        The network and its share; None if none was good enough.
    """
    small, found = copy.deepcopy(model), None
    own = [weight.parameter for weight in prunable_weights(model, "all")]
    total, left = sum(one.numel() for one in own), sum(int(one.count_nonzero()) for one in own)
    for share in shares:
        sparsity = 1 - share * weights / total
        if left < total - round(sparsity * total):
            continue
        step = prune_gradually_(
            small, train, [sparsity], method, held_out=held_out, targets="all", calibration=train[0][:CALIBRATION],
            finetune=how, show_progress=False,
        ).cycles[-1]  # fmt: skip
        if step.accuracy is None or step.accuracy < allowed:
            break
        found = copy.deepcopy(small).eval(), share
    return found


def compressed(
    model: nn.Sequential,
    control: nn.Sequential,
    data: Mapping[str, Images],
    recipe: str,
    max_drop: float,
    how: FinetuneConfig,
) -> dict[str, Any]:
    """What becomes of one network: its numbers, and its top-1 on the test images against that of two others.

    Args:
        model: as it was trained.
        control: the same, `tuned`; pruning starts with it, and must lose nothing against it.
        data: images and labels of "train", "held out" and "test".
        recipe: of RECIPES.
        max_drop: top-1 that may be lost on the held-out images, [0, 1).
        how: the fine-tuning of a step.
    """
    start = time.process_time()
    held_out, weights = data["held out"], sum(weight.parameter.numel() for weight in prunable_weights(model, "all"))
    factors, method, shares = RECIPES[recipe]
    first = factored(control, held_out, FACTOR_DROP) if factors else control
    allowed = accuracy(control, *held_out) - max_drop
    options = {"method": method, "weights": weights, "shares": shares}
    found = smallest(first, data["train"], held_out, allowed=allowed, how=how, **options)
    small, share = found or (control, 1.0)
    seconds = time.process_time() - start
    scores = [hits_of(one, *data["test"]) for one in (model, control, small)]
    lost = {name: against(score, scores[2]) for name, score in zip(("trained", "tuned"), scores, strict=False)}
    return {
        "numbers": sum(parameter.numel() for parameter in model.parameters()), "small_numbers": numbers(small),
        "share": share, "factored_numbers": numbers(first) if first is not control else None,
        "factors": sum(isinstance(layer, nn.Linear) and layer.bias is None for layer in small),
        **{f"{name}_top1": round(100 * one["dense_top1"], 2) for name, one in lost.items()},
        "small_top1": round(100 * lost["tuned"]["top1"], 2),
        **{f"{name}_{key}": round(100 * one[key], 3) for name, one in lost.items() for key in ("loss", "loss_error")},
        "test_images": len(scores[0]), "compress_cpu_s": round(seconds, 1),
    }  # fmt: skip
