"""Recompose a matrix from thresholded singular vectors and prune it, in one go: the weight, its bits, its row counts.

The functions here on arrays are the specification and what a CPU runs; triton_sparsify.py does the same in one kernel.
It knows no models and no layouts: what comes back are plain arrays.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from array_api_compat import device

from rmtkern.arrays import Array, cast, namespace
from rmtkern.errors import KernelUnavailable
from rmtkern.gpu import has_device

__all__ = ["BACKENDS", "Sparsified", "recompose", "sparsify"]

BACKENDS = ("reference", "triton")


class Sparsified(NamedTuple):
    """A pruned matrix [N, K] or batch [B, N, K], with what storing it takes.

    Attributes:
        weight: [..., N, K]; a pruned entry is exactly 0.
        words: [..., N, ceil(K / 64)] int64; bit j of word c is set where weight[..., n, 64 c + j] is not 0.
        counts: [..., N] int32, entries of a row that are not 0.
    """

    weight: Array
    words: Array
    counts: Array


def recompose(u: Array, s: Array, vh: Array, limit_u: Array, limit_v: Array) -> Array:
    """U' diag(s) V'^T, where coordinates of u_i below limit_u_i and of v_i below limit_v_i in magnitude have become 0.

    Args:
        u: [..., N, R] floating point; NumPy, torch or CuPy, as all others.
        s: [..., R].
        vh: [..., R, K].
        limit_u: [..., R], >= 0.
        limit_v: [..., R], >= 0.

    Returns:
        [..., N, K], dtype of the factors.

    Source: arXiv 2503.01922, singular-vector sparsification; docs/math.md (16).
    """
    xp = namespace(u, s, vh, limit_u, limit_v)
    u = xp.where(xp.abs(u) < limit_u[..., None, :], xp.zeros_like(u), u)
    vh = xp.where(xp.abs(vh) < limit_v[..., :, None], xp.zeros_like(vh), vh)
    return (u * s[..., None, :]) @ vh


def sparsify(
    u: Array,
    s: Array,
    vh: Array,
    limit_u: Array,
    limit_v: Array | None = None,
    *,
    threshold: float | Array | None = None,
    zeros: int | Sequence[int] | None = None,
    dtype: Any = None,
    backend: str | None = None,
) -> Sparsified:
    """Threshold singular vectors, recompose, and prune by magnitude: W'_ij = 0 where |W'_ij| < threshold.

    With `zeros` the threshold is found: the entries of smallest magnitude go, equal ones by layer, then by flat index,
    exactly so many; entries that are 0 anyway count among them. The magnitudes are those of the weight in `dtype`.

    Args:
        u: [N, R] or [B, N, R] floating point, NumPy, CuPy or torch; float32 for the kernel.
        s: [R] or [B, R], dtype and device of `u` as all others.
        vh: [R, K] or [B, R, K].
        limit_u: [R] or [B, R], >= 0: coordinates of u_i below it in magnitude become 0 (the T_i of docs/math.md (16)).
        limit_v: the same for v_i; default `limit_u`.
        threshold: xi >= 0, one number or [B]; default 0, which prunes nothing.
        zeros: instead of a threshold: entries that go, from all layers together, or one number for each layer.
        dtype: of the weight, of the arrays' namespace; default that of `u`.
        backend: "triton", "reference"; default the kernel for torch tensors on a GPU that it supports.

    Returns:
        Weight, bits and counts, where the factors are.

    Raises:
        TypeError: an argument is no array.
        ValueError: shapes, dtypes or a number that do not fit; threshold and zeros together.
        KernelUnavailable: backend "triton" cannot take this call; the message says why.

    Source: arXiv 2503.01922, singular-vector and element-wise sparsification; docs/math.md (16), (30).
    """
    limit_v = limit_u if limit_v is None else limit_v
    parts = [part.detach() if isinstance(part, torch.Tensor) else part for part in (u, s, vh, limit_u, limit_v)]
    xp = namespace(*parts)
    _check(*parts)
    single = u.ndim == 2
    batch = [part[None, ...] for part in parts] if single else parts
    dtype = u.dtype if dtype is None else dtype
    layers, size = batch[0].shape[0], batch[0].shape[1] * batch[2].shape[2]
    numbers, counts = _threshold(threshold, zeros, layers, size)
    if isinstance(numbers, float):
        numbers = xp.full((layers,), numbers, dtype=u.dtype, device=device(u))
    run = _on_gpu if _takes_kernel(batch, counts, dtype, backend) else _on_arrays
    found = run(batch, numbers, counts, dtype)
    return Sparsified(*(part[0, ...] for part in found)) if single else found


def _check(u: Array, s: Array, vh: Array, limit_u: Array, limit_v: Array) -> None:
    lead, r = tuple(u.shape[:-2]), u.shape[-1] if u.ndim else 0
    wanted = {"s": (*lead, r), "vh": (*lead, r, vh.shape[-1] if vh.ndim else 0), "limit_u": (*lead, r),
              "limit_v": (*lead, r)}  # fmt: skip
    if u.ndim not in (2, 3) or 0 in u.shape:
        raise ValueError(f"u: expected [N, R] or [B, N, R] with no empty dimension, got shape {tuple(u.shape)}")
    for name, part in zip(wanted, (s, vh, limit_u, limit_v), strict=True):
        if tuple(part.shape) != wanted[name] or 0 in part.shape:
            raise ValueError(
                f"{name}: expected shape {wanted[name]} as u has {tuple(u.shape)}, got {tuple(part.shape)}"
            )
        if part.dtype != u.dtype or device(part) != device(u):
            raise ValueError(
                f"{name}: expected {u.dtype} on {device(u)} as u, got {part.dtype} on {device(part)}; cast or move it"
            )
    if not namespace(u).isdtype(u.dtype, "real floating"):
        raise ValueError(f"u: expected floating point factors, got {u.dtype}")


def _threshold(threshold: Any, zeros: Any, layers: int, size: int) -> tuple[Any, list[int] | None]:
    """The thresholds, a number or [B], and how many entries go from all layers [1] or from each [B], or None."""
    if zeros is not None and threshold is not None:
        raise ValueError("threshold and zeros: expected one of them; the other follows from it")
    if zeros is not None:
        together = isinstance(zeros, int)
        counts = [int(zeros)] if isinstance(zeros, int) else [int(number) for number in zeros]
        most = size * layers if together else size
        if len(counts) not in ((1,) if together else (layers,)) or not all(0 <= count <= most for count in counts):
            raise ValueError(f"zeros: expected 0 to {most}, one number or one for each of {layers} layers, got {zeros}")
        return 0.0, counts
    if threshold is None:
        return 0.0, None
    if getattr(threshold, "shape", ()) != ():
        if tuple(threshold.shape) != (layers,):
            raise ValueError(f"threshold: expected one number or shape ({layers},), got {tuple(threshold.shape)}")
        return threshold, None
    if not (math.isfinite(float(threshold)) and float(threshold) >= 0):
        raise ValueError(f"threshold: expected a finite number >= 0, got {threshold!r}")
    return float(threshold), None


def _takes_kernel(batch: Sequence[Array], counts: list[int] | None, dtype: Any, backend: str | None) -> bool:
    """Whether the Triton kernel runs this call; where it cannot, an error if it was asked for."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    on_cpu = not isinstance(batch[0], torch.Tensor) or batch[0].device.type == "cpu"
    if backend == "reference" or (backend is None and on_cpu):
        return False
    reason = _reason_against_kernel(batch, counts, dtype)
    if backend == "triton" and reason is not None:
        raise KernelUnavailable(f"no kernel runs sparsify: triton: {reason}")
    return reason is None


