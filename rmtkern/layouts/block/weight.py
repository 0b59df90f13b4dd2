"""BlockWeight: how a weight of r x 1 mini-blocks is stored. It knows no kernel; csrc/linear/block.inl reads it."""

from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.strips import pack_strips, unpack_strips

__all__ = ["BlockWeight"]

SIZES = (2, 4, 8)
WASTE = 0.1
"""Share of stored entries that may be zero in a weight that is offered this layout without being asked."""


def _check(params: Mapping[str, int]) -> int:
    if set(params) != {"r"} or params["r"] not in SIZES:
        raise ValueError(f"block: params must be r = 2, 4 or 8, got {dict(params)}")
    return params["r"]


class BlockWeight(PackedWeight):
    """Columns of strips of r rows (r = 2, 4 or 8), stored whole if it has a non-zero: pattern "2x1", "4x1", "8x1".

    Any weight can be stored; a zero beside a non-zero in its mini-block is stored too, and multiplies like any entry.
    The storage of strips.py with strips of r rows.

    Parts:
        values: [stored, r] float32, segment by segment, by column in it.
        masks: [segments] int64; bit j of a segment is set where its column j is stored.
        rows: [segments] uint8, the segment's strip in its row block.
        starts: [groups + 1] int64, where a group's values begin.
    """

    layout = "block"
    parts = ("values", "masks", "rows", "starts")
    values: Tensor
    masks: Tensor
    rows: Tensor
    starts: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """None: any weight can be stored; ValueError for impossible params."""
        _check(params)
        return None

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """Each r whose mini-blocks are nearly full in this weight, so that it was pruned in that pattern or wider."""
        kept = dense.detach() != 0
        n_rows, total = kept.shape[0], int(kept.sum())
        if total == kept.numel():
            return []
        found = []
        for r in SIZES:
            filled = torch.nn.functional.pad(kept, (0, 0, 0, -n_rows % r)).view(-1, r, kept.shape[1])
            if 0 < total >= (1 - WASTE) * r * int(filled.any(1).sum()):
                found.append({"r": r})
        return found

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, finite.
            params: r, rows of a mini-block: 2, 4 or 8; N need not be divisible by it.

        Returns:
            The packed weight, on the device of `dense`.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape, dtype or param, NaN or Inf.
        """
        r = _check(params)
        check_dense(dense, cls.dtypes, cls.layout)
        arrays = pack_strips(dense.detach().cpu().numpy(), r)
        tensors = tuple(torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in arrays)
        return cls((dense.shape[0], dense.shape[1]), {"r": r}, tensors)

    def unpack(self) -> Tensor:
        """The dense weight [N, K] float32, bit for bit (-0.0 has become 0.0)."""
        values, masks, rows, starts = (part.cpu().numpy() for part in self.tensors())
        dense = unpack_strips(self.shape, self.params["r"], (values, masks, rows, starts))
        return torch.from_numpy(dense).to(self.values.device)
