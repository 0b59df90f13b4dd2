"""What becomes of one weight, in little memory while it waits to be written: a bit per entry, the values that stay.

It knows a mask and a matrix, and neither how they were chosen nor where they go.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.ranks import Ranks

__all__ = ["Pruned"]


@dataclass(frozen=True, eq=False)
class Pruned:
    """The zero pattern of a weight [N, K] and, where a method changes them, the values of the entries that stay.

    Of a float32 weight with half of its entries gone it holds 0.03 of the size, or 0.53 with values; a mask and a
    matrix would be 0.25 and 1.25.

    Args:
        shape: (N, K).
        bits: uint8 [ceil(N K / 8)]: whether an entry goes, rows in order, first entry highest, as in plan.mask_hash.
        values: [N K - zeros] in the weight's dtype, rows in order; None if the weight keeps its values where it stays.
    """

    shape: tuple[int, int]
    bits: Tensor
    values: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, matrix: Tensor | None = None) -> "Pruned":
        """From a mask and what the weight becomes.

        Args:
            mask: bool [N, K], true where the weight is zero.
            matrix: [N, K], whose values where the mask is true do not matter; None: the weight keeps its own.
        """
        flat = mask.flatten().view(torch.uint8)
        parts = F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
        bits = parts[:, 7].clone()
        for place in range(7):
            bits |= parts[:, place] << (7 - place)
        return cls((mask.shape[0], mask.shape[1]), bits, None if matrix is None else matrix[~mask])

    def mask(self) -> Tensor:
        """Bool [N, K], true where the weight is zero."""
        entries = torch.empty(len(self.bits), 8, dtype=torch.bool, device=self.bits.device)
        for place in range(8):
            entries[:, place] = (self.bits >> (7 - place)) & 1
        rows, columns = self.shape
        return entries.flatten()[: rows * columns].reshape(self.shape)

    def matrix(self) -> Tensor | None:
        """[N, K], zero where the mask is true and else bit for bit the one it was made of; None without values."""
        if self.values is None:
            return None
        whole = self.values.new_zeros(self.shape)
        return whole.masked_scatter_(~self.mask(), self.values)

    def shared(self, ranks: Ranks) -> "Pruned":
        """What rank 0 has, on every rank, where roundings of other machines may have chosen otherwise."""
        if ranks.world == 1:
            return self
        bits = self.bits.clone()
        ranks.share_(bits)
        first = Pruned(self.shape, bits)
        if self.values is None:
            return first
        stay = math.prod(self.shape) - int(first.mask().sum())
        values = self.values.clone() if len(self.values) == stay else self.values.new_zeros(stay)
        ranks.share_(values.view(torch.uint8))  # no dtype that a backend might not know
        return Pruned(self.shape, bits, values)
