"""How much goes from each layer: a budget makes the scores of all layers comparable, and the smallest of all go.

It knows scores and spectra, and neither models nor what a pattern lets go. Which entries have the smallest keys finds
`smallest`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pstdev
from typing import Protocol

import torch
from torch import Tensor

from rmtkern.pruning.pattern import kth_smallest
from rmtkern.pruning.smallest import Keys, RankKeys

__all__ = [
    "BUDGETS",
    "HILL",
    "LEAST_KEPT",
    "MEASURED",
    "SPECTRAL",
    "Layer",
    "alpha_ratios",
    "cycle_targets",
    "edge_weights",
]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer as a budget sees it.

    Args:
        type: "attn", "mlp" or "other".
        shape: (N, K).
        scores: makes the score, [N, K] float32; finite and >= 0 where an entry may go, -1 where it is zero already, inf
            where the pattern forbids. Called when it is needed, so that not every layer's need be held.
        zeros: entries that are zero already.
        edge: sigma_plus, or None where no law could be fitted (excluded from statistics, neutral itself).
        alpha: Hill exponent, or None.
        randomness: (1 - mu) gamma in [0, 1]; 1 where no law could be fitted.
        loss: [N, K] float32, >= 0: what each entry costs the model's outputs; None if it was not measured. It may be
            the score itself, which the budgets of MEASURED then overwrite with their keys.
    """

    type: str
    shape: tuple[int, int]
    scores: Callable[[], Tensor]
    zeros: int
    edge: float | None = None
    alpha: float | None = None
    randomness: float = 1.0
    loss: Tensor | None = None

    @property
    def size(self) -> int:
        """N K."""
        return math.prod(self.shape)


class Budget(Protocol):
    """Keys, >= 0 on entries that may go, inf or < 0 elsewhere; the smallest of all go (smallest.take_smallest)."""

    def __call__(
        self, layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1
    ) -> Keys: ...


