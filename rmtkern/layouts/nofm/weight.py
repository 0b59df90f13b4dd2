"""NofMWeight: how a weight with n kept entries per group of m columns is stored. It knows no kernel."""

from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmtkern.layouts.base import INTEGERS, PackedWeight, as_integers, check_dense
from rmtkern.layouts.nofm.semi_structured import metadata
from rmtkern.layouts.strips import BLOCK_ROWS

__all__ = ["NofMWeight"]

TILE = 16
"""Rows of a tile of a bfloat16 weight; part of the format."""
SHARED = 4
"""Rows of a strip, which share a pattern, of a bfloat16 weight with r; part of the format."""
BLOCK_STRIPS, CODE_GROUPS = BLOCK_ROWS // SHARED, 16
"""Strips of a row block and groups of a segment of such a weight; part of the format."""
PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
"""The columns of a group that each code picks; part of the format."""


def _check(shape: tuple[int, ...], params: dict[str, int], dtype: torch.dtype) -> tuple[int, int]:
    if set(params) - {"r"} != {"n", "m"}:
        raise ValueError(f"nofm takes the params n and m, and r or not, got {sorted(params)}")
    n, m = params["n"], params["m"]
    if "r" in params and (params["r"] != SHARED or dtype != torch.bfloat16):
        raise ValueError(f"nofm: r must be {SHARED}, for torch.bfloat16 only, got {params['r']} for {dtype}")
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m <= 16):
        raise ValueError(f"nofm: expected 1 <= n <= m <= 16, got {n}:{m}")
    if dtype == torch.bfloat16 and (n, m) != (2, 4):
        raise ValueError(f"nofm: expected 2:4 for torch.bfloat16, got {n}:{m}; use BitmaskWeight for other n:m")
    if shape[1] % m:
        raise ValueError(f"nofm: in-features {shape[1]} are not divisible by m = {m}; choose a divisor of {shape[1]}")
    return n, m


