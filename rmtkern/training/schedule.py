"""The learning rate at a step: linear warm-up, then half a cosine. Nothing else is decided here."""

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, floor: float) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: from 0.
        steps: of the whole run, >= 1.
        peak: reached when the warm-up ends.
        warmup: fraction of all steps, [0, 1); the first step has peak / (warm-up steps + 1).
        floor: fraction of the peak that the cosine falls to, [0, 1].

    Returns:
        A number in (0, peak].
    """
    warm = round(warmup * steps)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
