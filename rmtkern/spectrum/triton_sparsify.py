"""The Triton kernels behind sparsify.py: a thresholded recomposition, and the selection of a fixed number of weights.

Each reads its matrices once: what is thresholded is so on its way into a product or out of it. They know no layout.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmtkern.gpu import precision
from rmtkern.triton_target import INTERPRETED, reason_against_device, target

__all__ = ["TILES", "Tile", "launch", "reason_against", "recompose_kernel", "rows_kernel", "select_kernel"]

COUNTED = 2**31  # entries that a histogram counts stay below
SIDE = 2**23  # N, K and R stay below: the offsets within a tile are counted in 32 bits


class Tile(NamedTuple):
    """How a kernel runs: rows, columns and depth of a step, warps and buffers of the pipeline."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


TILES = {
    "recompose": Tile(128, 128, 16, 8, 3),
    "ragged": Tile(64, 128, 16, 8, 3),  # recompose where K or R is no multiple of 16, when the wider one spills
    "select": Tile(1, 4096, 8, 8, 1),  # 8 steps of 4096 entries
    "rows": Tile(16, 64, 1, 4, 1),
}
"""Kernel -> tile, for every architecture: chosen by registers, spills and shared memory (docs/gpu.md), not by time."""

# The digits of a magnitude's 31 bits, most significant first: (shift, bins of its histogram).
_DIGITS = ((20, 2048), (10, 1024), (0, 1024))
_LOWEST_BIT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # as float32, the bits below are 0


