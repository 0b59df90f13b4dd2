"""Singular values and vectors of many matrices at once: exact through the Gram matrix, or randomised.

Written once against the array API. Two facts decide the routes (measured, docs/math.md): an fp32 Gram matrix gives the
bulk to 1e-7 when no spike dwarfs it, and batched LAPACK is a loop, so only the GEMMs gain from batching.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from array_api_compat import device, is_numpy_array

from rmtkern.arrays import Array, as_computable, cast, namespace, shares_with_torch, through_torch, to_numpy

__all__ = ["randomized_svd", "singular_values", "svd"]

_FP32_SAFE = 30.0  # s_1 / median s up to which an fp32 Gram matrix keeps the edge to 1e-6 (tests/spectrum)
_FP64_SAFE = 1e5  # the same for a float64 Gram matrix; beyond it only a direct SVD keeps the small values
_FP32_FLOOR = 1e-3  # s_i / s_1 below which an fp32 Gram matrix cannot tell a value from 0
_LOW = 10  # one value in so many may lie below that; the window of a fit leaves out more, unless alpha is smaller
_JACOBI = 32  # largest side of the eigenproblems that CuPy solves itself, by Jacobi's method (docs/gpu.md)
_EPS = float(np.finfo(np.float64).eps)
_SAFE_MEAN_SQUARE = (1e-24, 1e24)  # of the entries: squares neither underflow nor overflow in float32


def _check(batch: Array, ndim: int) -> None:
    if batch.ndim != ndim or 0 in batch.shape:
        wanted = "[B, N, K]" if ndim == 3 else "[N, K]"
        raise ValueError(f"expected {wanted} with no empty dimension, got shape {tuple(batch.shape)}")


def _wide(batch: Array) -> Array:
    """The batch with its short side first, so that its Gram matrix is the small one."""
    xp = namespace(batch)
    return batch if batch.shape[-2] <= batch.shape[-1] else xp.matrix_transpose(batch)


def _scale(batch: Array) -> Array:
    """Power of two near the largest absolute entry of each matrix, so that dividing is exact; [..., 1, 1]."""
    xp = namespace(batch)
    largest = xp.max(xp.abs(batch), axis=(-2, -1), keepdims=True)
    return 2.0 ** xp.round(xp.log2(xp.where(largest > 0, largest, xp.ones_like(largest))))


def _grams(matrices: Sequence[Array]) -> tuple[Array, np.ndarray]:
    """Gram matrices [B, p, p] of the matrices, each divided by a power of two, and those divisors [B].

    The divisor is 1 unless squares would not fit. The host waits once for all.
    """
    xp = namespace(*matrices)
    wides = [_wide(matrix) for matrix in matrices]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        grams = [wide @ xp.matrix_transpose(wide) for wide in wides]
        traces = to_numpy(xp.stack([xp.linalg.trace(gram) for gram in grams]))
    mean_squares = traces / [matrix.shape[0] * matrix.shape[1] for matrix in matrices]
    scales = np.ones(len(grams))
    for index, mean_square in enumerate(mean_squares):
        if not _SAFE_MEAN_SQUARE[0] <= mean_square <= _SAFE_MEAN_SQUARE[1]:
            scale = _scale(matrices[index])
            wide = wides[index] / scale
            grams[index], scales[index] = wide @ xp.matrix_transpose(wide), float(scale[0, 0])
    return xp.stack(grams), scales


@cache
def _numpy_solver() -> Callable[[np.ndarray], np.ndarray]:
    """Ascending eigenvalues of [B, p, p]: SciPy's evr driver where it is installed (1.6x in fp32), else NumPy's."""
    try:
        from scipy.linalg import eigh
    except ImportError:
        return np.linalg.eigvalsh
    return lambda grams: np.stack(
        [eigh(gram, eigvals_only=True, driver="evr", lower=False, check_finite=False) for gram in grams]
    )


def _by_torch(grams: Array) -> bool:
    """Whether torch solves an eigenproblem of CuPy's: it has cuSOLVER's batched solver, CuPy only Jacobi's."""
    return grams.shape[-1] > _JACOBI and shares_with_torch(grams)


def _roots(grams: Array) -> np.ndarray:
    """Square roots of the eigenvalues of [B, p, p], descending, float64."""
    if is_numpy_array(grams):
        values = _numpy_solver()(grams)
    elif _by_torch(grams):
        values = through_torch("eigvalsh", grams)
    else:
        values = namespace(grams).linalg.eigvalsh(grams)
    return np.sqrt(np.maximum(to_numpy(values), 0.0))[:, ::-1].copy()


