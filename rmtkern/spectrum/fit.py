"""Fit the Marchenko-Pastur law to singular values (BEMA) and say how well it fits: SpectralFit.

Knows matrices and their names only. Symbols and formulas are in docs/math.md.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from numbers import Integral
from typing import Any, Self

import numpy as np

from rmtkern.arrays import Array, as_computable, check_finite, computing, namespace, returned
from rmtkern.progress import progress
from rmtkern.spectrum import law
from rmtkern.spectrum.decompose import randomized_svd, singular_values
from rmtkern.tables import Table, Tabulated

__all__ = [
    "FitOptions",
    "SpectralFit",
    "SpectralFits",
    "fit_singular_values",
    "fit_spectra",
    "fit_spectrum",
    "spectra_of",
    "spike_vectors",
]

SPIKE_BETA = 0.1  # level of the Tracy-Widom edge that counts spikes (Ke, Ma & Lin 2021)
MIN_CENTRAL = 8  # fewest central eigenvalues that are fitted
DEFAULT_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SpectralFit:
    """What the spectrum of one weight matrix W [N, K] says; None where a quantity is undefined (see `flags`).

    With p = min(N, K), n = max(N, K), c = p / n and singular values s_1 >= ... >= s_p.

    Attributes:
        shape: (N, K), out and in features.
        sigma2: variance of one entry of the random part [weight^2], >= 0.
        lambda_plus: upper edge of the eigenvalues s^2 / n [weight^2]: plain Marchenko-Pastur, or Tracy-Widom if asked.
        sigma_plus: the same edge for singular values [weight], sqrt(n lambda_plus).
        mu: fit error, sup-distance of empirical and fitted distribution on the central window, [0, 1].
        gamma: bulk fraction, share of singular values below sigma_plus, [0, 1].
        n_spikes: singular values above the Tracy-Widom edge at level 0.1.
        hill_alpha: power-law exponent of the tail (Hill estimator), > 1.
        stable_rank: sum s^2 / s_1^2, in [1, p].
        effective_rank: exp of the entropy of s^2 / sum s^2, in [1, p].
        flags: "too_small" (no fit), "all_zero", "no_bulk" (a central singular value is 0).

    Source: docs/math.md (9)-(15).
    """

    shape: tuple[int, int]
    sigma2: float | None
    lambda_plus: float | None
    sigma_plus: float | None
    mu: float | None
    gamma: float | None
    n_spikes: int | None
    hill_alpha: float | None
    stable_rank: float | None
    effective_rank: float | None
    flags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary of all fields."""
        return {**asdict(self), "shape": list(self.shape), "flags": list(self.flags)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; ValueError names missing or unknown fields."""
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            raise ValueError(f"SpectralFit needs exactly the fields {sorted(known)}, got {sorted(data)}")
        return cls(**{**data, "shape": tuple(data["shape"]), "flags": tuple(data["flags"])})


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How to fit; see `fit_spectrum`."""

    alpha: float = 0.25
    edge: str = "mp"
    beta: float = 0.1
    k_hill: int | None = 20
    legacy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 0.5), got {self.alpha!r}")
        if self.edge not in ("mp", "tw"):
            raise ValueError(f"edge must be 'mp' (plain Marchenko-Pastur) or 'tw' (Tracy-Widom), got {self.edge!r}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie in (0, 1), got {self.beta!r}")
        if self.k_hill is not None and (not isinstance(self.k_hill, Integral) or self.k_hill < 2):
            raise ValueError(
                f"k_hill must be a whole number of at least 2, or None for half of the values, got {self.k_hill!r}"
            )


