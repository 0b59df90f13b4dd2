"""BitmaskWeight: how a weight with any zero pattern is stored. It knows no kernel; csrc/linear/bitmask.inl reads it."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.strips import pack_strips, unpack_strips

__all__ = ["BitmaskWeight"]


class BitmaskWeight(PackedWeight):
    """Non-zero values and a bit for every entry.

    The storage of strips.py with strips of one row.

    Parts:
        values: [nnz] float32, segment by segment, by column in it.
        masks: [segments] int64; bit j of a segment is set where its column j is not zero.
        rows: [segments] uint8, the segment's row in its row block.
        starts: [groups + 1] int64, where a group's values begin.
    """

    layout = "bitmask"
    parts = ("values", "masks", "rows", "starts")
    values: Tensor
    masks: Tensor
    rows: Tensor
    starts: Tensor

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight.

        Args:
            dense: [N, K] float32, finite.
            params: none; the layout has no choices.

        Returns:
            The packed weight, on the device of `dense`.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape or dtype, NaN or Inf, or params.
        """
        if params:
            raise ValueError(f"bitmask takes no params, got {sorted(params)}")
        check_dense(dense, cls.dtypes, cls.layout)
        values, *rest = pack_strips(dense.detach().cpu().numpy(), 1)
        tensors = tuple(
            torch.from_numpy(np.ascontiguousarray(array)).to(dense.device) for array in (values[:, 0], *rest)
        )
        return cls((dense.shape[0], dense.shape[1]), {}, tensors)

    def unpack(self) -> Tensor:
        """The dense weight [N, K] float32, bit for bit (-0.0 has become 0.0)."""
        values, *rest = (part.cpu().numpy() for part in self.tensors())
        return torch.from_numpy(unpack_strips(self.shape, 1, (values[:, None], *rest))).to(self.values.device)  # type: ignore[arg-type]
