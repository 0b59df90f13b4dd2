"""The highest sparsity that a target allows, by bisection, and the record of what was tried.

It prunes and scores through functions that it is given; it knows no model, no method and no data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

__all__ = ["Target", "Trial", "search"]

ROUNDING = 1e-9
"""Accuracies are counts over a number of images, below 10^8: differences of floats err by less than this."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Trial:
    """One sparsity that was tried.

    Args:
        sparsity: asked of the selected weights, [0, 1).
        accuracy: top-1 of the model pruned to it, [0, 1].
    """

    sparsity: float
    accuracy: float


@dataclass(frozen=True)
class Target:
    """What was asked, and every trial in the order in which it was made.

    Args:
        max_drop: accuracy that may be lost, [0, 1).
        tolerance: width in sparsity at which the search stopped.
        accuracy: top-1 of the model before pruning, [0, 1].
        images: behind every accuracy.
        trials: all of them; the plan's sparsity is the highest one within `max_drop`.
    """

    max_drop: float
    tolerance: float
    accuracy: float
    images: int
    trials: tuple[Trial, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_drop", "[0"), ("tolerance", "(0")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not 0 <= value < 1 or (least == "(0" and value == 0):
                raise ValueError(f"{name}: expected a fraction in {least}, 1), got {value}")

    def allows(self, accuracy: float) -> bool:
        """Whether the drop to `accuracy` is at most `max_drop`."""
        return self.accuracy - accuracy <= self.max_drop + ROUNDING


def search(
    target: Target, least: float, attempt: Callable[[float], float], keep: Callable[[], Made]
) -> tuple[Made, Target]:
    """Bisection for the highest sparsity that a target allows.

    Accuracy is taken to fall with sparsity; where it does not, the result is allowed all the same, and a higher
    sparsity may be too: the trials tell.

    Args:
        target: what is asked, without trials.
        least: sparsity that the weights have already, [0, 1).
        attempt: prunes the dense weights to a sparsity in [0, 1) and returns the top-1, [0, 1].
        keep: returns what the last attempt made; called only where that was within the target.

    Returns:
        What was kept of the highest sparsity within the target, and the target with its trials.

    Raises:
        ValueError: not even `least` is within the target (a method may change weights beside removing some).
    """
    trials: list[Trial] = []
    best: list[Made] = []

    def allowed(sparsity: float) -> bool:
        trials.append(Trial(sparsity, attempt(sparsity)))
        if target.allows(trials[-1].accuracy):
            best[:] = [keep()]
            return True
        return False

    low, high = least, 1.0
    while high - low > target.tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    if not best and not allowed(least):
        raise ValueError(
            f"no sparsity keeps the accuracy within max_drop={target.max_drop:g} of {target.accuracy:.2%}: "
            + ", ".join(f"{trial.accuracy:.2%} at {trial.sparsity:.4g}" for trial in trials)
            + "; allow a larger drop, or take another method"
        )
    return best[0], replace(target, trials=tuple(trials))
