"""T1 and T2 of the method: the laws against quadrature, sampled spectra and published quantiles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from rmtkern.spectrum import law

RATIOS = (1e-3, 0.1, 0.25, 1 / 3, 0.9, 1.0, 1.1, 3.0, 50.0)

# c, F(0.5), F(1), q(.25), median, q(.75), q(.9): computed independently by quadrature, 8 digits
VECTORS = [
    (1 / 4, 0.18637841, 0.55339008, 0.57662855, 0.91600407, 1.36548068, 1.75142283),
    (1 / 3, 0.24260926, 0.56178348, 0.50971576, 0.8876808, 1.41308783, 1.87724712),
    (1.0, 0.44059566, 0.60899778, 0.15625253, 0.65277594, 1.61139969, 2.59457121),
    (3.0, 0.66666667, 0.70299926, 0.0, 0.0, 1.52914728, 3.87151721),
]


@pytest.mark.parametrize("vector", VECTORS)
def test_published_vectors(vector):
    c, at_half, at_one, *quantiles = vector
    np.testing.assert_allclose(law.cdf([0.5, 1.0], c), [at_half, at_one], atol=1e-8)
    np.testing.assert_allclose(law.quantile([0.25, 0.5, 0.75, 0.9], c), quantiles, atol=1e-8)


@pytest.mark.parametrize("c", RATIOS)
def test_cdf_is_the_integral_of_the_density(c):
    lower, upper = law.edges(c)
    atom = max(0.0, 1 - 1 / c)
    centre, half = (lower + upper) / 2, (upper - lower) / 2

    def integrand(angle):  # x = centre - half cos(angle) removes the square-root ends
        return float(law.density(centre - half * np.cos(angle), c)) * half * np.sin(angle)

    for angle in (0.3, 1.0, 2.0, 3.0):
        mass = integrate.quad(integrand, 0, angle, epsabs=1e-12, limit=200)[0]
        # 1e-9: the closed form cancels to eps / c at c = 1e-3, and quad is asked for 1e-12
        assert abs(float(law.cdf(centre - half * np.cos(angle), c)) - atom - mass) < 1e-9


@pytest.mark.parametrize("c", RATIOS)
def test_moments(c):
    lower, upper = law.edges(c, 2.0)
    theta = (np.arange(200_000) + 0.5) / 200_000 * np.pi  # midpoint rule: spectral accuracy for this integrand
    x = (lower + upper) / 2 - (upper - lower) / 2 * np.cos(theta)
    weight = law.density(x, c, 2.0) * (upper - lower) / 2 * np.sin(theta) * np.pi / 200_000
    assert np.sum(weight) == pytest.approx(min(1.0, 1 / c), rel=1e-6)
    assert np.sum(weight * x) == pytest.approx(2.0, rel=1e-6)
    assert np.sum(weight * x * x) - 4 == pytest.approx(4 * c, rel=1e-5)


@given(c=st.floats(1e-3, 50), u=st.floats(0, 1), sigma2=st.floats(1e-12, 1e12))
@settings(deadline=None, max_examples=200)
def test_quantile_inverts_cdf(c, u, sigma2):
    x = float(law.quantile(u, c, sigma2))
    atom = max(0.0, 1 - 1 / c)
    lower, upper = law.edges(c, sigma2)
    assert x == 0.0 or lower * (1 - 1e-9) <= x <= upper * (1 + 1e-9)
    # 1e-8: the lower edge itself rounds to one ulp, and next to it (c near 1) F grows like a square root
    assert abs(float(law.cdf(x, c, sigma2)) - max(u, atom)) < 1e-8


@pytest.mark.parametrize("u", [1e-12, 1e-6, 1e-3])
def test_quantiles_at_the_hard_edge_keep_their_digits(u):
    # c = 1: F(x) = (2 / pi) sqrt(x) + O(x^1.5), so x = (pi u / 2)^2 (1 + O(u^2))
    x = float(law.quantile(u, 1.0))
    assert x == pytest.approx((np.pi * u / 2) ** 2, rel=1e-8 + 10 * u * u)
    assert float(law.cdf(x, 1.0)) == pytest.approx(u, rel=1e-9)


def test_outside_the_support():
    assert law.cdf([-1.0, 0.0, 0.1, 2.3, 100.0], 0.25).tolist() == [0, 0, 0, 1, 1]
    assert float(law.cdf(0.0, 4.0)) == pytest.approx(0.75)
    assert law.density([-1.0, 0.0, 0.1, 2.3], 0.25).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("p", "n"), [(600, 600), (400, 1600)])
def test_sampled_spectrum_follows_the_law(p, n, rng):
    eigenvalues = np.linalg.eigvalsh(np.cov(rng.standard_normal((p, n)), bias=True))
    empirical = (np.arange(p) + 0.5) / p
    # bulk rigidity: deviations are of order log(p)/p, about 0.01 at p = 400
    assert np.max(np.abs(empirical - law.cdf(eigenvalues, p / n))) < 0.012


def test_tracy_widom_published_quantiles():
    # Bejan (2005) and RMTstat: percentage points of F1 to five digits
    levels = [0.05, 0.10, 0.50, 0.90, 0.95, 0.99]
    points = [-3.18038, -2.78243, -1.26857, 0.45014, 0.97932, 2.02345]
    np.testing.assert_allclose(law.tracy_widom_quantile(levels), points, atol=5e-4)
    np.testing.assert_allclose(law.tracy_widom_cdf(law.tracy_widom_quantile(levels)), levels, atol=1e-9)


def test_tracy_widom_table_between_grid_points():
    from benchmarks.make_tracy_widom import cdf

    for s in (-4.71, -2.33, -1.01, 0.37, 1.99):
        assert abs(float(law.tracy_widom_cdf(s)) - cdf(s)) < 1e-5


@pytest.mark.parametrize(("p", "n"), [(100, 100), (100, 400)])
def test_tracy_widom_edge_coverage(p, n, rng):
    largest = np.array([np.linalg.norm(rng.standard_normal((p, n)), 2) ** 2 / n for _ in range(300)])
    for beta in (0.1, 0.5):
        rate = np.mean(largest > law.tracy_widom_edge((p, n), 1.0, beta))
        # binomial sd 0.029 at beta = .5; the second-order bias at p = 100 is up to -0.09 (method: .417 at p = 200)
        assert beta - 0.16 < rate < beta + 0.09


def test_tracy_widom_edge_known_values():
    def edge(shape):
        return [law.tracy_widom_edge(shape, 1.0, b) for b in (0.1, 0.5, 0.8)]

    np.testing.assert_allclose(edge((768, 768)), [4.013525, 3.961882, 3.931395], atol=5e-6)
    np.testing.assert_allclose(edge((3072, 768)), [2.254608, 2.237013, 2.226625], atol=5e-6)


def test_legacy_exponent_reproduces_the_published_edge():
    # ratio of sigma_plus to the Marchenko-Pastur edge, published code against the corrected formula
    for shape, beta, right, legacy in [
        ((768, 768), 0.1, 1.00169, 1.00357),
        ((768, 768), 0.8, 0.99139, 0.98168),
        ((64, 576), 0.8, 0.98017, 0.98580),
        ((128, 128), 0.5, 0.98414, 0.96613),
    ]:
        plain = law.singular_value_edge(shape, 1.0) ** 2 / max(shape)
        assert (law.tracy_widom_edge(shape, 1.0, beta) / plain) ** 0.5 == pytest.approx(right, abs=1.1e-5)
        assert (law.tracy_widom_edge(shape, 1.0, beta, legacy=True) / plain) ** 0.5 == pytest.approx(legacy, abs=1.1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: law.edges(0.0), "aspect ratio c must be a positive"),
        (lambda: law.edges(1.0, -1.0), "sigma2 must be a positive"),
        (lambda: law.quantile([1.5], 0.5), "levels must lie in"),
        (lambda: law.tracy_widom_quantile(0.0), "Tracy-Widom levels must lie in"),
        (lambda: law.tracy_widom_edge((4, 4), 1.0, 1.0), "beta must lie in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