def _tiled(rows: NDArray[Any]) -> NDArray[Any]:
    """[N, groups, c] -> [tiles, groups, TILE, c], the last tile filled up with zeros."""
    n_rows, groups, c = rows.shape
    padded = np.zeros((-(-n_rows // TILE) * TILE, groups, c), rows.dtype)
    padded[:n_rows] = rows
    return padded.reshape(-1, TILE, groups, c).transpose(0, 2, 1, 3)


def _used(dense: Tensor, r: int) -> Tensor:
    """Which columns each strip of r rows uses, bool [ceil(N / r), K]."""
    used = dense.detach() != 0
    return torch.nn.functional.pad(used, (0, 0, 0, -used.shape[0] % r)).view(-1, r, used.shape[1]).any(1)


def _runs(n_strips: int, n_groups: int) -> Iterator[tuple[slice, slice]]:
    """(strips, groups) of each run of segments, in the order of the format with r."""
    for first in range(0, n_strips, BLOCK_STRIPS):
        for group in range(0, n_groups, CODE_GROUPS):
            yield slice(first, min(first + BLOCK_STRIPS, n_strips)), slice(group, min(group + CODE_GROUPS, n_groups))


def _pack_rows(dense: NDArray[Any], n: int, m: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(values [N, K / m * n], masks [N, ceil(K / 64)], kept columns of each group [N, K / m, n]) of integers [N, K].

    Zeros are kept where a group has fewer than n other entries.
    """
    n_rows, n_cols = dense.shape
    groups = dense.reshape(n_rows, n_cols // m, m)
    kept = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[:, :, :n], axis=2)  # non-zeros, then zeros
    values = np.take_along_axis(groups, kept, axis=2)
    inside = np.zeros(groups.shape, bool)
    np.put_along_axis(inside, kept, True, axis=2)
    where = np.zeros((n_rows, -(-n_cols // 64) * 64), bool)
    where[:, :n_cols] = inside.reshape(n_rows, n_cols)
    masks = np.packbits(where, axis=1, bitorder="little").view("<i8")
    return values.reshape(n_rows, -1), masks, kept


_SHIFTS = np.arange(0, 4 * CODE_GROUPS, 4, dtype=np.uint64)


def _pack_shared(dense: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The parts in the format with r, values and masks, of a weight [N, K] as integers."""
    n_rows, n_cols = dense.shape
    strips = np.pad(dense, ((0, -n_rows % SHARED), (0, 0))).reshape(-1, SHARED, n_cols // 4, 4).transpose(0, 2, 1, 3)
    kept = np.sort(np.argsort((strips == 0).all(2), axis=2, kind="stable")[:, :, :2], axis=2)  # [strips, groups, 2]
    pairs = np.take_along_axis(strips, kept[:, :, None], axis=3)  # [strips, groups, SHARED, 2]
    code = np.zeros((4, 4), np.uint64)
    code[PAIRS[:, 0], PAIRS[:, 1]] = np.arange(len(PAIRS))
    codes = code[kept[..., 0], kept[..., 1]]
    runs = list(_runs(len(strips), n_cols // 4))
    values = [pairs[run].reshape(-1, 2 * SHARED) for run in runs]
    masks = [np.bitwise_or.reduce(codes[run] << _SHIFTS[: codes[run].shape[1]], axis=1) for run in runs]
    return np.concatenate(values), np.concatenate(masks).view(np.int64)


def _unpack_shared(values: NDArray[Any], masks: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """The weight [N, K] as integers of what `_pack_shared` returned."""
    n_strips, n_groups = -(-shape[0] // SHARED), shape[1] // 4
    full = np.zeros((n_strips, n_groups, SHARED, 4), values.dtype)
    value = word = 0
    for strips, groups in _runs(n_strips, n_groups):
        height, width = strips.stop - strips.start, groups.stop - groups.start
        codes = masks[word : word + height].view(np.uint64)[:, None] >> _SHIFTS[:width] & np.uint64(15)
        pairs = values[value : value + height * width].reshape(height, width, SHARED, 2)
        np.put_along_axis(full[strips, groups], PAIRS[codes.astype(int)][:, :, None], pairs, axis=3)
        value, word = value + height * width, word + height
    return full.transpose(0, 2, 1, 3).reshape(-1, shape[1])[: shape[0]].copy()


class NofMWeight(PackedWeight):
    """n entries kept in every group of m consecutive columns (m <= 16, in-features divisible by m).

    A group with fewer than n non-zeros keeps explicit zeros as well, so every row has K / m * n values.

    Parts, float32, and float16, which is for a GPU (any n:m):
        values: [N, K / m * n], the kept entries of a row, by column.
        masks: [N, ceil(K / 64)] int64; bit j of word b is set where column 64 b + j is kept.

    Parts, bfloat16 (2:4): rows lie in tiles of 16, the last one filled up with zeros. 3/4 of the dense bytes.
        values: [tiles * K / 4, 32] bfloat16, line t K / 4 + g: for each row of tile t, its kept entries of group g.
        masks: [tiles * ceil(K / 8), 64] uint8, line t ceil(K / 8) + h: for each row of tile t four bytes that say
            columns c0 < c1 (0 to 3) of groups 2 h and 2 h + 1 are kept: byte i holds 2 c + i % 2, c = c0 for i = 0, 1,
            and c = c1 for i = 2, 3; the first group lies in the lower four bits and the second in the upper four.

    Parts, bfloat16 (2:4) with r = 4, the rows that share a pattern. 33/64 of the dense bytes. A strip is 4 rows (the
    last one filled up with zeros), a segment its 16 consecutive groups (the last one may be shorter). Segments lie row
    block by row block (128 rows), in it by column, then by strip.
        values: [strips * K / 4, 8] bfloat16, segment by segment and group by group: the kept pair of each row.
        masks: [strips * ceil(K / 64)] int64, a word for each segment, four bits for each of its groups: the index in
            (01, 02, 03, 12, 13, 23) of the columns that are kept.

    On a GPU a bfloat16 weight is held row by row as well, a 16-bit weight of 2:4 has the metadata of sparse tensor
    cores besides, and every other n:m the places of `bitmask` (`gpu_form`).
    """

    layout = "nofm"
    parts = ("values", "masks")
    gpu_parts = ("row_values", "row_picks", "meta", "row_masks", "row_starts")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    values: Tensor
    masks: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """The first group with too many non-zeros, or None; ValueError for impossible n, m or K."""
        check_dense(dense, cls.dtypes, cls.layout)
        n, m = _check(dense.shape, params, dense.dtype)
        r = params.get("r", 1)
        counts = _used(dense, r).view(-1, dense.shape[1] // m, m).sum(-1)
        worst = (counts > n).nonzero()
        if len(worst) == 0:
            return None
        strip, group = worst[0].tolist()
        rows, pattern = (f"row {strip}", f"{n}:{m}") if r == 1 else (f"rows {r * strip} on", f"{n}:{m}x{r}")
        return (
            f"nofm {pattern}: {rows}, columns {group * m} to {group * m + m - 1} have {int(counts[strip, group])}"
            f" non-zeros, more than {n} ({len(worst)} such groups); prune with pattern {pattern} first"
        )

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """The tightest n:m with m = 4, 8 or 16 that holds this weight, if at most a fifth of its places are padding.

        In bfloat16 that is 2:4 or nothing, and with r = 4 besides if the rows share their patterns by four.
        """
        found = []
        for m in (4, 8, 16):
            if dense.shape[1] % m == 0:
                counts = (dense.detach() != 0).view(dense.shape[0], -1, m).sum(-1)
                n = max(1, int(counts.max()))
                known = dense.dtype != torch.bfloat16 or (n, m) == (2, 4)
                if known and n < m and int(counts.sum()) >= 0.8 * n * counts.numel():
                    found.append({"n": n, "m": m})
        if dense.dtype != torch.bfloat16 or not found:
            return sorted(found, key=lambda params: params["n"] / params["m"])[:1]
        if cls.reason_against(dense, n=2, m=4, r=SHARED) is None:
            found.append({"n": 2, "m": 4, "r": SHARED})
        return found

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, bfloat16 or float16, finite, at most n non-zeros in each group.
            params: n and m, 1 <= n <= m <= 16; m divides K; for bfloat16 r = 4 or none.

        Returns:
            The packed weight, on the device of `dense`.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape, dtype or param, NaN or Inf, or a group with too many non-zeros (it says which).
        """
        reason = cls.reason_against(dense, **params)
        if reason is not None:
            raise ValueError(reason)
        n, m = params["n"], params["m"]
        if "r" in params:
            return cls._of(dense, {"n": n, "m": m, "r": SHARED}, _pack_shared(as_integers(dense)))
        values, masks, kept = _pack_rows(as_integers(dense), n, m)
        if dense.dtype == torch.bfloat16:
            picked = (2 * np.repeat(kept, 2, axis=2) + np.array([0, 1, 0, 1])).astype(np.uint8)  # [N, groups, 4]
            picked = np.pad(picked, ((0, 0), (0, picked.shape[1] % 2), (0, 0)))
            masks = picked[:, ::2] | picked[:, 1::2] << 4
            values = values.reshape(len(values), -1, 2)
            arrays = (_tiled(values).reshape(-1, 2 * TILE), _tiled(masks).reshape(-1, 4 * TILE))
            return cls._of(dense, {"n": n, "m": m}, arrays)
        return cls._of(dense, {"n": n, "m": m}, (values, masks))

    @classmethod
    def _of(cls, dense: Tensor, params: dict[str, int], arrays: tuple[NDArray[Any], NDArray[Any]]) -> Self:
        values, masks = (torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in arrays)
        return cls((dense.shape[0], dense.shape[1]), params, (values.view(dense.dtype), masks))

    def _picked(self) -> Tensor:
        """The bytes for each group of each row of bfloat16 without r, padding rows too: [rows, K / 4, 4] uint8."""
        groups = self.shape[1] // 4
        pairs = self.masks.view(-1, -(-groups // 2), TILE, 4).transpose(1, 2)
        return torch.stack([pairs % 16, pairs >> 4], 3).reshape(-1, 2 * pairs.shape[2], 4)[:, :groups]

    def damage(self) -> str | None:
        """Bytes of bfloat16 that do not name two columns of a group in order; kernels take any."""
        if self.by_row or "r" in self.params:
            return None
        picked = self._picked()[: self.shape[0]]
        first, second = picked[..., 0] // 2, picked[..., 2] // 2
        named = torch.stack([2 * first, 2 * first + 1, 2 * second, 2 * second + 1], -1)
        fits = bool((named == picked).all() & (first < second).all() & (second < 4).all())
        return None if fits else "masks do not name two columns of each group in order"

    def unpack(self) -> Tensor:
        """The dense weight [N, K] in the packed dtype, bit for bit (-0.0 has become 0.0)."""
        (n_rows, n_cols), dtype = self.shape, self.values.dtype
        if "r" in self.params:
            values, masks = self.values.cpu().view(INTEGERS[dtype]).numpy(), self.masks.cpu().numpy()
            full = torch.from_numpy(_unpack_shared(values, masks, self.shape))
            return full.to(self.values.device).view(dtype)
        if not self.by_row:
            groups = n_cols // 4
            pairs = self.values.view(INTEGERS[dtype]).view(-1, groups, TILE, 2).transpose(1, 2).reshape(-1, groups, 2)
            columns = self._picked()[:n_rows, :, ::2].long() // 2
            full = pairs.new_zeros(n_rows, groups, 4).scatter(-1, columns, pairs[:n_rows])
            return full.reshape(n_rows, n_cols).view(dtype)
        values, masks = self.values.cpu().view(INTEGERS[dtype]).numpy(), self.masks.cpu().numpy()
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :n_cols].astype(bool)
        dense = np.zeros((n_rows, n_cols), values.dtype)
        dense[bits] = values.ravel()
        return torch.from_numpy(dense).to(self.values.device).view(dtype)

    @property
    def by_row(self) -> bool:
        """Whether values and masks lie row by row: in the format of float32, also after a cast."""
        return "r" not in self.params and self.masks.dtype == torch.int64

    @property
    def halved(self) -> bool:
        """Whether this is 2:4, alone or shared by rows."""
        return (self.params["n"], self.params["m"]) == (2, 4)

    def gpu_form(self) -> tuple[Tensor | None, ...]:
        """What the kernels read besides the parts; None for what a weight does not need.

        Returns:
            row_values [N, K / 2] and row_picks [N, ceil(K / 64)] int64 for the formats of bfloat16, as `values` and
            `masks` of the others; meta for 2:4 in 16 bits (semi_structured.metadata); row_masks [C, N] int64 and
            row_starts [C, N] int32 for other n:m: `masks` by column, and where in `values` each begins.
        """
        if not self.halved:
            counts = np.bitwise_count(self.masks.cpu().numpy().view(np.uint64)).astype(np.int64)
            begins = counts.ravel().cumsum().reshape(counts.shape) - counts
            starts = torch.from_numpy(begins.astype(np.int32)).to(self.masks.device)
            return None, None, None, self.masks.t().contiguous(), starts.t().contiguous()
        values, picks = None, None
        if not self.by_row:
            arrays = _pack_rows(as_integers(self.unpack()), 2, 4)[:2]
            values, picks = (torch.from_numpy(array).to(self.values.device) for array in arrays)
            values = values.view(self.values.dtype)
        meta = metadata(self.masks if picks is None else picks) if self.values.element_size() == 2 else None
        return values, picks, meta, None, None

    def gpu_tensors(self) -> tuple[Tensor, ...]:
        """(kept entries [N, K / 2], masks [N, ceil(K / 64)], meta or nothing), or (values [nnz], masks, starts)."""
        form = super().gpu_tensors()
        if not self.halved:
            return (self.values.flatten(), *form)
        return (self.values, self.masks, *form) if self.by_row else form
