"""NofMWeight: how a weight with n kept entries per group of m columns is stored. It knows no kernel."""

from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense

__all__ = ["NofMWeight"]


def _check(shape: tuple[int, ...], params: dict[str, int]) -> tuple[int, int]:
    if sorted(params) != ["m", "n"]:
        raise ValueError(f"nofm takes the params n and m, got {sorted(params)}")
    n, m = params["n"], params["m"]
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m <= 16):
        raise ValueError(f"nofm: expected 1 <= n <= m <= 16, got {n}:{m}")
    if shape[1] % m:
        raise ValueError(f"nofm: in-features {shape[1]} are not divisible by m = {m}; choose a divisor of {shape[1]}")
    return n, m


class NofMWeight(PackedWeight):
    """n entries kept in every group of m consecutive columns (m <= 16, in-features divisible by m).

    A group with fewer than n non-zeros keeps explicit zeros as well, so every row has K / m * n values.

    Parts:
        values: [N, K / m * n] float32, the kept entries of a row, by column.
        masks: [N, ceil(K / 64)] int64; bit j of word b is set where column 64 b + j is kept.
    """

    layout = "nofm"
    parts = ("values", "masks")
    values: Tensor
    masks: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """The first group with too many non-zeros, or None; ValueError for impossible n, m or K."""
        check_dense(dense, cls.dtypes, cls.layout)
        n, m = _check(dense.shape, params)
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
        """The tightest n:m with m = 4, 8 or 16 that holds this weight, if at most a fifth of its places are padding."""
        found = []
        for m in (4, 8, 16):
            if dense.shape[1] % m == 0:
                counts = (dense.detach() != 0).view(dense.shape[0], -1, m).sum(-1)
                n = max(1, int(counts.max()))
                if n < m and int(counts.sum()) >= 0.8 * n * counts.numel():
                    found.append({"n": n, "m": m})
        return [min(found, key=lambda params: params["n"] / params["m"])] if found else []

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, finite, at most n non-zeros in each group.
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
        groups = dense.detach().cpu().numpy().reshape(n_rows, n_cols // m, m)
        kept = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[:, :, :n], axis=2)  # non-zeros, then zeros
        values = np.take_along_axis(groups, kept, axis=2) + np.float32(0)  # -0.0 + 0.0 is 0.0
        inside = np.zeros(groups.shape, bool)
        np.put_along_axis(inside, kept, True, axis=2)
        bits = np.zeros((n_rows, -(-n_cols // 64) * 64), bool)
        bits[:, :n_cols] = inside.reshape(n_rows, n_cols)
        masks = np.packbits(bits, axis=1, bitorder="little").view("<i8")
        arrays = (values.reshape(n_rows, -1), masks)
        tensors = tuple(torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in arrays)
        return cls((n_rows, n_cols), {"n": n, "m": m}, tensors)

    def unpack(self) -> Tensor:
        """The dense weight [N, K] float32, bit for bit (-0.0 has become 0.0)."""
        n_rows, n_cols = self.shape
        values, masks = (part.cpu().numpy() for part in self.tensors())
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :n_cols].astype(bool)
        dense = np.zeros((n_rows, n_cols), np.float32)
        dense[bits] = values.ravel()
        return torch.from_numpy(dense).to(self.values.device)