class SpectralFits(Tabulated, Mapping[str, SpectralFit]):
    """Fits of many matrices by name; prints as a table."""

    def __init__(self, fits: Mapping[str, SpectralFit]) -> None:
        self._fits = dict(fits)

    def __getitem__(self, name: str) -> SpectralFit:
        return self._fits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fits)

    def __len__(self) -> int:
        return len(self._fits)

    def table(self) -> Table:
        """One row per matrix, every field of SpectralFit."""
        names = [field.name for field in fields(SpectralFit)]
        rows = []
        for name, fit in self._fits.items():
            cells: list[Any] = [getattr(fit, key) for key in names]
            cells[0] = "x".join(map(str, fit.shape))
            cells[-1] = " ".join(fit.flags)
            rows.append([name, *cells])
        return Table(["name", *names], rows)

    __repr__ = Tabulated.__str__

    def to_csv(self) -> str:
        """CSV, one row per matrix, full precision."""
        return self.table().to_csv()

    def to_markdown(self) -> str:
        """Markdown table."""
        return self.table().to_markdown()

    def to_json(self) -> str:
        """JSON object name -> fields."""
        return json.dumps({name: fit.to_dict() for name, fit in self._fits.items()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`."""
        return cls({name: SpectralFit.from_dict(fit) for name, fit in json.loads(text).items()})


@lru_cache(maxsize=256)
def _unit_quantiles(p: int, n: int, start: int, stop: int, legacy: bool) -> np.ndarray:
    level = (np.arange(start, stop) + (0.0 if legacy else 0.5)) / p
    values = law.quantile(level, p / n)
    values.flags.writeable = False
    return values


def _hill(squares: np.ndarray, k_hill: int | None) -> float | None:
    """1 + 1 / mean log-excess of the k largest squares over the next; docs/math.md (13)."""
    k = min(len(squares) // 2 if k_hill is None else k_hill, len(squares) - 1)
    if k < 2 or squares[k] <= 0:
        return None
    excess = float(np.mean(np.log(squares[:k] / squares[k])))
    return 1 + 1 / excess if excess > 0 else None


def fit_singular_values(s: np.ndarray, shape: tuple[int, int], options: FitOptions | None = None) -> SpectralFit:
    """Fit from the singular values alone; parameters and result as `fit_spectrum`.

    Args:
        s: all min(N, K) singular values [weight], any order.
        shape: (N, K) of the matrix they came from.
        options: how to fit.

    Returns:
        The fit.

    Raises:
        ValueError: the number of values does not match the shape, or one is negative or not finite.
    """
    options = options or FitOptions()
    p, n = min(shape), max(shape)
    values = np.sort(np.asarray(s, dtype=np.float64))[::-1]
    if values.shape != (p,) or not np.all(np.isfinite(values)) or (p and values[-1] < 0):
        raise ValueError(f"expected {p} finite non-negative singular values for shape {shape}, got {np.shape(s)}")
    if values[0] == 0:
        flags = ("all_zero",) if p >= MIN_CENTRAL else ("all_zero", "too_small")
        return SpectralFit(shape, 0.0, 0.0, 0.0, None, None, 0, None, None, None, flags)
    unit = values / values[0]
    squares = unit**2
    share = squares / squares.sum()
    share = share[share > 0]
    tail: dict[str, Any] = {
        "hill_alpha": _hill(squares, options.k_hill),
        "stable_rank": float(squares.sum()),
        "effective_rank": float(np.exp(-np.sum(share * np.log(share)))),
    }
    start, stop = int(options.alpha * p), int((1 - options.alpha) * p)
    if p < MIN_CENTRAL or stop - start < MIN_CENTRAL:
        return SpectralFit(shape, None, None, None, None, None, None, **tail, flags=("too_small",))
    scale = float(values[0] ** 2 / n)
    ascending = squares[::-1]  # eigenvalues in units of `scale`
    q = _unit_quantiles(p, n, start, stop, options.legacy)
    sigma2 = float(np.sum(q * ascending[start:stop]) / np.sum(q * q))
    if sigma2 == 0 or ascending[start] == 0:
        above = int(np.sum(values > 0))
        return SpectralFit(shape, 0.0, 0.0, 0.0, None, 1 - above / p, above, **tail, flags=("no_bulk",))
    c = p / n
    if options.legacy:
        edge = law.tracy_widom_edge(shape, sigma2, options.beta, legacy=True)
    elif options.edge == "tw":
        edge = law.tracy_widom_edge(shape, sigma2, options.beta)
    else:
        edge = law.edges(c, sigma2)[1]
    fitted = law.cdf(ascending[start:stop], c, sigma2)
    index = np.arange(start, stop)
    if options.legacy:  # as published: left-continuous, one-sided, and 0 instead of 1 above the law's edge
        empirical = options.alpha + (1 - 2 * options.alpha) * (index - start) / (stop - start)
        fitted = np.where(ascending[start:stop] > law.edges(c, sigma2)[1], 0.0, fitted)
    else:
        empirical = (index + 0.5) / p
    spike_edge = law.tracy_widom_edge(shape, sigma2, SPIKE_BETA)
    return SpectralFit(
        shape=shape,
        sigma2=sigma2 * scale,
        lambda_plus=edge * scale,
        sigma_plus=float(values[0] * np.sqrt(edge)),  # not by lambda_plus, which may underflow
        mu=float(np.max(np.abs(empirical - fitted))),
        gamma=float(np.sum(ascending < edge) / p),
        n_spikes=int(np.sum(ascending > spike_edge)),
        **tail,
    )


def fit_spectrum(
    W: Array,
    *,
    alpha: float = 0.25,
    edge: str = "mp",
    beta: float | None = None,
    k_hill: int | None = 20,
    legacy: bool = False,
) -> SpectralFit:
    """Fit the Marchenko-Pastur law to one weight matrix by bulk eigenvalue matching (BEMA).

    The result does not depend on the orientation of W and scales with it.

    Args:
        W: [N, K] floating point; NumPy, torch or CuPy.
        alpha: share of eigenvalues left out at each end of the central window, (0, 0.5).
        edge: "mp" for the plain upper edge (budgets), "tw" for the Tracy-Widom threshold at level `beta` (detection).
        beta: probability that pure noise exceeds the "tw" edge, (0, 1); default 0.1, or 0.8 with `legacy`.
        k_hill: number of tail values in the Hill estimator, >= 2; None: half of them, min(N, K) // 2.
        legacy: reproduce the published code's numbers, defects included (docs/math.md, "Legacy").

    Returns:
        SpectralFit; None fields and flags for tiny or all-zero matrices.

    Raises:
        TypeError: W is not a dense array of real numbers.
        ValueError: W is not a matrix, or has NaN or Inf; an option is out of range.

    Source: Ke, Ma & Lin (2021); arXiv 2503.01922; docs/math.md (9)-(15).
    """
    namespace(W)
    if W.ndim != 2:
        raise ValueError(f"expected a matrix [N, K], got shape {tuple(W.shape)}; unfold convolutions first")
    return fit_spectra({"W": W}, alpha=alpha, edge=edge, beta=beta, k_hill=k_hill, legacy=legacy, show_progress=False)[
        "W"
    ]


def _batches(weights: Mapping[str, Array], max_bytes: int | None, *, one_shape: bool) -> list[list[str]]:
    """Names of matrices that are computed together, as many as `max_bytes` of working memory allow.

    They are of one kind and device and have one shorter side (whose Gram matrices are one batch), or one shape.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a mapping of names to matrices, got {type(weights).__name__}")
    bound = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
    if bound <= 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes!r}")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        namespace(weight)
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"{name}: expected a matrix [N, K] with N, K >= 1, got shape {tuple(weight.shape)}")
        shape = tuple(weight.shape)
        kind = (
            shape if one_shape else min(shape),
            str(weight.dtype),
            type(weight),
            str(getattr(weight, "device", "cpu")),
        )
        groups.setdefault(kind, []).append(name)
    batches: list[list[str]] = []
    for names in groups.values():
        used = bound
        for name in names:
            p, n = min(weights[name].shape), max(weights[name].shape)
            needed = 8 * (2 * p * n + 3 * p * p)  # a scaled copy and the Gram matrix, float64 at worst
            if used + needed > bound:
                batches.append([])
                used = 0
            batches[-1].append(name)
            used += needed
    return batches


def _finite_arrays(weights: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """The named matrices where they are fastest to compute on; NaN and Inf are refused by name."""
    arrays = [as_computable(weights[name], name) for name in names]
    for name, array in zip(names, arrays, strict=True):
        check_finite(array, name)
    return arrays


def spike_vectors(
    weights: Mapping[str, Array],
    fits: Mapping[str, SpectralFit],
    *,
    max_bytes: int | None = None,
    show_progress: bool | None = None,
) -> dict[str, tuple[Array, Array, Array]]:
    """Singular triples of the spikes of many matrices: what stands out of the noise, as factors U diag(s) Vh.

    Matrices of one shape share one batched randomised decomposition. Triples well above the edge are exact to about
    1e-3; one that barely clears the edge mixes with the top of the bulk, as it does in the matrix itself.

    Args:
        weights: name -> [N, K] floating point; NumPy, torch or CuPy.
        fits: name -> fit of the same matrix; `n_spikes` triples are returned.
        max_bytes: as for `fit_spectra`.
        show_progress: as for `fit_spectra`.

    Returns:
        name -> (U [N, R], s [R] descending [weight], Vh [R, K]), R = n_spikes (0 where the fit has none); NumPy for
        what lives on the CPU.

    Raises:
        ValueError: a matrix has no fit, another shape than its fit, or NaN or Inf entries.

    Source: Halko, Martinsson & Tropp (2011); docs/math.md (8).
    """
    for name, weight in weights.items():
        if name not in fits or fits[name].shape != tuple(weight.shape):
            raise ValueError(
                f"{name}: expected the fit of a matrix of shape {tuple(weight.shape)}, got {fits.get(name)}"
            )
    found: dict[str, tuple[Array, Array, Array]] = {}
    for names in progress(_batches(weights, max_bytes, one_shape=True), "spikes", show=show_progress):
        with computing(weights[name] for name in names):
            arrays = _finite_arrays(weights, names)
            ranks = [fits[name].n_spikes or 0 for name in names]
            batch = namespace(*arrays).stack(arrays)
            parts = randomized_svd(batch, max(1, *ranks), n_iter=6)
            u, s, vh = (returned(part, weights[names[0]]) for part in parts)
        for index, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            found[name] = (u[index, :, :rank], s[index, :rank], vh[index, :rank, :])
    return {name: found[name] for name in weights}


def fit_spectra(
    weights: Mapping[str, Array],
    *,
    alpha: float = 0.25,
    edge: str = "mp",
    beta: float | None = None,
    k_hill: int | None = 20,
    legacy: bool = False,
    max_bytes: int | None = None,
    show_progress: bool | None = None,
) -> SpectralFits:
    """Fit many matrices at once; those with one shorter side are decomposed in batches.

    Args:
        weights: name -> [N, K], as for `fit_spectrum`.
        alpha: as for `fit_spectrum`.
        edge: as for `fit_spectrum`.
        beta: as for `fit_spectrum`.
        k_hill: as for `fit_spectrum`.
        legacy: as for `fit_spectrum`.
        max_bytes: bound on the working memory of one batch; default 1 GiB. One matrix is always worked on whole.
        show_progress: True, False, or None for "only on a terminal".

    Returns:
        SpectralFits in the order of `weights`.

    Raises:
        TypeError: `weights` is not a mapping, or a value is not a dense array of real numbers.
        ValueError: a value is not a matrix or has NaN or Inf, named by its key; an option is out of range.
    """
    options = FitOptions(alpha, edge, (0.8 if legacy else 0.1) if beta is None else beta, k_hill, legacy)
    values = spectra_of(weights, max_bytes=max_bytes, show_progress=show_progress)
    fits = {}
    for name, s in values.items():
        rows, columns = weights[name].shape
        fits[name] = fit_singular_values(s, (int(rows), int(columns)), options)
    return SpectralFits(fits)


def spectra_of(
    weights: Mapping[str, Array], *, max_bytes: int | None = None, show_progress: bool | None = None
) -> dict[str, np.ndarray]:
    """All singular values of many matrices; those with one shorter side are decomposed in batches.

    Args:
        weights: name -> [N, K], as for `fit_spectrum`.
        max_bytes: as for `fit_spectra`.
        show_progress: as for `fit_spectra`.

    Returns:
        name -> min(N, K) values, descending, float64 [weight], in the order of `weights`.

    Raises:
        TypeError: `weights` is not a mapping, or a value is not a dense array of real numbers.
        ValueError: a value is not a matrix or has NaN or Inf, named by its key.
    """
    found: dict[str, np.ndarray] = {}
    for names in progress(_batches(weights, max_bytes, one_shape=False), "spectra", show=show_progress):
        with computing(weights[name] for name in names):
            found.update(zip(names, singular_values(_finite_arrays(weights, names)), strict=True))
    return {name: found[name] for name in weights}
