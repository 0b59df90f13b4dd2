"""A pattern and a share of zeros for each layer: the least loss for the time that all of them may take together.

It knows what entries cost and how long patterns take, both measured elsewhere; which entries go it does not say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rmtkern.models import PrunableWeight
from rmtkern.pruning.budget import LEAST_KEPT
from rmtkern.pruning.pattern import divides, parse_pattern, unit_of, unit_scores, whole_units
from rmtkern.pruning.sensitivity import Sensitivity
from rmtkern.pruning.times import LayerTimes, PatternTimes

__all__ = ["Choice", "cheapest_steps", "choose_patterns", "losses_of"]

_STEPS = 64
"""The sparsities that are considered between measured ones are multiples of 1 / 64, and so are the bounds on them."""


@dataclass(frozen=True)
class Choice:
    """What one weight becomes.

    Args:
        pattern: as pattern.parse_pattern takes it; "unstructured" where it stays dense.
        units: entries, or mini-blocks, that are zero afterwards; of n:m, those that it takes.
        zeros: entries that are zero afterwards.
        ms: predicted time [ms].
        dense_ms: in its fastest dense form [ms].
        loss: predicted, in squared changes of the model's outputs.
    """

    pattern: str
    units: int
    zeros: int
    ms: float
    dense_ms: float
    loss: float


class _Forms:
    """What a weight may become, as it is at first."""

    def __init__(self, weight: PrunableWeight, cost: Sensitivity, patterns: Sequence[str], times: PatternTimes) -> None:
        self.times = _times_of(weight, times)
        matrix = weight.as_matrix()
        zero, entries = matrix == 0, cost.of(matrix)
        self.total, self.start = matrix.numel(), int(zero.sum())
        self.losses: dict[str, NDArray[np.float64]] = {}
        self.choices = [Choice("unstructured", self.start, self.start, self.times.dense_ms, self.times.dense_ms, 0.0)]
        for pattern in patterns:
            if not divides(pattern, weight.shape) or not self.times.ms.get(pattern):
                continue
            self.losses[pattern] = losses_of(entries, pattern)
            gone = int(whole_units(zero, unit_of(parse_pattern(pattern)[1])).sum())
            self.choices += [
                self.choice(pattern, units)
                for share in _shares(self.times.ms[pattern], fixed=":" in pattern)
                if (units := round(share * self.units(pattern))) >= gone or ":" in pattern
            ]

    def units(self, pattern: str) -> int:
        """How many units the weight has."""
        r, c = unit_of(parse_pattern(pattern)[1])
        return self.total // (r * c)

    def choice(self, pattern: str, units: int) -> Choice:
        """With so many units zero; less than a unit beyond the measured sparsities it takes the time of those."""
        count, losses, measured = self.units(pattern), self.losses[pattern], self.times.ms[pattern]
        low, high, share = min(measured), max(measured), units / count
        if low - 1 / count < share < high + 1 / count:
            share = min(max(share, low), high)
        ms = self.times.at(pattern, share)
        zeros = max(self.start, units * (self.total // count))
        loss = float(losses[0] if len(losses) == 1 else losses[units])
        dense_ms = self.times.dense_ms
        return Choice(pattern, units, zeros, dense_ms if ms is None else ms, dense_ms, loss)

    def trimmed(self, choice: Choice, zeros: int) -> Choice:
        """The choice with at most so many zeros less, by whole units."""
        if ":" in choice.pattern:
            return choice
        return self.choice(choice.pattern, choice.units - zeros // (self.total // self.units(choice.pattern)))


def choose_patterns(
    weights: Sequence[PrunableWeight],
    costs: Mapping[str, Sensitivity],
    patterns: Sequence[str],
    times: PatternTimes,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
) -> dict[str, Choice]:
    """For each weight the pattern and the share of zeros at which all of them lose least for the time that they take.

    All layers step from dense to sparser and coarser forms in the order of what a step loses for each ms that it saves,
    until the goal is reached; so no other choice of forms that is as fast loses less, by these losses and times
    (docs/math.md (32)). A layer that no pattern makes faster stays as it is.

    Args:
        weights: to be pruned; zeros stay.
        costs: of each weight, by name.
        patterns: to choose among; one that does not divide a weight is left out there.
        times: of each weight.
        sparsity: until so many entries of all weights are zero, [0, 1), met within one mini-block (n:m: one layer); or
        speedup: until they are together so many times as fast as all dense, >= 1.

    Returns:
        One choice for each weight, by name.

    Raises:
        ValueError: a weight without times or with those of another shape, or a goal that is not reached.
    """
    if (sparsity is None) == (speedup is None):
        raise ValueError("choose_patterns: expected a sparsity or a speedup, got both or none")
    forms = [_Forms(weight, costs[weight.name], patterns, times) for weight in weights]
    if sparsity is not None:
        chosen = _to_sparsity(forms, patterns, sparsity)
    else:
        chosen = _to_speedup(forms, patterns, speedup or 1.0)
    return {weight.name: one for weight, one in zip(weights, chosen, strict=True)}


def _to_sparsity(forms: Sequence[_Forms], patterns: Sequence[str], sparsity: float) -> list[Choice]:
    total, least = sum(layer.total for layer in forms), sum(layer.start for layer in forms)
    goal = round(sparsity * total)
    if least > goal:
        raise ValueError(
            f"sparsity {sparsity:g} asks for {goal} zeros, but {least} of {total} selected weights are zero already and"
            f" stay so; ask for at least {least / total:.6g}"
        )
    chosen, moved = _walk(forms, 1 - LEAST_KEPT * (1 - sparsity), lambda zeros, ms: zeros >= goal)
    zeros = sum(one.zeros for one in chosen)
    if zeros < goal:
        raise ValueError(
            f"sparsity {sparsity:g}: by these times {', '.join(patterns)} pay up to {zeros / total:.4g} here; ask for "
            "less, time higher sparsities, or take one pattern and no timings"
        )
    if moved is not None:
        chosen[moved] = forms[moved].trimmed(chosen[moved], zeros - goal)
    return chosen


def _to_speedup(forms: Sequence[_Forms], patterns: Sequence[str], speedup: float) -> list[Choice]:
    dense_ms, total = sum(layer.times.dense_ms for layer in forms), sum(layer.total for layer in forms)
    reached = 1.0
    for step in range(_STEPS, 0, -1):  # the largest bound on a layer's zeros that the outcome keeps
        most = step / _STEPS
        chosen, _ = _walk(forms, most, lambda zeros, ms: ms <= dense_ms / speedup)
        if most <= 1 - LEAST_KEPT * (1 - sum(one.zeros for one in chosen) / total):
            ms = sum(one.ms for one in chosen)
            if ms <= dense_ms / speedup:
                return chosen
            reached = dense_ms / ms
            break
    raise ValueError(
        f"linear_speedup {speedup:g}: by these times {', '.join(patterns)} reach {reached:.3g}x here if no layer keeps "
        "less than half as much as the others; ask for less, or time higher sparsities or coarser patterns"
    )


def _times_of(weight: PrunableWeight, times: PatternTimes) -> LayerTimes:
    found = times.of(weight.name)
    if found is None:
        raise ValueError(
            f"timings: no times of {weight.name}, which time_patterns did not see or cannot pack; add it to ignore=, "
            "or pass times of this model"
        )
    if found.shape != weight.shape:
        raise ValueError(
            f"timings: {weight.name} is {weight.shape[0]}x{weight.shape[1]} (out x in features), its times are of "
            f"{found.shape[0]}x{found.shape[1]}; pass times of this model"
        )
    return found


def losses_of(cost: Tensor, pattern: str) -> NDArray[np.float64]:
    """What a weight loses if its cheapest units go, as if no entry's cost depended on the others.

    Args:
        cost: [N, K] of the entries, >= 0.
        pattern: that divides it.

    Returns:
        [U + 1] losses of 0 ... U units that go, or of n:m a single one: what all its groups lose.
    """
    _, params = parse_pattern(pattern)
    r, c = unit_of(params)
    sums = unit_scores(cost, (r, c)).double() * (r * c)
    if "n" in params:
        n, m = params["n"], params["m"]
        return np.array([float(sums.reshape(-1, m).sort(dim=1).values[:, : m - n].sum())])
    return np.concatenate([[0.0], sums.flatten().sort().values.cumsum(0).cpu().numpy()])


def _shares(measured: Mapping[float, float], *, fixed: bool) -> list[float]:
    """The measured sparsities, and steps between them; of a pattern with one sparsity only that."""
    low, high = min(measured), max(measured)
    if fixed:
        return [low]
    return sorted({step / _STEPS for step in range(_STEPS) if low < step / _STEPS < high} | set(measured))


def cheapest_steps(forms: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[int, int]]:
    """The order in which layers change their form so that they lose least for the time that they take together.

    After each step, no choice of one form for each layer that takes at most as long loses less.

    Args:
        forms: of each layer (ms, loss); the first one has the least loss and is the form at the start.

    Returns:
        (layer, its new form) for each step, loss for each ms saved rising; ties by layer.

    Source: Everett 1963, generalised Lagrange multipliers; the steps are the sides of each layer's convex hull.
    """
    steps: list[tuple[float, int, int]] = []
    for layer, points in enumerate(forms):
        ms, loss = np.array(points, dtype=np.float64).T
        at, slope = 0, 0.0
        while True:
            saved, slopes = ms[at] - ms, np.full(len(ms), np.inf)
            np.divide(np.maximum(loss - loss[at], 0.0), saved, out=slopes, where=saved > 0)
            if not np.isfinite(slopes.min()):
                break
            slope, best = max(slope, float(slopes.min())), np.flatnonzero(slopes == slopes.min())
            at = int(best[ms[best].argmin()])
            steps.append((slope, layer, at))
    return [(layer, form) for _, layer, form in sorted(steps, key=lambda step: step[:2])]


def _walk(
    forms: Sequence[_Forms], most: float, enough: Callable[[int, float], bool]
) -> tuple[list[Choice], int | None]:
    """The choices after the first steps that are enough, all steps if none are, and the layer that moved last.

    No form with a larger share of zeros than `most` is taken.
    """
    kept = [
        [layer.choices[0], *(one for one in layer.choices[1:] if one.zeros <= most * layer.total)] for layer in forms
    ]
    chosen, moved = [layer[0] for layer in kept], None
    for layer, form in cheapest_steps([[(one.ms, one.loss) for one in layer] for layer in kept]):
        if enough(sum(one.zeros for one in chosen), sum(one.ms for one in chosen)):
            break
        chosen[layer], moved = kept[layer][form], layer
    return chosen, moved
