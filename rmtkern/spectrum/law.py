"""The Marchenko-Pastur law for every aspect ratio, in closed form, and the Tracy-Widom law (beta = 1) from a table.

Pure mathematics on NumPy float64; formulas and sources are in docs/math.md.
"""

from functools import lru_cache
from importlib.resources import files
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "cdf",
    "density",
    "edges",
    "quantile",
    "singular_value_edge",
    "tracy_widom_cdf",
    "tracy_widom_edge",
    "tracy_widom_quantile",
]

Float = NDArray[np.float64]
_NORMAL = NormalDist()


def _check(c: float, sigma2: float) -> None:
    if not (np.isfinite(c) and c > 0):
        raise ValueError(f"aspect ratio c must be a positive finite number, got {c!r}")
    if not (np.isfinite(sigma2) and sigma2 > 0):
        raise ValueError(f"entry variance sigma2 must be a positive finite number, got {sigma2!r}")


def edges(c: float, sigma2: float = 1.0) -> tuple[float, float]:
    """Edges of the continuous part, lambda_-+ = sigma2 (1 -+ sqrt c)^2.

    Args:
        c: aspect ratio M/N of the matrix W [N, M] behind X = W^T W / N, > 0.
        sigma2: variance of one entry [weight^2], > 0.

    Returns:
        (lambda_minus, lambda_plus) [weight^2].

    Raises:
        ValueError: c or sigma2 is not positive and finite.

    Source: Marchenko & Pastur (1967); docs/math.md (1).
    """
    _check(c, sigma2)
    root = np.sqrt(c)
    return float(sigma2 * (1 - root) ** 2), float(sigma2 * (1 + root) ** 2)


def density(x: ArrayLike, c: float, sigma2: float = 1.0) -> Float:
    """Density of the continuous part at x [weight^2]; 0 outside the edges; the atom at 0 (c > 1) is not in it.

    Source: Marchenko & Pastur (1967); docs/math.md (2).
    """
    lower, upper = edges(c, sigma2)
    at = np.asarray(x, dtype=np.float64)
    inside = (at > lower) & (at < upper) & (at > 0)
    safe = np.where(inside, at, 1.0)
    value = np.sqrt(np.maximum((upper - safe) * (safe - lower), 0.0)) / (2 * np.pi * c * sigma2 * safe)
    return np.where(inside, value, 0.0)


def _cdf_of_angle(theta: Float, c: float) -> Float:
    """Mass of the continuous part below the point at angle theta in [0, pi]; docs/math.md (3)."""
    a = np.sqrt(c)
    total = (1 + c) * theta / (2 * c) + np.sin(theta) / a
    if c != 1:
        total = total - abs(1 - c) / c * np.arctan2((1 + a) * np.sin(theta / 2), abs(1 - a) * np.cos(theta / 2))
    return total / np.pi


def cdf(x: ArrayLike, c: float, sigma2: float = 1.0) -> Float:
    """Distribution function, atom max(0, 1 - 1/c) at 0 included.

    Args:
        x: points [weight^2], any shape.
        c: aspect ratio, > 0.
        sigma2: variance of one entry [weight^2], > 0.

    Returns:
        Values in [0, 1], the shape of x.

    Source: closed form of the integral of Marchenko & Pastur (1967); docs/math.md (3).
    """
    _check(c, sigma2)
    at = np.asarray(x, dtype=np.float64)
    atom = max(0.0, 1 - 1 / c)
    # half-angle form: arccos would lose half the digits at the edges
    half = np.sqrt(np.clip((at / sigma2 - (1 - np.sqrt(c)) ** 2) / (4 * np.sqrt(c)), 0, 1))
    theta = 2 * np.arcsin(half)
    value = np.clip(atom + _cdf_of_angle(theta, c), 0.0, 1.0)
    return np.where(at < 0, 0.0, value)


@lru_cache(maxsize=64)
def _angle_table(c: float) -> tuple[Float, Float]:
    theta = np.linspace(0, np.pi, 20_001)
    return _cdf_of_angle(theta, c), theta


