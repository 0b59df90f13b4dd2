"""spectral_histogram: bars, edge, bulk and spikes against counts made one by one."""

import numpy as np
import pytest

from rmtkern.spectrum.fit import fit_spectra, fit_spectrum, spectra_of
from rmtkern.spectrum.histogram import spectral_histogram


@pytest.fixture
def spiked(rng):
    matrix = rng.standard_normal((120, 200))
    for strength in (20.0, 24.0, 60.0):
        left, right = rng.standard_normal(120), rng.standard_normal(200)
        matrix += strength * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    return matrix


def test_bars_are_counts(spiked):
    fit = fit_spectrum(spiked)
    values = np.linalg.svd(spiked, compute_uv=False)
    found = spectral_histogram(values, fit, "W", bars=10)
    scaled = values**2 / 200 / fit.sigma2
    for low, high, height in zip(found.bounds, found.bounds[1:], found.heights, strict=False):
        inside = sum(low <= value < high for value in scaled)
        assert height == pytest.approx(inside / 120 / (high - low))
    assert found.edge == pytest.approx((1 + np.sqrt(120 / 200)) ** 2) and found.c == 0.6
    above = sorted(value for value in scaled if value > found.edge)
    assert found.bulk == pytest.approx(1 - len(above) / 120)
    assert found.spikes == pytest.approx([value for value in above if value <= found.reach])
    assert found.beyond == len(above) - len(found.spikes) >= 1 and len(found.spikes) >= 1
    assert found.reach == pytest.approx(2.2 * 1.05 * found.edge)


def test_the_curve_has_the_area_of_the_bulk(spiked):
    found = spectral_histogram(np.linalg.svd(spiked, compute_uv=False), fit_spectrum(spiked), "W")
    x, y = found.curve(2000)
    assert np.trapezoid(y, x) == pytest.approx(found.bulk, rel=0.002) and x[-1] == found.edge


def test_without_a_bulk():
    fit = fit_spectrum(np.zeros((30, 40)))
    with pytest.raises(ValueError, match=r"layer: the fit has no bulk \(all_zero\); nothing to draw"):
        spectral_histogram(np.zeros(30), fit, "layer")


def test_spectra_are_those_of_the_fits(spiked, rng):
    weights = {"b": spiked, "a": rng.standard_normal((40, 30)), "c": rng.standard_normal((120, 200))}
    found = spectra_of(weights, show_progress=False)
    assert list(found) == ["b", "a", "c"]
    for name, values in found.items():
        np.testing.assert_allclose(values, np.linalg.svd(weights[name], compute_uv=False), rtol=1e-8)
    assert list(fit_spectra(weights, show_progress=False)) == ["b", "a", "c"]
