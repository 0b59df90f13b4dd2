"""A spectrum as it is drawn: bars of eigenvalues, the fitted law's curve, its edge and the spikes beyond. Pure data."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rmtkern.spectrum import law
from rmtkern.spectrum.fit import SpectralFit

__all__ = ["SpectralHistogram", "spectral_histogram"]

REACH = 2.2
"""The axis ends at this many times the edge, or at the largest eigenvalue if that comes first."""
MARGIN = 1.05

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SpectralHistogram:
    """Eigenvalues s^2 / n of a weight in units of its sigma2, n = max(N, K), under the fitted Marchenko-Pastur law.

    Args:
        bounds: of the bars, ascending [bars + 1]; the axis ends at the last one.
        heights: density in each bar [bars]; together the share of eigenvalues on the axis.
        edge: lambda_plus / sigma2.
        bulk: share of eigenvalues at or below the edge, [0, 1].
        c: aspect ratio min(N, K) / n of the law, (0, 1].
        spikes: eigenvalues above the edge on the axis, ascending.
        beyond: how many lie beyond the axis.
    """

    bounds: Float
    heights: Float
    edge: float
    bulk: float
    c: float
    spikes: Float
    beyond: int

    @property
    def reach(self) -> float:
        """Where the axis ends."""
        return float(self.bounds[-1])

    def curve(self, points: int) -> tuple[Float, Float]:
        """The law's density times `bulk` at so many points from 0 to the edge."""
        x = np.linspace(1e-6, self.edge, points)
        return x, self.bulk * law.density(x, self.c)


def spectral_histogram(singular_values: np.ndarray, fit: SpectralFit, name: str, bars: int = 44) -> SpectralHistogram:
    """Sort a weight's eigenvalues into bars and spikes.

    Args:
        singular_values: all min(N, K) of them [weight], any order.
        fit: of the same matrix, with a bulk (sigma2 > 0).
        name: of the layer, for the message.
        bars: how many, >= 1.

    Returns:
        The histogram.

    Raises:
        ValueError: the fit has no bulk.

    Source: docs/math.md (2), (9).
    """
    if not fit.sigma2 or fit.lambda_plus is None:
        raise ValueError(f"{name}: the fit has no bulk ({', '.join(fit.flags)}); nothing to draw")
    p, n = min(fit.shape), max(fit.shape)
    values = np.sort(np.asarray(singular_values, dtype=np.float64) ** 2) / n / fit.sigma2
    edge = fit.lambda_plus / fit.sigma2
    bounds = np.linspace(0, min(float(values[-1]), REACH * edge) * MARGIN, bars + 1)
    counts, _ = np.histogram(values, bins=bounds)
    spikes = values[values > edge]
    shown = spikes[spikes <= bounds[-1]]
    heights = counts / (p * (bounds[1] - bounds[0]))
    bulk = float((values <= edge).mean())
    return SpectralHistogram(bounds, heights, edge, bulk, p / n, shown, len(spikes) - len(shown))