def quantile(u: ArrayLike, c: float, sigma2: float = 1.0) -> Float:
    """Quantile function, the inverse of `cdf`: 0 for levels inside the atom, lambda_plus at level 1.

    Args:
        u: levels in [0, 1], any shape.
        c: aspect ratio, > 0.
        sigma2: variance of one entry [weight^2], > 0.

    Returns:
        Points [weight^2], the shape of u, to about 1e-12 relative.

    Raises:
        ValueError: a level is outside [0, 1].

    Source: the angle form of the distribution function inverted by a table and three Newton steps; docs/math.md (4).
    """
    _check(c, sigma2)
    level = np.asarray(u, dtype=np.float64)
    if not bool(np.all((level >= 0) & (level <= 1))):
        raise ValueError("quantile levels must lie in [0, 1]")
    atom = max(0.0, 1 - 1 / c)
    mass = np.minimum(np.maximum(level - atom, 0.0), min(1.0, 1 / c))
    a = np.sqrt(c)
    table, angles = _angle_table(float(c))
    theta = np.interp(mass, table, angles)
    for _ in range(3):
        slope = 2 / np.pi * np.sin(theta) ** 2 / np.maximum((1 - a) ** 2 + 4 * a * np.sin(theta / 2) ** 2, 1e-300)
        step = (_cdf_of_angle(theta, c) - mass) / np.maximum(slope, 1e-300)
        theta = np.where(slope > 1e-9, np.clip(theta - step, 0, np.pi), theta)
    value = sigma2 * ((1 - a) ** 2 + 4 * a * np.sin(theta / 2) ** 2)
    return np.where(level <= atom, 0.0 if atom > 0 else edges(c, sigma2)[0], value)


@lru_cache(maxsize=1)
def _tracy_widom_table() -> tuple[Float, Float]:
    """Grid s and Phi^-1(F1(s)), which is smooth and nearly linear in s."""
    with files("rmtkern.spectrum").joinpath("tracy_widom.npz").open("rb") as file, np.load(file) as data:
        return data["s"].astype(np.float64), data["probit"].astype(np.float64)


def tracy_widom_cdf(s: ArrayLike) -> Float:
    """Distribution function F1 of the Tracy-Widom law for real matrices, absolute error below 1e-5.

    Source: Tracy & Widom (1996); table from the Fredholm determinant of Ferrari & Spohn (2005); docs/math.md (5).
    """
    grid, probit = _tracy_widom_table()
    z = np.interp(np.asarray(s, dtype=np.float64), grid, probit)
    return np.vectorize(_NORMAL.cdf, otypes=[np.float64])(z)


def tracy_widom_quantile(level: ArrayLike) -> Float:
    """Quantiles of the Tracy-Widom law for real matrices.

    Args:
        level: probabilities in [1e-8, 1 - 1e-8], any shape.

    Returns:
        Quantiles, absolute error below 1e-5.

    Raises:
        ValueError: a level is outside the range of the table.

    Source: as `tracy_widom_cdf`.
    """
    at = np.asarray(level, dtype=np.float64)
    if not bool(np.all((at >= 1e-8) & (at <= 1 - 1e-8))):
        raise ValueError("Tracy-Widom levels must lie in [1e-8, 1 - 1e-8]")
    grid, probit = _tracy_widom_table()
    return np.asarray(np.interp(np.vectorize(_NORMAL.inv_cdf, otypes=[np.float64])(at), probit, grid))


def tracy_widom_edge(shape: tuple[int, int], sigma2: float, beta: float, *, legacy: bool = False) -> float:
    """Upper eigenvalue threshold that pure noise exceeds with probability about beta.

    Args:
        shape: (N, K) of the weight; the order does not matter.
        sigma2: variance of one entry [weight^2], > 0.
        beta: probability that the largest noise eigenvalue lies above, in (0, 1).
        legacy: use the published code's exponent, (1 + sqrt c)^4 / 3 instead of (1 + sqrt c)^(4/3).

    Returns:
        lambda_plus for eigenvalues s^2 / max(N, K) [weight^2].

    Raises:
        ValueError: beta is outside (0, 1).

    Source: Johnstone (2001); Ke, Ma & Lin (2021); docs/math.md (6).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta!r}")
    p, n = min(shape), max(shape)
    c = p / n
    _check(c, sigma2)
    reach = (1 + np.sqrt(c)) ** 4 / 3 if legacy else (1 + np.sqrt(c)) ** (4 / 3)
    shift = float(tracy_widom_quantile(1 - beta)) * n ** (-2 / 3) * c ** (-1 / 6) * reach
    return float(sigma2 * ((1 + np.sqrt(c)) ** 2 + shift))


def singular_value_edge(shape: tuple[int, int], sigma2: float) -> float:
    """Largest singular value that pure noise reaches, sigma_plus = sigma (sqrt N + sqrt K).

    Args:
        shape: (N, K) of the weight; the order does not matter.
        sigma2: variance of one entry [weight^2], >= 0.

    Returns:
        sigma_plus [weight], comparable with the singular values of W itself.

    Source: Marchenko & Pastur (1967); docs/math.md (7).
    """
    return float(np.sqrt(sigma2) * (np.sqrt(shape[0]) + np.sqrt(shape[1])))