def _eigh(grams: Array) -> tuple[Array, Array]:
    """Eigenvalues [B, p], ascending, and eigenvectors [B, p, p] of symmetric matrices."""
    if _by_torch(grams):
        values, vectors = through_torch("eigh", grams)
    else:
        values, vectors = namespace(grams).linalg.eigh(grams)
    return values, vectors


def singular_values(batch: Array | Sequence[Array]) -> np.ndarray:
    """All singular values of many matrices, descending.

    The Gram matrix is formed in float32 for float32 input and in float64 otherwise; a matrix whose largest value dwarfs
    its bulk, or of which more than a tenth may be 0, is computed again with more precision. The bulk is what is exact:
    values below about 1e-3 (float32 route) of the largest carry the rounding of squaring. In the other routes values
    that may be rounding alone, of the computation or of the entries, are 0.

    Args:
        batch: [B, N, K] floating point, NumPy, CuPy or torch; or B matrices [N, K], which saves stacking them and may
            differ in shape if the shorter sides are equal: their Gram matrices are one batch.

    Returns:
        [B, min(N, K)] NumPy float64, in the unit of the weights.

    Raises:
        ValueError: not a batch of matrices with one shorter side, or an empty dimension.

    Source: docs/math.md (8).
    """
    if isinstance(batch, list | tuple) and all(hasattr(matrix, "ndim") for matrix in batch):
        parts: list[Array] = list(batch)
    else:
        stacked: Array = batch
        namespace(stacked)
        _check(stacked, 3)
        parts = [stacked[index, ...] for index in range(stacked.shape[0])]
    shapes = {tuple(matrix.shape) for matrix in parts}
    if len({min(shape, default=0) for shape in shapes}) != 1:
        raise ValueError(f"expected one or more matrices with one shorter side, got shapes {sorted(shapes)}")
    matrices = [as_computable(matrix) for matrix in parts]
    for matrix in matrices:
        _check(matrix, 2)
    xp = namespace(matrices[0])
    if matrices[0].dtype != xp.float32:
        matrices = [cast(matrix, xp.float64) for matrix in matrices]
    grams, scale = _grams(matrices)
    values = _roots(grams)
    spread = values[:, 0] / np.maximum(np.median(values, axis=1), 1e-300)
    again = np.arange(len(values))
    if matrices[0].dtype == xp.float32:
        low = values[:, -1 - values.shape[1] // _LOW] < _FP32_FLOOR * values[:, 0]
        again = np.flatnonzero(low | (spread > _FP32_SAFE))
        if len(again):
            grams, scale[again] = _grams([cast(matrices[index], xp.float64) for index in again])
            values[again] = _roots(grams)
            spread[again] = values[again, 0] / np.maximum(np.median(values[again], axis=1), 1e-300)
    precise = values[again]
    values[again] = np.where(precise > math.sqrt(values.shape[1] * _EPS) * precise[:, :1], precise, 0.0)
    for index in np.flatnonzero((spread > _FP64_SAFE) & (values[:, 0] > 0)):
        full = cast(matrices[index], xp.float64)
        exact = to_numpy(xp.linalg.svdvals(full / scale[index]))
        values[index] = np.where(exact > _rounding(exact, matrices[index]), exact, 0.0)
    return values * scale[:, None]


def _rounding(values: np.ndarray, matrix: Array) -> float:
    """What singular values may be by rounding alone: of LAPACK's SVD, or of the entries to the matrix's dtype.

    Independent rounding errors of at most eps / 2 in relative terms have a norm of at most about eps / (2 sqrt 3)
    ||W||_F (1 / sqrt N + 1 / sqrt K), or a few times that if they are as unequal as a product's of two vectors.
    """
    rows, columns = matrix.shape
    eps = float(namespace(matrix).finfo(matrix.dtype).eps)
    entries = eps * float(np.linalg.norm(values)) * (rows**-0.5 + columns**-0.5)
    return max(entries, max(rows, columns) * _EPS * float(values[0]))


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition in float64, W = U diag(s) Vh, of one matrix or of a batch.

    Args:
        matrix: [N, K] or [B, N, K] floating point, NumPy, CuPy or torch.

    Returns:
        U [..., N, p], s [..., p] descending, Vh [..., p, K] with p = min(N, K), in the namespace that computes fastest
        (NumPy for CPU tensors).

    Raises:
        ValueError: not a matrix or a batch, or an empty dimension.

    Source: eigenvectors of the float64 Gram matrix, five times faster than LAPACK's SVD; a matrix with
    s_p < 1e-5 s_1, where that would lose the small vectors, goes to LAPACK's SVD. docs/math.md (8).
    """
    matrix = as_computable(matrix)
    if matrix.ndim != 3:
        _check(matrix, 2)
        u, s, vh = svd(matrix[None, ...])
        return u[0, ...], s[0, ...], vh[0, ...]
    _check(matrix, 3)
    xp = namespace(matrix)
    full = cast(matrix, xp.float64)
    scale = _scale(full)
    wide = _wide(full / scale)
    squares, vectors = _eigh(wide @ xp.matrix_transpose(wide))
    u = xp.flip(vectors, axis=-1)
    rest = xp.matrix_transpose(u) @ wide
    s = xp.linalg.vector_norm(rest, axis=-1)
    vh = rest / xp.where(s > 0, s, xp.ones_like(s))[..., None]
    lost = squares[:, 0] <= 1e-10 * squares[:, -1]
    for index in np.flatnonzero(to_numpy(lost)):
        u[index, ...], s[index, ...], vh[index, ...] = xp.linalg.svd(wide[index, ...], full_matrices=False)
    s = s * scale[..., 0]
    if full.shape[-2] <= full.shape[-1]:
        return u, s, vh
    return xp.matrix_transpose(vh), s, xp.matrix_transpose(u)


def _orthonormal(block: Array) -> Array:
    """Orthonormal columns spanning those of `block` [B, N, R]: shifted CholeskyQR, then CholeskyQR2."""
    xp = namespace(block)
    tiny = float(xp.finfo(block.dtype).eps)
    eye = xp.eye(block.shape[-1], dtype=block.dtype, device=device(block))
    for shift in (1e2 * tiny, 1e1 * tiny, 1e1 * tiny):
        gram = xp.matrix_transpose(block) @ block
        trace = xp.sum(xp.sum(gram * eye, axis=-1), axis=-1)[:, None, None]
        trace = xp.where(trace > 0, trace, xp.ones_like(trace))
        lower = xp.linalg.cholesky(gram + shift * trace * eye)
        block = xp.matrix_transpose(xp.linalg.solve(lower, xp.matrix_transpose(block)))
    return block


def randomized_svd(
    batch: Array, rank: int, *, oversample: int = 8, n_iter: int = 4, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Leading singular triples of a batch of matrices, by GEMMs, CholeskyQR2 and one small eigenproblem.

    Args:
        batch: [B, N, K] float32 or float64, NumPy, CuPy or torch; computed where it lives.
        rank: number of triples R, 1 <= R <= min(N, K).
        oversample: extra directions carried along, >= 0.
        n_iter: power iterations, >= 0; 4 recovers spikes 1.2x above the edge to 1e-3.
        seed: of the random test matrix; the result is deterministic.

    Returns:
        U [B, N, R], s [B, R] descending, Vh [B, R, K], same namespace and dtype as `batch`.

    Raises:
        ValueError: the rank is out of range, or the input is not a batch of matrices.

    Source: Halko, Martinsson & Tropp (2011), algorithm 4.4; Fukaya et al. (2020) for shifted CholeskyQR3.
    """
    _check(batch, 3)
    xp = namespace(batch)
    short = min(batch.shape[1:])
    if not 1 <= rank <= short:
        raise ValueError(f"rank must lie in 1..{short} for matrices of shape {tuple(batch.shape[1:])}, got {rank}")
    width = min(rank + max(oversample, 0), short)
    scale = _scale(batch)
    matrices = batch / scale
    start = np.random.default_rng(seed).standard_normal((batch.shape[2], width))
    test = xp.asarray(start, dtype=batch.dtype, device=device(batch))
    block = _orthonormal(matrices @ test)
    for _ in range(n_iter):
        block = _orthonormal(xp.matrix_transpose(matrices) @ block)
        block = _orthonormal(matrices @ block)
    small = xp.matrix_transpose(block) @ matrices
    squares, vectors = _eigh(small @ xp.matrix_transpose(small))
    squares, vectors = xp.flip(squares, axis=-1)[:, :rank], xp.flip(vectors, axis=-1)[:, :, :rank]
    s = xp.sqrt(xp.where(squares > 0, squares, xp.zeros_like(squares)))
    safe = xp.where(s > 0, s, xp.ones_like(s))
    vh = (xp.matrix_transpose(vectors) @ small) / safe[:, :, None]
    return block @ vectors, s * scale[:, :, 0], vh
