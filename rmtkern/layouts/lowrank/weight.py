"""LowRankWeight: how a weight of low rank is stored. It knows no kernel; csrc/linear/lowrank.inl reads it."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.factors import GAIN, check_factors, factor, reason_against_rank, tolerance, truncation_errors
from rmtkern.layouts.tiles import pack_tiles, tiles_damage, unpack_tiles

__all__ = ["LowRankWeight"]


class LowRankWeight(PackedWeight):
    """W = B A with B [N, R] and A [R, K], both as dense tiles.

    The law of factored layouts: `unpack()` is exact to the factors, that is B A summed in float64 and rounded once to
    the packed dtype, and equals the weight that was packed up to `tolerance` and the rounding of the factors. The
    kernel rounds the middle x Aᵀ to the dtype of x. `params["rank"]` is R.

    Parts:
        a: [ceil(R / 32) * lanes of K, 32 * items of a lane] float32, bfloat16 or float16 (the last on a GPU only), as
            `pack_tiles` stores A.
        b: [ceil(N / 32) * lanes of R, 32 * items of a lane], B likewise.
    """

    layout = "lowrank"
    parts = ("a", "b")
    gpu_parts = ("plain_a", "plain_b")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    a: Tensor
    b: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """Why this weight [N, K] is not stored with this rank: no such rank, or it is not of that rank numerically."""
        if reason := reason_against_rank(cls.layout, dense.shape, params):
            return reason
        rank = params["rank"]
        error, allowed = float(truncation_errors(dense)[rank]), tolerance(dense.dtype)
        if error <= allowed:
            return None
        return (
            f"lowrank: rank {rank} leaves {error:.2g} of the weight's norm, more than {allowed:.2g} (2 eps of"
            f" {dense.dtype}); truncate the weight first, take a larger rank, or use from_factors"
        )

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """The numerical rank, if two factors of it are less than `GAIN` of the weight."""
        n, k = dense.shape
        fitting = (truncation_errors(dense)[1:] <= tolerance(dense.dtype)).nonzero()
        rank = int(fitting[0]) + 1
        return ({"rank": rank},) if rank * (n + k) < GAIN * n * k else ()

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a weight that has rank `rank` numerically.

        Args:
            dense: [N, K] float32, bfloat16 or float16, finite.
            params: rank, 1 to min(N, K).

        Returns:
            The packed weight, on the device of `dense`, factored by SVD in float64.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape, dtype or params, NaN or Inf, or another rank (`reason_against`).
        """
        check_dense(dense, cls.dtypes, cls.layout)
        reason = cls.reason_against(dense, **params)
        if reason is not None:
            raise ValueError(reason)
        b, a = factor(dense, params["rank"])
        return cls.from_factors(b.to(dense.dtype), a.to(dense.dtype))

    @classmethod
    def from_factors(cls, b: Tensor, a: Tensor) -> Self:
        """Store the product of two factors as it is.

        Args:
            b: [N, R] float32, bfloat16 or float16, finite.
            a: [R, K], dtype of `b`, R at most min(N, K).

        Returns:
            The packed weight [N, K].

        Raises:
            TypeError: a factor is not a tensor.
            ValueError: shapes or dtypes do not match, or NaN or Inf.
        """
        check_factors(b, a, cls.dtypes, cls.layout)
        parts = (pack_tiles(a.detach()), pack_tiles(b.detach()))
        return cls((b.shape[0], a.shape[1]), {"rank": a.shape[0]}, parts)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B [N, R], A [R, K]) in the packed dtype, bit for bit."""
        rank = self.params["rank"]
        return unpack_tiles(self.b, (self.shape[0], rank)), unpack_tiles(self.a, (rank, self.shape[1]))

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The product of the factors in another dtype."""
        b, a = self.factors()
        return self.from_factors(b.to(dtype), a.to(dtype))

    def damage(self) -> str | None:
        """Numbers where the tiles are filled up."""
        (n, k), rank = self.shape, self.params["rank"]
        return tiles_damage(self.a, (rank, k)) or tiles_damage(self.b, (n, rank))

    def gpu_form(self) -> tuple[Tensor, ...]:
        """A [R', K] and B [N, R'] row by row, R filled up with zeros to a multiple of 16 so that loads are wide."""
        b, a = self.factors()
        fill = -self.params["rank"] % 16
        return F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))

    def unpack(self) -> Tensor:
        """B A [N, K] summed in float64, rounded once to the packed dtype."""
        b, a = self.factors()
        return (b.double() @ a.double()).to(b.dtype) + 0.0