def global_(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """One threshold for all layers: the score itself.

    Only for scores that are comparable across layers, as |W| is. Score "activation" is not: whole layers go and the
    model breaks; use "row" or "uniform" with it.
    """
    return [layer.scores for layer in layers]


def uniform(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """The same sparsity in every layer, to one weight: the rank in the layer, as a fraction."""
    return [RankKeys(layer.shape, layer.scores, by_row=False, share=layer.size) for layer in layers]


def row(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """The same sparsity in every output row, to one weight: the rank in the row, as a fraction.

    Source: Sun et al. (Wanda), "comparison group: per output".
    """
    return [RankKeys(layer.shape, layer.scores, by_row=True, share=layer.shape[1]) for layer in layers]


def edge(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """Spectral Edge Budgeting in its four regimes: the score over a weight from each layer's spectral edge.

    Source: arXiv 2503.01922 and 2606.02608; docs/math.md (22).
    """
    weights = edge_weights(layers, sparsity, alpha_regime=alpha_regime)
    return [partial(_over, layer.scores, weight) for layer, weight in zip(layers, weights, strict=True)]


def _over(scores: Callable[[], Tensor], weight: float) -> Tensor:
    return scores() / weight


def cycle(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """The targets of one cycle of the original algorithm: the rank among what is left, over the layer's target.

    Source: arXiv 2503.01922; docs/math.md (23).
    """
    return [RankKeys(layer.shape, layer.scores, by_row=False, share=target, before=layer.zeros)
            for layer, target in zip(layers, cycle_targets(layers, cycle), strict=True)]  # fmt: skip


def alphapruning(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """AlphaPruning: a sparsity for each layer by how heavy its spectrum's tail is; heavier tails lose less.

    The key is the rank in the layer, as a fraction, over the layer's share; a share above 1 takes the whole layer.

    Source: Lu et al. 2024, arXiv 2410.10912, section 3; docs/math.md (24).
    """
    return [RankKeys(layer.shape, layer.scores, by_row=False, share=ratio * layer.size)
            for layer, ratio in zip(layers, alpha_ratios(layers, sparsity), strict=True)]  # fmt: skip


def sensitivity(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """Equal marginal loss of the model's outputs: a layer's i-th smallest score gets its i-th smallest measured loss.

    How much goes from each layer follows from the losses alone, which entries from the score. Of the share of entries
    that stay in the model, every layer keeps a half at least, whatever its losses say: where nearly all goes, little is
    left to make up for it, and the measured losses are too low. Layers without losses get the score itself.
    """
    return [_marginal(layer, sparsity) for layer in layers]


def _marginal(layer: Layer, sparsity: float) -> Tensor:
    score, loss, most = layer.scores(), layer.loss, 1 - LEAST_KEPT * (1 - sparsity)
    if loss is None:
        return score
    closed = (score < 0) | (score == torch.inf)
    cut = min(layer.size, max(layer.zeros, math.ceil(most * layer.size)))
    if loss is score:  # in place: with an order of the entries it would be several times as large
        if cut:
            closed |= loss > kth_smallest(loss, cut)
        return loss.masked_fill_(closed, torch.inf)
    rising = loss.flatten().masked_fill(score.flatten() < 0, -1.0).sort().values.clamp_(min=0)
    rising[cut:] = torch.inf
    order = score.flatten().argsort(stable=True)
    return torch.empty_like(rising).scatter_(0, order, rising).reshape(layer.shape).masked_fill_(closed, torch.inf)


def edge_sensitivity(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False, cycle: int = 1) -> Keys:
    """Measured losses, budgeted by the spectral edge: keys of "sensitivity" over the square of those weights of "edge".

    "edge" divides |W| by a weight, and a loss goes with W^2. A layer with a high edge loses more than its measured
    losses alone say. Layers without losses get the keys of "edge".

    Source: docs/math.md (22) and docs/calibrated.md; the combination is ours.
    """
    weights = edge_weights(layers, sparsity, alpha_regime=alpha_regime)
    keys = [_marginal(layer, sparsity) for layer in layers]
    return [key / weight if layer.loss is None else key.div_(weight**2)
            for layer, key, weight in zip(layers, keys, weights, strict=True)]  # fmt: skip


BUDGETS: dict[str, Budget] = {
    "global": global_,
    "uniform": uniform,
    "row": row,
    "edge": edge,
    "cycle": cycle,
    "alphapruning": alphapruning,
    "sensitivity": sensitivity,
    "edge-sensitivity": edge_sensitivity,
}
"""Name -> budget."""

MEASURED: tuple[str, ...] = ("sensitivity", "edge-sensitivity")
"""The budgets that need what each entry costs, measured on calibration images."""

LEAST_KEPT = 0.5
"""Of the share of entries that stay in the model, every layer keeps so much at least where measured losses decide."""

SPECTRAL: tuple[str, ...] = ("edge", "cycle", "alphapruning", "edge-sensitivity")
"""The budgets that need the layers' spectral fits."""

HILL: dict[str, int | None] = {"alphapruning": None}
"""Budget -> eigenvalues in its Hill estimates (None: half of them), where these are not the default's 20."""

# Upper end of the regime, signal, beta for attn, mlp and other, and the sparsity s_d at which the weights reach 1.
_REGIMES: tuple[tuple[float, str, dict[str, float], float], ...] = (
    (0.20, "alpha", {"attn": 0.50, "mlp": 0.50, "other": 0.50}, 0.30),
    (0.40, "edge", {"attn": 1.00, "mlp": 1.00, "other": 1.00}, 0.50),
    (0.55, "edge", {"attn": 1.25, "mlp": 1.25, "other": 1.25}, 0.70),
    (1.00, "edge", {"attn": 1.00, "mlp": 2.00, "other": 1.50}, 0.85),
)
_WEIGHT_FLOOR = 0.1


def edge_weights(layers: Sequence[Layer], sparsity: float, *, alpha_regime: bool = False) -> list[float]:
    """w_l = max(0.1, 1 + beta_type [1 - s / s_d]_+ z_l), with z the standardised signal of the layer.

    Args:
        layers: all layers that share the budget.
        sparsity: target s in [0, 1); chooses the regime.
        alpha_regime: at s <= 0.20 use the Hill exponents as published; by default plain magnitude (all 1), which
            lost less accuracy there.

    Returns:
        One weight per layer, >= 0.1; 1 for a layer without a signal, and for all when the signals do not vary.

    Source: docs/math.md (22); population deviation over the layers that have a signal, layers not weighted by size.
    """
    _, signal, beta, vanish = next(regime for regime in _REGIMES if sparsity <= regime[0])
    strength = max(0.0, 1.0 - sparsity / vanish)
    values = [getattr(layer, signal) for layer in layers]
    known = [value for value in values if value is not None]
    if not known:
        return [1.0] * len(layers)
    deviation = pstdev(known)
    if (signal == "alpha" and not alpha_regime) or strength == 0.0 or deviation <= 1e-12 * abs(fmean(known)):
        return [1.0] * len(layers)
    mean = fmean(known)
    return [
        1.0 if value is None else max(_WEIGHT_FLOOR, 1.0 + beta[layer.type] * strength * (value - mean) / deviation)
        for layer, value in zip(layers, values, strict=True)
    ]


_SPREAD = 0.3


def alpha_ratios(layers: Sequence[Layer], sparsity: float) -> list[float]:
    """Each layer's sparsity before any is cut at 1: eta ((1 - tau) + 2 tau (alpha_l - min) / (max - min)).

    eta makes the mean over all entries the asked sparsity. tau is 0.3 (the published choice for magnitude), and 1 - s
    where that is smaller, since a layer that loses everything cuts the model in two.

    Args:
        layers: with Hill exponents over half of their eigenvalues; one without is put in the middle.
        sparsity: target s in [0, 1).

    Returns:
        One number per layer, > 0; equal ones where the exponents do not vary.

    Source: Lu et al. 2024, arXiv 2410.10912, section 3; docs/math.md (24).
    """
    known = [layer.alpha for layer in layers if layer.alpha is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    tau = min(_SPREAD, 1 - sparsity) if high - low > 1e-12 * high else 0.0
    places = [0.5 if layer.alpha is None or tau == 0 else (layer.alpha - low) / (high - low) for layer in layers]
    shares = [1 - tau + 2 * tau * place for place in places]
    sizes = [layer.size for layer in layers]
    mean = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    return [max(sparsity, 1e-12) * share / mean for share in shares]


def cycle_targets(layers: Sequence[Layer], cycle: int) -> list[float]:
    """How many entries each layer loses in one cycle: ((1 - mu) gamma)^(1.5 / i) rho_i nnz, rho_i = 0.06 * 1.02^i.

    If no layer has any randomness, all count as fully random, so that a cycle always removes something.

    Args:
        layers: with `zeros` as they were before the cycle.
        cycle: i >= 1.

    Returns:
        One number per layer, >= 0, at most the entries left.

    Source: docs/math.md (23); the exponent makes early cycles discriminate between layers. Biases are not counted.
    """
    rate = min(1.0, 0.06 * 1.02**cycle)
    factors = [layer.randomness ** (1.5 / cycle) for layer in layers]
    if not any(factors):
        factors = [1.0] * len(layers)
    return [factor * rate * (layer.size - layer.zeros) for factor, layer in zip(factors, layers, strict=True)]