def _reason_against_kernel(batch: Sequence[Array], counts: list[int] | None, dtype: Any) -> str | None:
    """Why the Triton kernel cannot take this call, or None if it can; without a device triton is never imported."""
    u, s, vh = batch[:3]
    if not isinstance(u, torch.Tensor):
        return f"the factors are of type {type(u).__name__}; expected torch tensors"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not has_device():
        return "no CUDA device"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {dtype}; expected torch.float32, torch.float16 or torch.bfloat16"
    from rmtkern.spectrum import triton_sparsify

    return triton_sparsify.reason_against(u, s, vh, 0 if counts is None else len(counts))


def _on_gpu(batch: Sequence[torch.Tensor], threshold: Any, counts: list[int] | None, dtype: Any) -> Sparsified:
    from rmtkern.spectrum import triton_sparsify

    zeros = None if counts is None else torch.tensor(counts).to(batch[0].device, non_blocking=True)
    limit = None if zeros is not None else threshold.to(torch.float32).contiguous()
    parts = (part.contiguous() for part in batch)
    return Sparsified(*triton_sparsify.launch(*parts, threshold=limit, zeros=zeros, dtype=dtype))


def _on_arrays(batch: Sequence[Array], threshold: Any, counts: list[int] | None, dtype: Any) -> Sparsified:
    """The specification."""
    xp = namespace(*batch)
    w = cast(recompose(*batch), dtype)
    magnitude = xp.abs(w if w.dtype == batch[0].dtype else cast(w, batch[0].dtype))
    goes = magnitude < cast(threshold, magnitude.dtype)[:, None, None]
    if counts is not None:
        groups = xp.reshape(magnitude, (len(counts), -1))
        found = [_smallest(groups[index, :], count) for index, count in enumerate(counts)]
        goes = xp.reshape(xp.stack(found), w.shape)
    keep = ~goes & (magnitude != 0)
    w = xp.where(keep, w, xp.zeros_like(w))
    return Sparsified(w, _words(keep), cast(xp.sum(xp.astype(keep, xp.int32), axis=-1), xp.int32))


def _smallest(magnitude: Array, count: int) -> Array:
    """Which of [M] magnitudes are the `count` smallest, equal ones in order of index; bool [M]."""
    xp = namespace(magnitude)
    if count == 0:
        return magnitude < 0
    largest = xp.sort(magnitude)[count - 1]
    below, equal = magnitude < largest, magnitude == largest
    ties = count - int(xp.sum(xp.astype(below, xp.int64)))
    return below | (equal & (xp.cumulative_sum(xp.astype(equal, xp.int64)) <= ties))


def _words(keep: Array) -> Array:
    """Bits [B, N, ceil(K / 64)] int64 of a mask [B, N, K]."""
    xp = namespace(keep)
    layers, n, k = keep.shape
    wide = -(-k // 64) * 64
    padding = xp.zeros((layers, n, wide - k), dtype=xp.bool, device=device(keep))
    bits = xp.reshape(xp.astype(xp.concat([keep, padding], axis=2), xp.int64), (layers, n, wide // 64, 64))
    return xp.sum(xp.bitwise_left_shift(bits, xp.arange(64, dtype=xp.int64, device=device(keep))), axis=-1)