@triton.jit
def words_of(keep, BM: tl.constexpr, BN: tl.constexpr):
    """Bits [BM, BN / 32] int32 of a mask [BM, BN]: bit j of a word is its column j."""
    bits = keep.to(tl.uint32).reshape(BM, BN // 32, 32) << tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.int32)


@triton.jit
def recompose_kernel(
    u_ptr,
    s_ptr,
    vh_ptr,
    limit_u_ptr,
    limit_v_ptr,
    threshold_ptr,
    w_ptr,
    words_ptr,
    counts_ptr,
    N,
    K,
    R,
    WORDS,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_R: tl.constexpr,
    TALL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, BN] of one layer: W' = U' diag(s) V'^T, 0 where |W'| < threshold, its bits and its row counts.

    U [B, N, R], Vh [B, R, K]; a coordinate below its limit [B, R] becomes 0 as it is loaded. W' is rounded to the dtype
    of w before it is compared. words [B, N, WORDS] of 32 bits and counts [B, N], which are added to, may be missing.
    Programs go along the short side of W first, so that a panel of the larger factor is read once while the smaller
    factor stays in L2. EVEN_R: R is a multiple of BK; TALL: N > K.
    """
    rows = tl.cdiv(N, BM)
    columns = tl.cdiv(K, BN)
    pid = tl.program_id(0)
    layer = (pid // (rows * columns)).to(tl.int64)
    within = pid % (rows * columns)
    if TALL:
        tile_m = within // columns
        tile_n = within % columns
    else:
        tile_m = within % rows
        tile_n = within // rows
    first_row = tile_m * BM
    rk = tl.arange(0, BK)
    rm = tl.arange(0, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    inside_m = rm < N - first_row
    inside_n = rn < K
    near_m = tl.minimum(rm, N - 1 - first_row)
    u_ptrs = u_ptr + (layer * N + first_row) * R + (near_m * R)[:, None] + rk[None, :]
    v_ptrs = vh_ptr + layer * R * K + (rk * K)[:, None] + rn[None, :]
    triple = layer * R + rk
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(R, BK)):
        if EVEN_R:
            u = tl.load(u_ptrs)
            v = tl.load(v_ptrs, mask=inside_n[None, :], other=0.0)
            s = tl.load(s_ptr + triple)
            limit_u = tl.load(limit_u_ptr + triple)
            limit_v = tl.load(limit_v_ptr + triple)
        else:
            inside = rk < R - k * BK
            u = tl.load(u_ptrs, mask=inside[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=inside[:, None] & inside_n[None, :], other=0.0)
            s = tl.load(s_ptr + triple, mask=inside, other=0.0)
            limit_u = tl.load(limit_u_ptr + triple, mask=inside, other=0.0)
            limit_v = tl.load(limit_v_ptr + triple, mask=inside, other=0.0)
        u = tl.where(tl.abs(u) < limit_u[None, :], 0.0, u) * s[None, :]
        v = tl.where(tl.abs(v) < limit_v[:, None], 0.0, v)
        acc = tl.dot(u, v, acc, input_precision=PRECISION)
        u_ptrs += BK
        v_ptrs += BK * K
        triple += BK
    w = acc.to(w_ptr.dtype.element_ty)
    magnitude = tl.abs(w.to(tl.float32))
    below = magnitude < tl.load(threshold_ptr + layer)
    keep = (magnitude != 0.0) & (below == 0) & inside_m[:, None] & inside_n[None, :]  # NaN stays
    at = (layer * N + first_row) * K + (rm * K)[:, None] + rn[None, :]
    tl.store(w_ptr + at, tl.where(keep, w, 0.0), mask=inside_m[:, None] & inside_n[None, :])
    if words_ptr is not None:
        word = tile_n * (BN // 32) + tl.arange(0, BN // 32)
        at = (layer * N + first_row) * WORDS + (rm * WORDS)[:, None] + word[None, :]
        tl.store(words_ptr + at, words_of(keep, BM, BN), mask=inside_m[:, None] & (word < WORDS)[None, :])
        tl.atomic_add(counts_ptr + layer * N + first_row + rm, tl.sum(keep.to(tl.int32), 1), mask=inside_m)


@triton.jit
def select_kernel(
    w_ptr,
    prefix_ptr,
    histogram_ptr,
    SIZE,
    PER_GROUP,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Add to a group's histogram [BINS] a digit of the magnitudes whose higher bits are the group's prefix.

    w [G, SIZE]; a program takes STEPS blocks of one group, PER_GROUP programs a group. The digit is the bits from SHIFT
    on. Integers are added, so the order of the programs does not matter.
    """
    pid = tl.program_id(0)
    group = (pid // PER_GROUP).to(tl.int64)
    first = (pid % PER_GROUP).to(tl.int64) * (BLOCK * STEPS)
    prefix = tl.load(prefix_ptr + group)
    found = tl.zeros((BINS,), tl.int32)
    for step in range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        w = tl.load(w_ptr + group * SIZE + at, mask=inside, other=0.0)
        bits = tl.abs(w.to(tl.float32)).to(tl.int32, bitcast=True) >> SHIFT
        found += tl.histogram(bits & (BINS - 1), BINS, mask=inside & ((bits // BINS) == prefix))
    tl.atomic_add(histogram_ptr + group * BINS + tl.arange(0, BINS), found, mask=found > 0)


@triton.jit
def rows_kernel(
    w_ptr,
    threshold_ptr,
    ties_ptr,
    counts_ptr,
    words_ptr,
    ROWS,
    K,
    WORDS,
    GROUP_ROWS,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM rows of w [ROWS, K], whole: without words, how many magnitudes equal the threshold; with them, what goes.

    threshold [G] holds the bits of the largest magnitude that goes, as float32; a group is GROUP_ROWS rows. Of those
    that equal it, the first ties[row] of a row go. Written then: w in place, words [ROWS, WORDS] of 32 bits, counts.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside_m = row < ROWS
    row = tl.minimum(row, ROWS - 1).to(tl.int64)
    threshold = tl.load(threshold_ptr + row // GROUP_ROWS)
    equals = tl.zeros((BM,), tl.int32)
    if words_ptr is not None:
        kept = tl.zeros((BM,), tl.int32)
        ties = tl.load(ties_ptr + row)
    for first in range(0, K, BN):
        column = first + tl.arange(0, BN)
        inside = inside_m[:, None] & (column < K)[None, :]
        at = (row * K)[:, None] + column[None, :]
        w = tl.load(w_ptr + at, mask=inside, other=0.0)
        bits = tl.abs(w.to(tl.float32)).to(tl.int32, bitcast=True)
        equal = ((bits == threshold[:, None]) & inside).to(tl.int32)
        if words_ptr is not None:
            before = tl.cumsum(equal, axis=1) - equal + equals[:, None]
            goes = (bits < threshold[:, None]) | ((equal != 0) & (before < ties[:, None]))
            keep = (goes == 0) & (bits != 0) & inside
            tl.store(w_ptr + at, tl.where(keep, w, 0.0), mask=inside)
            word = first // 32 + tl.arange(0, BN // 32)
            fits = inside_m[:, None] & (word < WORDS)[None, :]
            tl.store(words_ptr + (row * WORDS)[:, None] + word[None, :], words_of(keep, BM, BN), mask=fits)
            kept += tl.sum(keep.to(tl.int32), 1)
        equals += tl.sum(equal, 1)
    tl.store(counts_ptr + row, kept if words_ptr is not None else equals, mask=inside_m)


def reason_against(u: Tensor, s: Tensor, vh: Tensor, groups: int = 0) -> str | None:
    """Why the kernels cannot take these factors [B, N, R], [B, R], [B, R, K], or None if they can.

    With `groups` > 0 the entries of each of so many groups of layers are counted, in 32 bits.
    """
    if any(part.dtype != torch.float32 for part in (u, s, vh)):
        return f"the factors are {u.dtype}, {s.dtype}, {vh.dtype}; cast them to torch.float32"
    if u.device.type != "cuda" and not INTERPRETED:
        return f"the factors are on {u.device}; move them to cuda"
    if max(*u.shape[1:], vh.shape[2]) >= SIDE:
        return f"N, R, K are {(*u.shape[1:], vh.shape[2])}; each must be less than 2^23"
    if groups and u.shape[0] * u.shape[1] * vh.shape[2] // groups >= COUNTED:
        return "a fixed number of zeros among 2^31 entries or more; split the batch"
    return reason_against_device(u.device)


def launch(
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    limit_u: Tensor,
    limit_v: Tensor,
    *,
    threshold: Tensor | None,
    zeros: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, words and counts of sparsify.py; nothing waits for the device.

    Args:
        u: [B, N, R] float32, contiguous as all others; all on one device.
        s: [B, R] float32.
        vh: [B, R, K] float32.
        limit_u: [B, R] float32.
        limit_v: [B, R] float32.
        threshold: [B] float32; None: `zeros` says what goes.
        zeros: [B] int64, entries that go from each layer, or [1], from all layers together.
        dtype: of the weights.

    Returns:
        W' [B, N, K], words [B, N, ceil(K / 64)] int64, counts [B, N] int32.
    """
    (layers, n, r), k = u.shape, vh.shape[2]
    w = u.new_empty(layers, n, k, dtype=dtype)
    words = torch.empty(layers, n, -(-k // 64), dtype=torch.int64, device=u.device)
    counts = torch.zeros(layers, n, dtype=torch.int32, device=u.device)
    tile = TILES["recompose" if r % 16 == 0 and k % 16 == 0 else "ragged"]
    grid = (layers * triton.cdiv(n, tile.bm) * triton.cdiv(k, tile.bn),)
    with torch.cuda.device_of(u):  # Triton launches on the current device
        recompose_kernel[grid](
            u,
            s,
            vh,
            limit_u,
            limit_v,
            torch.zeros(layers, device=u.device) if threshold is None else threshold,
            w,
            None if threshold is None else words.view(torch.int32),
            None if threshold is None else counts,
            n,
            k,
            r,
            2 * words.shape[2],
            BM=tile.bm,
            BN=tile.bn,
            BK=tile.bk,
            EVEN_R=r % tile.bk == 0,
            TALL=n > k,
            PRECISION=precision(4, target()),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if zeros is not None:
            _zero_smallest_(w, zeros, words, counts)
    return w, words, counts


def _zero_smallest_(w: Tensor, zeros: Tensor, words: Tensor, counts: Tensor) -> None:
    """Zero the `zeros` [G] smallest magnitudes of G groups of layers, equal ones by flat index; fill words and counts.

    A radix search, one histogram for each digit of the magnitudes' bits; then equal ones are numbered by row.
    """
    groups, size = len(zeros), w.numel() // len(zeros)
    prefix = torch.zeros(groups, dtype=torch.int32, device=w.device)
    below = torch.zeros(groups, dtype=torch.int64, device=w.device)
    tile = TILES["select"]
    per_group = triton.cdiv(size, tile.bn * tile.bk)
    for shift, bins in _DIGITS:
        if shift + bins.bit_length() - 1 <= _LOWEST_BIT[w.dtype]:
            prefix *= bins  # all entries have the digit 0
            continue
        histogram = torch.zeros(groups, bins, dtype=torch.int32, device=w.device)
        select_kernel[(groups * per_group,)](
            w, prefix, histogram, size, per_group,
            SHIFT=shift, BINS=bins, BLOCK=tile.bn, STEPS=tile.bk, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        total = histogram.cumsum(1) + below[:, None]
        digit = (total < zeros[:, None]).sum(1, keepdim=True)
        below = (total - histogram).gather(1, digit)[:, 0]
        prefix = prefix * bins + digit[:, 0].int()
    rows, k = w.shape[0] * w.shape[1], w.shape[2]
    tile, group_rows = TILES["rows"], rows // groups
    grid = (triton.cdiv(rows, tile.bm),)
    options = {"BM": tile.bm, "BN": tile.bn, "num_warps": tile.warps, "num_stages": tile.stages}
    sizes = (rows, k, 2 * words.shape[2], group_rows)
    equal = counts.view(groups, group_rows)
    rows_kernel[grid](w, prefix, None, equal, None, *sizes, **options)
    ties = (zeros - below)[:, None] - (equal.cumsum(1) - equal)
    rows_kernel[grid](w, prefix, ties, counts, words.view(torch.int32), *sizes, **options)
