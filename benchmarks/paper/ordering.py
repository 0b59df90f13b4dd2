"""Whether one training is better than another, judged over test images and seeds at once. It trains nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["Difference", "compare", "decide"]


@dataclass(frozen=True)
class Difference:
    """By how much the second of two trainings is better.

    Args:
        points: of top-1, in the mean over seeds and images.
        low: of the 95 % interval.
        high: of the same.
        p: of a test for no difference, two-sided.
        seeds: how many.
    """

    points: float
    low: float
    high: float
    p: float
    seeds: int


def compare(first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """The paired difference of two trainings, with images and seeds both taken as samples.

    Its variance is that of the mean over images (of differences averaged over seeds) plus that of the mean over seeds;
    what images and seeds have in common is in both, so the interval is rather too wide. Student's t with the degrees of
    freedom of Welch and Satterthwaite. With one seed it is about these two networks, not about the trainings.

    Args:
        first: which images were classified right, 0 or 1, [seeds, images].
        second: the same of the other training, on the same images, from the same seeds.
    """
    difference = 100 * (second - first)
    seeds, images = difference.shape
    variances = [(float(difference.mean(0).var(ddof=1)) / images, images - 1)]
    if seeds > 1:
        variances.append((float(difference.mean(1).var(ddof=1)) / seeds, seeds - 1))
    total, points = sum(variance for variance, _ in variances), float(difference.mean())
    if total == 0:
        return Difference(points, points, points, float(points == 0), seeds)
    freedom = total**2 / sum(variance**2 / left for variance, left in variances)
    error = total**0.5
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Difference(points, points - half, points + half, float(2 * stats.t.sf(abs(points) / error, freedom)), seeds)


def decide(found: Sequence[Difference], level: float = 0.05) -> list[str]:
    """A verdict for each claim that the second is better, all of them together at `level` (Holm).

    Returns:
        "holds", "reversed" or "undecided" for each.
    """
    verdicts = ["undecided"] * len(found)
    for rank, index in enumerate(sorted(range(len(found)), key=lambda index: found[index].p)):
        if found[index].p > level / (len(found) - rank):
            break
        verdicts[index] = "holds" if found[index].points > 0 else "reversed"
    return verdicts
