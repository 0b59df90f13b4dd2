"""C6: linear regression on many features of which few matter, regularised in four ways.

Outputs are sums of a constant and eight harmonics of period 10 with random amplitudes; the features are the 490 lowest
harmonics of period 20, orthonormal over the training inputs, so least squares finds the true matrix plus iid noise.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.paper.finding import Finding
from rmtkern.spectrum.denoise import truncate
from rmtkern.spectrum.fit import fit_spectrum

__all__ = ["c6"]

FEATURES, OUTPUTS, SAMPLES, NOISE = 490, 490, 1190, 2.5
"""Inferred, as the paper gives none: 490 from a figure, the others so that least squares is as bad as there."""
RANK = 17  # 8 harmonics, sine and cosine, and a constant


def c6(seed: int = 0) -> Iterator[Finding]:
    """Cutting the fitted matrix at its Marchenko-Pastur edge is better than L1, which is better than L2 or nothing."""
    rng = np.random.default_rng(seed)
    true = np.zeros((OUTPUTS, FEATURES))
    used = [0, *(2 * k - 1 + part for k in range(2, 2 * 8 + 1, 2) for part in (0, 1))]  # period 10 in one of 20
    true[:, used] = 6.0 * rng.standard_normal((OUTPUTS, RANK))
    per_entry = NOISE / SAMPLES**0.5  # sd of an entry of the least-squares matrix: the features are orthonormal
    found = true + per_entry * rng.standard_normal(true.shape)
    held_out = true + per_entry * rng.standard_normal(true.shape)  # of as many other samples, to choose a strength

    def error(matrix: np.ndarray) -> float:
        """Mean square error of an output over all inputs, without noise."""
        return float(((matrix - true) ** 2).sum() / OUTPUTS)

    def best(candidates: Iterator[np.ndarray]) -> np.ndarray:
        return min(candidates, key=lambda matrix: float(((matrix - held_out) ** 2).sum()))

    ridge = best(found / (1 + strength) for strength in np.geomspace(1e-5, 1e-1, 30))
    lasso = best(
        np.sign(found) * np.maximum(np.abs(found) - strength, 0) for strength in per_entry * np.geomspace(0.1, 6, 40)
    )
    fit = fit_spectrum(found, edge="tw")
    cut = truncate(found, int(fit.n_spikes or 0))
    errors = {"none": error(found), "L2": error(ridge), "L1": error(lasso), "MP": error(cut)}
    published = {"none": 2.574, "L2": 2.563, "L1": 0.416, "MP": 0.149}
    highs = {"none": None, "L2": errors["none"], "L1": errors["L2"] / 2, "MP": errors["L1"]}
    for name, high in highs.items():
        yield Finding("C6", "test error", name, errors[name], 0, high, published[name])
    yield Finding("C6", "singular values above the edge", "rank 17", float(fit.n_spikes or 0), RANK, RANK, RANK)
    yield Finding("C6", "fit error mu", "before cutting", float(fit.mu or 0), 0, 0.02)
