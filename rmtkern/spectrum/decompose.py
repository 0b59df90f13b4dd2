"""Singular values and vectors of many matrices of one shape: exact through the Gram matrix, or randomised.

Written once against the array API. Two facts decide the routes (measured, docs/math.md): an fp32 Gram matrix gives the
bulk to 1e-7 when no spike dwarfs it, and batched LAPACK is a loop, so only the GEMMs gain from batching.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from array_api_compat import device, is_numpy_array

from rmtkern.arrays import Array, as_computable, cast, namespace, to_numpy

__all__ = ["randomized_svd", "singular_values", "svd"]

_FP32_SAFE = 30.0  # s_1 / median s up to which an fp32 Gram matrix keeps the edge to 1e-6 (tests/spectrum)
_FP64_SAFE = 1e5  # the same for a float64 Gram matrix; beyond it only a direct SVD keeps the small values
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


def _gram(matrix: Array) -> tuple[Array, float]:
    """Gram matrix [p, p] of the matrix divided by a power of two, and that divisor; 1 unless squares would not fit."""
    xp = namespace(matrix)
    wide = _wide(matrix)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        gram = wide @ xp.matrix_transpose(wide)
        mean_square = float(xp.linalg.trace(gram)) / (matrix.shape[0] * matrix.shape[1])
    if _SAFE_MEAN_SQUARE[0] <= mean_square <= _SAFE_MEAN_SQUARE[1]:
        return gram, 1.0
    scale = _scale(matrix)
    wide = wide / scale
    return wide @ xp.matrix_transpose(wide), float(scale[0, 0])


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


def _roots(grams: Array) -> np.ndarray:
    """Square roots of the eigenvalues of [B, p, p], descending, float64."""
    xp = namespace(grams)
    solve = _numpy_solver() if is_numpy_array(grams) else xp.linalg.eigvalsh
    return np.sqrt(np.maximum(to_numpy(solve(grams)), 0.0))[:, ::-1].copy()


def singular_values(batch: Array | Sequence[Array]) -> np.ndarray:
    """All singular values of a batch of matrices, descending.

    The Gram matrix is formed in float32 for float32 input and in float64 otherwise; a matrix whose largest value dwarfs
    its bulk is computed again with more precision. The bulk is what is exact: values below about 1e-3 (float32 route)
    of the largest carry the rounding of squaring.

    Args:
        batch: [B, N, K] floating point, NumPy, CuPy or torch; or B matrices [N, K], which saves stacking them.

    Returns:
        [B, min(N, K)] NumPy float64, in the unit of the weights.

    Raises:
        ValueError: not a batch of matrices of one shape, or an empty dimension.

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
    if len(shapes) != 1:
        raise ValueError(f"expected one or more matrices of one shape, got shapes {sorted(shapes)}")
    matrices = [as_computable(matrix) for matrix in parts]
    for matrix in matrices:
        _check(matrix, 2)
    xp = namespace(matrices[0])
    if matrices[0].dtype != xp.float32:
        matrices = [cast(matrix, xp.float64) for matrix in matrices]
    grams, scales = zip(*map(_gram, matrices), strict=True)
    scale = np.array(scales)
    values = _roots(xp.stack(grams))
    spread = values[:, 0] / np.maximum(np.median(values, axis=1), 1e-300)
    for index in np.flatnonzero(spread > _FP32_SAFE) if matrices[0].dtype == xp.float32 else ():
        gram, scale[index] = _gram(cast(matrices[index], xp.float64))
        values[index] = _roots(gram[None, ...])[0]
        spread[index] = values[index, 0] / max(np.median(values[index]), 1e-300)
    for index in np.flatnonzero((spread > _FP64_SAFE) & (values[:, 0] > 0)):
        full = cast(matrices[index], xp.float64)
        exact = to_numpy(xp.linalg.svdvals(full / scale[index]))
        values[index] = np.where(exact > max(full.shape) * np.finfo(np.float64).eps * exact[0], exact, 0.0)
    return values * scale[:, None]


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition of one matrix in float64, W = U diag(s) Vh.

    Args:
        matrix: [N, K] floating point, NumPy, CuPy or torch.

    Returns:
        U [N, p], s [p] descending, Vh [p, K] with p = min(N, K), in the namespace that computes fastest (NumPy for CPU
        tensors).

    Raises:
        ValueError: not a matrix, or an empty dimension.

    Source: eigenvectors of the float64 Gram matrix, five times faster than LAPACK's SVD; a matrix with
    s_p < 1e-5 s_1, where that would lose the small vectors, goes to LAPACK's SVD. docs/math.md (8).
    """
    matrix = as_computable(matrix)
    _check(matrix, 2)
    xp = namespace(matrix)
    full = cast(matrix, xp.float64)
    scale = _scale(full)
    wide = _wide(full / scale)
    squares, vectors = xp.linalg.eigh(wide @ xp.matrix_transpose(wide))
    if float(squares[0]) > 1e-10 * float(squares[-1]):
        u = xp.flip(vectors, axis=-1)
        rest = xp.matrix_transpose(u) @ wide
        s = xp.linalg.vector_norm(rest, axis=-1)
        vh = rest / s[:, None]
    else:
        u, s, vh = xp.linalg.svd(wide, full_matrices=False)
    s = s * scale[0, 0]
    if full.shape[0] <= full.shape[1]:
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
    squares, vectors = xp.linalg.eigh(small @ xp.matrix_transpose(small))
    squares, vectors = xp.flip(squares, axis=-1)[:, :rank], xp.flip(vectors, axis=-1)[:, :, :rank]
    s = xp.sqrt(xp.where(squares > 0, squares, xp.zeros_like(squares)))
    safe = xp.where(s > 0, s, xp.ones_like(s))
    vh = (xp.matrix_transpose(vectors) @ small) / safe[:, :, None]
    return block @ vectors, s * scale[:, :, 0], vh
