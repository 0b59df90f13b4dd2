"""How few numbers a trained fully connected network needs: bulk out, factors, small entries out, without loss.

Every choice is made on images that training did not see; the test images only report.
"""

import copy

import torch
from torch import Tensor, nn

from rmtkern.api import prune_
from rmtkern.demo.train import accuracy
from rmtkern.models import prunable_weights
from rmtkern.pruning.bulk import cut_bulk
from rmtkern.spectrum.denoise import split

__all__ = ["compress", "numbers"]


def numbers(model: nn.Module) -> int:
    """Weights and biases that are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


@torch.no_grad()
def compress(
    model: nn.Sequential, held_out: tuple[Tensor, Tensor], *, max_drop: float = 0.0, tolerance: float = 0.005
) -> nn.Sequential:
    """A smaller network that is no more than `max_drop` worse on held-out images.

    Layer by layer the singular values below the Marchenko-Pastur edge go (pruning.bulk.cut_bulk, whatever the fit),
    unless that costs accuracy; what is then smaller as two factors becomes two linears; and the smallest entries of
    every weight go, in the same share, as far as the accuracy allows.

    Args:
        model: linears and activations; not changed.
        held_out: images [B, K] and labels [B].
        max_drop: in top-1, [0, 1).
        tolerance: in sparsity, of the search for the last share.
    """
    small = copy.deepcopy(model).eval()
    allowed = accuracy(small, *held_out) - max_drop
    for weight in prunable_weights(small, "all"):
        before = weight.parameter.clone()
        weight.parameter.copy_(cut_bulk(before, 0.0, gate=1.0)[0])
        if accuracy(small, *held_out) < allowed:
            weight.parameter.copy_(before)
    factored = nn.Sequential(*(part for layer in small for part in _factors(layer)))
    left = accuracy(factored, *held_out) - allowed
    prune_(
        factored, None, "uniform", targets="all", max_drop=max(0.0, left), evaluate=held_out, tolerance=tolerance,
        show_progress=False,
    )  # fmt: skip
    return factored


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
