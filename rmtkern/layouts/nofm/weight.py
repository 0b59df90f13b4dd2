"""NofMWeight: how a weight with n kept entries per group of m columns is stored. It knows no kernel."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, as_integers, check_dense

__all__ = ["NofMWeight"]

TILE = 16
"""Rows of a tile of a bfloat16 weight; part of the format."""


def _check(shape: tuple[int, ...], params: dict[str, int], dtype: torch.dtype) -> tuple[int, int]:
    if sorted(params) != ["m", "n"]:
        raise ValueError(f"nofm takes the params n and m, got {sorted(params)}")
    n, m = params["n"], params["m"]
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


class NofMWeight(PackedWeight):
    """n entries kept in every group of m consecutive columns (m <= 16, in-features divisible by m).

    A group with fewer than n non-zeros keeps explicit zeros as well, so every row has K / m * n values.

    Parts, float32 (any n:m):
        values: [N, K / m * n] float32, the kept entries of a row, by column.
        masks: [N, ceil(K / 64)] int64; bit j of word b is set where column 64 b + j is kept.

    Parts, bfloat16 (2:4): rows lie in tiles of 16, the last one filled up with zeros. 3/4 of the dense bytes.
        values: [tiles * K / 4, 32] bfloat16, line t K / 4 + g: for each row of tile t, its kept entries of group g.
        masks: [tiles * ceil(K / 8), 64] uint8, line t ceil(K / 8) + h: for each row of tile t four bytes that say
            columns c0 < c1 (0 to 3) of groups 2 h and 2 h + 1 are kept: byte i holds 2 c + i % 2, c = c0 for i = 0, 1,
            and c = c1 for i = 2, 3; the first group lies in the lower four bits and the second in the upper four.
    """

    layout = "nofm"
    parts = ("values", "masks")
    dtypes = (torch.float32, torch.bfloat16)
    values: Tensor
    masks: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """The first group with too many non-zeros, or None; ValueError for impossible n, m or K."""
        check_dense(dense, cls.dtypes, cls.layout)
        n, m = _check(dense.shape, params, dense.dtype)
        counts = (dense.detach() != 0).view(dense.shape[0], -1, m).sum(-1)
        worst = (counts > n).nonzero()
        if len(worst) == 0:
            return None
        row, group = worst[0].tolist()
        return (
            f"nofm {n}:{m}: row {row}, columns {group * m} to {group * m + m - 1} have {int(counts[row, group])}"
            f" non-zeros, more than {n} ({len(worst)} such groups); prune with pattern {n}:{m} first"
        )

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """The tightest n:m with m = 4, 8 or 16 that holds this weight, if at most a fifth of its places are padding.

        In bfloat16 that is 2:4 or nothing.
        """
        found = []
        for m in (4, 8, 16):
            if dense.shape[1] % m == 0:
                counts = (dense.detach() != 0).view(dense.shape[0], -1, m).sum(-1)
                n = max(1, int(counts.max()))
                known = dense.dtype == torch.float32 or (n, m) == (2, 4)
                if known and n < m and int(counts.sum()) >= 0.8 * n * counts.numel():
                    found.append({"n": n, "m": m})
        return [min(found, key=lambda params: params["n"] / params["m"])] if found else []

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32 or bfloat16, finite, at most n non-zeros in each group.
            params: n and m, 1 <= n <= m <= 16; m divides K.

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
        n_rows, n_cols = dense.shape
        groups = as_integers(dense).reshape(n_rows, n_cols // m, m)
        kept = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[:, :, :n], axis=2)  # non-zeros, then zeros
        values = np.take_along_axis(groups, kept, axis=2)
        if dense.dtype == torch.bfloat16:
            picked = (2 * np.repeat(kept, 2, axis=2) + np.array([0, 1, 0, 1])).astype(np.uint8)  # [N, groups, 4]
            picked = np.pad(picked, ((0, 0), (0, picked.shape[1] % 2), (0, 0)))
            masks = picked[:, ::2] | picked[:, 1::2] << 4
            arrays = (_tiled(values).reshape(-1, 2 * TILE), _tiled(masks).reshape(-1, 4 * TILE))
            return cls._of(dense, {"n": n, "m": m}, arrays)
        inside = np.zeros(groups.shape, bool)
        np.put_along_axis(inside, kept, True, axis=2)
        where = np.zeros((n_rows, -(-n_cols // 64) * 64), bool)
        where[:, :n_cols] = inside.reshape(n_rows, n_cols)
        masks = np.packbits(where, axis=1, bitorder="little").view("<i8")
        return cls._of(dense, {"n": n, "m": m}, (values.reshape(n_rows, -1), masks))

    @classmethod
    def _of(cls, dense: Tensor, params: dict[str, int], arrays: tuple[NDArray[Any], NDArray[Any]]) -> Self:
        values, masks = (torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in arrays)
        return cls((dense.shape[0], dense.shape[1]), params, (values.view(dense.dtype), masks))

    def unpack(self) -> Tensor:
        """The dense weight [N, K] in the packed dtype, bit for bit (-0.0 has become 0.0)."""
        n_rows, n_cols = self.shape
        if self.values.dtype == torch.bfloat16:
            groups = n_cols // 4
            pairs = self.values.view(torch.int16).view(-1, groups, TILE, 2).transpose(1, 2).reshape(-1, groups, 2)
            picked = self.masks.view(-1, -(-groups // 2), TILE, 4).transpose(1, 2).reshape(len(pairs), -1, 4)[..., ::2]
            columns = torch.stack([picked % 16 // 2, picked // 32], 2).view(len(pairs), -1, 2)[:, :groups].long()
            full = pairs.new_zeros(len(pairs), groups, 4).scatter(-1, columns, pairs)
            return full[:n_rows].reshape(n_rows, n_cols).view(torch.bfloat16)
        values, masks = (part.cpu().numpy() for part in self.tensors())
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :n_cols].astype(bool)
        dense = np.zeros((n_rows, n_cols), np.float32)
        dense[bits] = values.ravel()
        return torch.from_numpy(dense).to(self.values.device)
