"""Which entries of a matrix matter: a score for each, the smallest goes first. Knows no budget and no pattern."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CALIBRATED", "GROUPED", "LAYERWISE", "SCORES"]


def magnitude(matrix: Tensor, moments: Tensor | None, generator: torch.Generator) -> Tensor:
    """|W|, [N, K] float32.

    Source: arXiv 2503.01922, element-wise sparsification.
    """
    return matrix.abs().float()


def activation(matrix: Tensor, moments: Tensor | None, generator: torch.Generator) -> Tensor:
    """|W_nk| sqrt(E x_k^2), [N, K] float32: the root mean square of what the entry adds to its output.

    Args:
        matrix: [N, K].
        moments: [G, K] second moments of the input features, G dividing N (rows in G equal blocks).
        generator: not used.

    Raises:
        ValueError: no moments.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), eq. 1.
    """
    if moments is None:
        raise ValueError("score 'activation' needs the second moments of the inputs; pass calibration=images")
    rms = moments.sqrt().to(matrix.device, torch.float32).repeat_interleave(matrix.shape[0] // moments.shape[0], dim=0)
    return matrix.abs().float() * rms


def later(matrix: Tensor, moments: Tensor | None, generator: torch.Generator) -> Tensor:
    """|W|, [N, K] float32: what a budget sees of a score that is known only layer by layer (layerwise.MASKS)."""
    return magnitude(matrix, moments, generator)


def random(matrix: Tensor, moments: Tensor | None, generator: torch.Generator) -> Tensor:
    """Uniform on [0, 1), [N, K] float32: the baseline that every other score has to beat."""
    return torch.rand(matrix.shape, generator=generator).to(matrix.device)


SCORES: dict[str, Callable[[Tensor, Tensor | None, torch.Generator], Tensor]] = {
    "magnitude": magnitude,
    "activation": activation,
    "obs": later,
    "admm": later,
    "cast": later,
    "random": random,
}
"""Name -> function(matrix [N, K], moments [G, K] | None, generator) -> score [N, K] float32, >= 0."""

CALIBRATED: tuple[str, ...] = ("activation", "obs", "admm", "cast")
"""The scores that need calibration images."""

LAYERWISE: tuple[str, ...] = ("obs", "admm", "cast")
"""The scores that no budget can compare: it says how much goes from each layer, and layerwise.MASKS which."""

GROUPED: tuple[str, ...] = ("cast",)
"""The scores that compare whole groups, so that they need an n:m pattern; they alone take a prior."""
