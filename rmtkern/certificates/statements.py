"""The certificates as formulas: from logit changes, margins and norms to what is guaranteed.

It decides which inequality says what; it knows no model and measures nothing.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "accuracy_bound",
    "budget",
    "entry_threshold",
    "gaussian_logit_bound",
    "keeps_label",
    "noise_bound",
    "objective_bound",
    "restoring_helps",
    "sharp_loss_bound",
    "slope_bound",
    "spread",
    "top_gap",
    "true_margin",
]


def spread(change: Tensor) -> Tensor:
    """osc(dz) = max_k dz_k - min_k dz_k of logit changes [S, C] as [S]; at most 2 ||dz||_inf, and a seminorm."""
    return change.amax(-1) - change.amin(-1)


def top_gap(logits: Tensor) -> Tensor:
    """Largest minus second largest logit of [S, C], C >= 2, as [S]."""
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def true_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the right class minus the largest other one, [S, C] and int64 [S] to [S]; right means > 0."""
    right = logits.gather(-1, labels[..., None])
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    return right[..., 0] - others.amax(-1)


def budget(eta: Tensor, theta: float = 0.0) -> float:
    """(1 - theta) B_T = (1 - theta) (2/|T|) sum_s eta_s: no mean cross-entropy moves by more.

    Cross-entropy is 2-Lipschitz in the sup norm of the logits, whatever the labels.

    Args:
        eta: [S] bounds on ||dz||_inf when all of R goes; summed over the steps of a multi-layer removal.
        theta: share of R that stays, [0, 1]; > 0 needs an `eta` that is linear in R (a Lipschitz bound times
            ||R psi||_inf, not a measured change).

    Source: CE path bound and its multi-layer form.
    """
    return (1 - theta) * 2 * float(eta.mean())


def sharp_loss_bound(spreads: Tensor, right_before: Tensor, right_after: Tensor) -> float:
    """Mean over images of (1 - min(p_c, p'_c)) osc(dz): a bound on the change of the mean cross-entropy.

    The gradient of cross-entropy sums to 0 and its positive part is 1 - p_c; the loss is convex along a segment of
    logits, so an end of the segment has the steepest slope. Never above `budget`.

    Args:
        spreads: [S] bounds on osc(dz).
        right_before: [S] probabilities of the labels before, [0, 1].
        right_after: the same after.
    """
    return float(((1 - torch.minimum(right_before, right_after)) * spreads).mean())


def keeps_label(gap: Tensor, spreads: Tensor) -> Tensor:
    """Whether the predicted label provably stays, bool [S]: top-2 gap > osc(dz), or > 2 eta with spreads = 2 eta."""
    return gap > spreads


def accuracy_bound(margin: Tensor, spreads: Tensor) -> float:
    """Share of images whose true margin is within osc(dz) (or 2 eta) of 0: accuracy moves by no more, up or down."""
    return float((margin.abs() <= spreads).double().mean())


def objective_bound(loss_bound: float, penalty_before: float, penalty_after: float) -> float:
    """A bound on J_after - J_before, J = CE + sum l2 A^2 + sum l1 |A|; negative means a certified decrease.

    With exact penalties this is every form at once: for a mask (S o R = 0) the difference of the penalties is
    l2 (1 - theta^2) ||R||^2 + l1 (1 - theta) ||R||_1, without one it has the cross term 2 l2 <S, R>, and over several
    removals the penalties add up.

    Args:
        loss_bound: on |dCE|, from `budget` or `sharp_loss_bound`.
        penalty_before: sum l2 A^2 + sum l1 |A|.
        penalty_after: the same afterwards.
    """
    return loss_bound + penalty_after - penalty_before


def restoring_helps(budget_all: float, budget_rest: float, penalty: float) -> bool:
    """Whether putting Q back lowers the bound on J: B(Q + P) - B(P) > l2 ||Q||^2 + l1 ||Q||_1.

    Args:
        budget_all: B(Q + P), everything removed.
        budget_rest: B(P), with Q restored.
        penalty: by which restoring Q raises the penalties.
    """
    return budget_all - budget_rest > penalty


def slope_bound(budget_: float, l2_removed: float, l1_removed: float) -> float:
    """An upper bound on the slope of J when the removal of R starts: B_T - 2 l2 ||R||^2 - l1 ||R||_1 (mask, S o R = 0).

    Negative: the dense weights are not stationary, removal is a descent direction. Conversely, weights whose slope is
    at least -eps obey 2 l2 ||R||^2 + l1 ||R||_1 <= B_T + eps.

    Args:
        budget_: B_T with a Lipschitz bound that holds near the dense weights; not a measured change.
        l2_removed: l2 ||R||_F^2.
        l1_removed: l1 ||R||_1.
    """
    return budget_ - 2 * l2_removed - l1_removed


def noise_bound(norms: Tensor, sigma: float, outputs: int, delta: float) -> Tensor:
    """||R psi_s||_inf <= ||psi_s||_2 sigma sqrt(2 log(2 n |T| / delta)) for all s, with probability 1 - delta.

    Holds only for R of independent Gaussian (or sigma-sub-Gaussian) entries that know nothing of the images.

    Args:
        norms: [S] values of ||psi_s||_2.
        sigma: standard deviation of one entry of R; sqrt(g / n) in the papers' scaling.
        outputs: n, rows of R.
        delta: (0, 1); over several layers, the deltas add up.

    Raises:
        ValueError: delta outside (0, 1), sigma negative, or outputs < 1.
    """
    _check_random(sigma, delta, outputs)
    return norms * (sigma * math.sqrt(2 * math.log(2 * outputs * len(norms) / delta)))


def gaussian_logit_bound(last: Tensor, hidden_norm: float, width: int) -> float:
    """2 sqrt(2) ||W3||_inf ||W1 s||_2 sqrt(log(2 N) / N): change of the logits W3 rho((S + R) rho(W1 s)) without R.

    Holds with probability >= 1 - 1/N over R of N rows and N(0, 1/N) entries that know nothing of s, for a 1-Lipschitz
    activation with rho(0) = 0.

    Args:
        last: W3 [classes, N].
        hidden_norm: ||W1 s||_2.
        width: N >= 1.
    """
    _check_random(0.0, 0.5, width)
    return 2 * math.sqrt(2) * float(last.abs().sum(1).max()) * hidden_norm * math.sqrt(math.log(2 * width) / width)


def entry_threshold(sigma: float, entries: int, delta: float) -> float:
    """The t = sigma sqrt(2 log(2 entries / delta)) that Gaussian noise exceeds in no entry, with probability 1 - delta.

    So keeping |W_ij| > t keeps no pure noise, and every entry with |S_ij| > 2 t is kept.

    Args:
        sigma: standard deviation of the noise in one entry.
        entries: N M, of the matrix.
        delta: (0, 1).

    Raises:
        ValueError: delta outside (0, 1), sigma negative, or entries < 1.
    """
    _check_random(sigma, delta, entries)
    return sigma * math.sqrt(2 * math.log(2 * entries / delta))


def _check_random(sigma: float, delta: float, count: int) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a probability in (0, 1), got {delta}")
    if not (math.isfinite(sigma) and sigma >= 0) or count < 1:
        raise ValueError(f"expected a standard deviation >= 0 and at least one entry, got {sigma} and {count}")
