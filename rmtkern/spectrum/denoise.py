"""What can be done to singular values and vectors below the noise edge: sparsify, shrink, truncate, split.

Each function takes a dense matrix (the first two also a batch) and returns the same kind; none knows models or layouts.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from array_api_compat import device
from numpy.typing import ArrayLike, NDArray

from rmtkern.arrays import Array, as_computable, cast, check_finite, like, namespace
from rmtkern.spectrum.decompose import svd
from rmtkern.spectrum.sparsify import recompose, sparsify

__all__ = [
    "debias_singular_values",
    "hard_threshold",
    "legacy_shrinkage",
    "legacy_stage",
    "legacy_theta",
    "shrink",
    "shrink_singular_values",
    "sparsify_haar",
    "sparsify_singular_vectors",
    "split",
    "truncate",
]


def _decompose(W: Array, *, batches: bool = False) -> tuple[Any, Array, Array, Array]:
    matrix = as_computable(W, "W")
    if not namespace(matrix).isdtype(matrix.dtype, "real floating"):
        raise TypeError(f"W: expected floating point, which the result is given back in, got {W.dtype}; convert it")
    if matrix.ndim != 2 and not (batches and matrix.ndim == 3):
        wanted = "a matrix [N, K] or a batch [B, N, K]" if batches else "a matrix [N, K]"
        raise ValueError(f"expected {wanted}, got shape {tuple(matrix.shape)}")
    check_finite(matrix, "W")
    u, s, vh = svd(matrix)
    return namespace(u), u, s, vh


def _check_edge(sigma_plus: float) -> None:
    if not (math.isfinite(sigma_plus) and sigma_plus > 0):
        raise ValueError(f"sigma_plus must be a positive finite number, got {sigma_plus!r}")


def _of_each(numbers: float | Sequence[float], W: Array, name: str) -> list[float]:
    """One number for each matrix of W: as it is for a single one, repeated or checked for a batch."""
    count = W.shape[0] if getattr(W, "ndim", 2) == 3 else 1
    given: Any = [numbers] * count if np.ndim(numbers) == 0 else numbers
    found = [float(number) for number in given]
    if len(found) != count:
        raise ValueError(f"{name}: expected one number or one for each of {count} matrices, got {len(found)}")
    return found


def _column(numbers: list[float], s: Array) -> Array:
    """One number for each matrix as an array that broadcasts against its singular values s [R] or [B, R]."""
    column = namespace(s).asarray(numbers, dtype=s.dtype, device=device(s))
    return column[:, None] if s.ndim == 2 else column


def legacy_theta(cycle: int, shape: tuple[int, int]) -> float:
    """The published threshold scale of one cycle, theta = 1.125e-5 * 0.06 * 1.02^cycle * N * K.

    Not scale-free: it grows with N K while the entries of singular vectors shrink.

    Source: reference code of arXiv 2503.01922; docs/math.md (16).
    """
    return 1.125e-5 * 0.06 * 1.02**cycle * shape[0] * shape[1]


def legacy_shrinkage(cycle: int, mu: float) -> float:
    """By how much one published stage of training on the regulariser alone shrinks every weight of a layer.

    5000 + 1000 (i - 1) steps of Adam, whose rate falls from 5e-8 to 0 as a cosine and whose gradient is g sign(w):
    delta = 2.5e-8 (4000 + 1000 i) g / (g + 1e-8), g = 5e-7 / (1 + 1e4 mu / i).

    Args:
        cycle: i >= 1.
        mu: share of the layer's eigenvalues above the edge, [0, 1]: the noisier a layer, the more it shrinks.

    Returns:
        In the units of the weights, > 0.

    Raises:
        ValueError: a number out of range.

    Source: reference code of arXiv 2503.01922; docs/math.md (23).
    """
    if not (cycle >= 1 and 0 <= mu <= 1):
        raise ValueError(f"need cycle >= 1 and mu in [0, 1]; got {cycle!r}, {mu!r}")
    gradient = 5e-7 / (1 + 1e4 * mu / cycle)
    return 2.5e-8 * (4000 + 1000 * cycle) * gradient / (gradient + 1e-8)


def legacy_stage(matrix: torch.Tensor, cycle: int, mu: float, strength: float = 1.0) -> torch.Tensor:
    """One published stage of training on the regulariser alone, entry by entry, as AdamW carries it out.

    The objective 5e-7 sum |w| + 2e-7 sum w^2 + 1e-6 h ||W||_F with h = 1 / (1 + 1e4 mu / i), gradients times h once
    more, moves no entry far enough to change its own gradient g, which Adam divides by its size: each shrinks by
    S g / (g + 1e-8) with S = 2.5e-8 (K + 1), the sum of the rates of K = 5000 + 1000 (i - 1) steps, and by the decay
    2e-7 S |w|.
    `legacy_shrinkage` is this without the terms that grow with |w|.

    Args:
        matrix: [N, K] of a floating-point dtype.
        cycle: i >= 1.
        mu: fit error of the layer, [0, 1].
        strength: factor of what each entry shrinks by, >= 0.

    Returns:
        [N, K] in the dtype of `matrix`; what would change sign is 0.

    Raises:
        ValueError: a number out of range.

    Source: reference code of arXiv 2503.01922; docs/math.md (23).
    """
    if not (cycle >= 1 and 0 <= mu <= 1 and strength >= 0):
        raise ValueError(f"need cycle >= 1, mu in [0, 1] and strength >= 0; got {cycle!r}, {mu!r}, {strength!r}")
    size = matrix.detach().abs().double()
    h, rates = 1 / (1 + 1e4 * mu / cycle), 2.5e-8 * (5001 + 1000 * (cycle - 1))
    norm = float(size.square().sum().sqrt())
    gradient = h * (5e-7 + 4e-7 * size + (1e-6 * h / norm) * size if norm > 0 else torch.zeros_like(size))
    less = strength * rates * (gradient / (gradient + 1e-8) + 2e-7 * size)
    return ((size - less).clamp_min_(0) * matrix.detach().sign()).to(matrix.dtype)


def sparsify_singular_vectors(
    W: Array,
    sigma_plus: float | Sequence[float],
    theta: float,
    *,
    power: float = 30,
    floor: float = 1 / 750,
    haar_units: bool = False,
) -> Array:
    """Zero small coordinates of singular vectors deep in the bulk, and recompose (the T_i rule).

    T_i = theta max(floor, (1 - s_i / sigma_plus)_+^power); coordinates of u_i and v_i below T_i in magnitude become 0.

    Args:
        W: [N, K], or a batch [B, N, K], floating point; NumPy, torch or CuPy.
        sigma_plus: noise edge for singular values [weight], > 0; of a batch one, or one for each matrix.
        theta: threshold scale, >= 0; an absolute coordinate, or with `haar_units` a multiple of the standard deviation
            1/sqrt(N) (u) and 1/sqrt(K) (v) of a random unit vector.
        power: of the ramp into the bulk, > 0.
        floor: smallest share of theta, also applied to spikes, [0, 1].
        haar_units: see theta.

    Returns:
        Dense, shape, kind and dtype of W. On a GPU the product is that of `sparsify`, in float32.

    Raises:
        TypeError: W is no array of floating-point numbers.
        ValueError: W is not finite or neither a matrix nor a batch, or a parameter is out of range.

    Source: arXiv 2503.01922, singular-vector sparsification; docs/math.md (16).
    """
    edges = _of_each(sigma_plus, W, "sigma_plus")
    for edge in edges:
        _check_edge(edge)
    if not (theta >= 0 and power > 0 and 0 <= floor <= 1):
        raise ValueError(f"need theta >= 0, power > 0, floor in [0, 1]; got {theta!r}, {power!r}, {floor!r}")
    xp, u, s, vh = _decompose(W, batches=True)
    depth = 1 - s / _column(edges, s)
    ramp = xp.where(depth > 0, depth, xp.zeros_like(depth)) ** power
    limit = theta * xp.where(ramp > floor, ramp, xp.ones_like(ramp) * floor)
    return _recompose(W, u, s, vh, limit, haar_units)


def sparsify_haar(
    W: Array,
    sigma_plus: float | Sequence[float],
    *,
    z: float = 0.5,
    power: float = 3,
    scale: float | Sequence[float] = 1.0,
) -> Array:
    """Zero coordinates of bulk singular vectors that a random unit vector would have anyway, and recompose.

    For s_i < sigma_plus: coordinates below z scale (1 - s_i / sigma_plus)^power / sqrt(dim) become 0; spikes are kept.

    Args:
        W: [N, K], or a batch [B, N, K], floating point; NumPy, torch or CuPy.
        sigma_plus: noise edge for singular values [weight], > 0; of a batch one, or one for each matrix.
        z: threshold in standard deviations of a random unit vector's coordinate, >= 0.
        power: of the ramp into the bulk, > 0.
        scale: the layer's factor, alpha_l / mean(alpha), > 0; of a batch one, or one for each matrix.

    Returns:
        Dense, shape, kind and dtype of W. On a GPU the product is that of `sparsify`, in float32.

    Raises:
        TypeError: W is no array of floating-point numbers.
        ValueError: W is not finite or neither a matrix nor a batch, or a parameter is out of range.

    Source: reference code of arXiv 2606.02608, z-score variant; docs/math.md (17).
    """
    edges, scales = _of_each(sigma_plus, W, "sigma_plus"), _of_each(scale, W, "scale")
    for edge in edges:
        _check_edge(edge)
    if not (z >= 0 and power > 0 and min(scales) > 0):
        raise ValueError(f"need z >= 0, power > 0, scale > 0; got {z!r}, {power!r}, {scale!r}")
    xp, u, s, vh = _decompose(W, batches=True)
    depth = 1 - s / _column(edges, s)
    limit = z * _column(scales, s) * xp.where(depth > 0, depth, xp.zeros_like(depth)) ** power
    return _recompose(W, u, s, vh, limit, haar_units=True)


def _recompose(W: Array, u: Array, s: Array, vh: Array, limit: Array, haar_units: bool) -> Array:
    limit_u = limit / math.sqrt(u.shape[-2]) if haar_units else limit
    limit_v = limit / math.sqrt(vh.shape[-1]) if haar_units else limit
    parts = (u, s, vh, limit_u, limit_v)
    if isinstance(u, torch.Tensor) and W.dtype != torch.float64:  # on a GPU, which has a kernel for it
        return sparsify(*(cast(part, torch.float32) for part in parts), dtype=W.dtype).weight
    return like(recompose(*parts), W)


def _discriminant(y: NDArray[np.float64], c: float) -> NDArray[np.float64]:
    return np.sqrt(np.maximum((y * y - 1 - c) ** 2 - 4 * c, 0.0))


def debias_singular_values(s: ArrayLike, shape: tuple[int, int], sigma2: float) -> NDArray[np.float64]:
    """Planted singular values behind observed ones: inverse of the BBP map; 0 at and below the noise edge.

    Args:
        s: observed singular values [weight], >= 0.
        shape: (N, K) of the matrix.
        sigma2: variance of one noise entry [weight^2], > 0.

    Returns:
        Estimates of the planted values [weight], the shape of s.

    Source: Baik, Ben Arous & Peche (2005); Benaych-Georges & Nadakuditi (2012); docs/math.md (18).
    """
    p, n = min(shape), max(shape)
    c, unit = p / n, math.sqrt(sigma2 * n)
    y = np.asarray(s, dtype=np.float64) / unit
    planted = unit * np.sqrt(
        (y * y - 1 - c + _discriminant(y, c)) / 2, where=y > 1 + math.sqrt(c), out=np.zeros_like(y)
    )
    return np.where(y > 1 + math.sqrt(c), planted, 0.0)


def shrink_singular_values(s: ArrayLike, shape: tuple[int, int], sigma2: float) -> NDArray[np.float64]:
    """Frobenius-optimal shrinkage eta(y) = sqrt((y^2 - 1 - c)^2 - 4 c) / y in noise units; 0 below the edge.

    Args and result as `debias_singular_values`.

    Source: Gavish & Donoho (2017); docs/math.md (19).
    """
    p, n = min(shape), max(shape)
    c, unit = p / n, math.sqrt(sigma2 * n)
    y = np.asarray(s, dtype=np.float64) / unit
    outside = y > 1 + math.sqrt(c)
    return np.where(outside, unit * _discriminant(y, c) / np.where(outside, y, 1.0), 0.0)


def hard_threshold(shape: tuple[int, int], sigma2: float) -> float:
    """Gavish-Donoho optimal hard threshold for singular values [weight] at known noise variance [weight^2].

    Source: Gavish & Donoho (2014), eq. 11; docs/math.md (20).
    """
    p, n = min(shape), max(shape)
    c = p / n
    ratio = math.sqrt(2 * (c + 1) + 8 * c / (c + 1 + math.sqrt(c * c + 14 * c + 1)))
    return ratio * math.sqrt(sigma2 * n)


_SHRINKERS = {
    "frobenius": shrink_singular_values,
    "debias": debias_singular_values,
    "hard": lambda s, shape, sigma2: np.where(np.asarray(s) > hard_threshold(shape, sigma2), s, 0.0),
}


def shrink(W: Array, sigma2: float, kind: str = "frobenius") -> Array:
    """Denoise a matrix by shrinking its singular values; the bulk is removed.

    Zeroing the whole bulk is known to destroy trained transformers (docs/math.md): a tool for study and low rank.

    Args:
        W: [N, K] floating point; NumPy, torch or CuPy.
        sigma2: variance of one noise entry [weight^2], > 0.
        kind: "frobenius" (optimal for squared error), "debias" (planted values) or "hard" (Gavish-Donoho threshold).

    Returns:
        [N, K] dense, kind and dtype of W.

    Raises:
        TypeError: W is no array of floating-point numbers.
        ValueError: W is not a finite matrix, sigma2 is not positive, or the kind is unknown.
    """
    if kind not in _SHRINKERS:
        raise ValueError(f"unknown shrinkage {kind!r}; expected one of {', '.join(_SHRINKERS)}")
    if not (math.isfinite(sigma2) and sigma2 > 0):
        raise ValueError(f"sigma2 must be a positive finite number, got {sigma2!r}")
    xp, u, s, vh = _decompose(W)
    values = [float(value) for value in s]
    kept = _SHRINKERS[kind](np.array(values), (u.shape[0], vh.shape[1]), sigma2)
    return like((u * xp.asarray(kept, dtype=u.dtype, device=device(u))[None, :]) @ vh, W)


def truncate(W: Array, rank: int) -> Array:
    """Nearest matrix of a given rank, 0 <= rank <= min(N, K); kind and dtype of W.

    Source: Eckart & Young (1936).
    """
    short = min(W.shape) if W.ndim == 2 else 0
    if not 0 <= rank <= short:
        raise ValueError(f"rank must lie in 0..{short} for shape {tuple(W.shape)}, got {rank}")
    _, u, s, vh = _decompose(W)
    return like((u[:, :rank] * s[None, :rank]) @ vh[:rank, :], W)


def split(
    W: Array,
    sigma_plus: float,
    ratio: float,
    *,
    min_dim: int = 10,
) -> tuple[Array, Array] | None:
    """Two factors W ~ B A that keep all spikes and a share of the bulk, or None where they would not be smaller.

    inner = max(int((p - n_spikes) ratio) + n_spikes, min_dim); A = sqrt(S) V^T, B = U sqrt(S).

    Args:
        W: [N, K] floating point; NumPy, torch or CuPy.
        sigma_plus: noise edge for singular values [weight], > 0.
        ratio: share of bulk triples kept, largest first, [0, 1].
        min_dim: smallest inner dimension, >= 1.

    Returns:
        (B [N, inner], A [inner, K]) of W's kind and dtype, or None if (N + K) inner >= N K.

    Raises:
        TypeError: W is no array of floating-point numbers.
        ValueError: W is not a finite matrix, or a parameter is out of range.

    Source: arXiv 2503.01922, layer splitting; docs/math.md (21).
    """
    _check_edge(sigma_plus)
    if not (0 <= ratio <= 1 and min_dim >= 1):
        raise ValueError(f"need ratio in [0, 1] and min_dim >= 1; got {ratio!r}, {min_dim!r}")
    xp, u, s, vh = _decompose(W)
    spikes = int(xp.sum(xp.astype(s > sigma_plus, xp.int64)))
    p = s.shape[0]
    inner = min(max(int((p - spikes) * ratio) + spikes, min_dim), p)
    if (u.shape[0] + vh.shape[1]) * inner >= u.shape[0] * vh.shape[1]:
        return None
    root = xp.sqrt(s[:inner])
    return like(u[:, :inner] * root[None, :], W), like(root[:, None] * vh[:inner, :], W)
