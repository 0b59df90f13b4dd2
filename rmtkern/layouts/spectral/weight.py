"""SpectralWeight: how a sum of low rank and sparse is stored. It knows no kernel; csrc/linear/spectral.inl reads it."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.layouts.base import PackedWeight, check_dense
from rmtkern.layouts.factors import GAIN, check_factors, factor, reason_against_rank, tolerance
from rmtkern.layouts.strips import masks_by_row, pack_strips, rows_damage, unpack_strips
from rmtkern.layouts.tiles import pack_tiles, tiles_damage, unpack_tiles

__all__ = ["SpectralWeight"]

WORDS = {torch.float32: 1, torch.bfloat16: 2}
"""64-bit words of a segment's mask, as the kernel of the sparse part takes them."""
STRIP = 4
"""Outputs of a strip of B; part of the format."""


class SpectralWeight(PackedWeight):
    """W = B A + S with B [N, R], A [R, K] dense and S [N, K] sparse.

    The law of factored layouts: `unpack()` is exact to the parts, that is B A + S summed in float64 and rounded once to
    the packed dtype, and equals the weight that `pack` was given up to `tolerance` and the rounding of the factors. The
    kernel rounds the middle x Aᵀ to the dtype of x. `params["rank"]` is R.

    Parts:
        values, masks, rows, starts: S in the storage of strips.py: strips of one row, units of one column, masks of one
            word (float32) or two (bfloat16).
        a: [ceil(R / 32) * lanes of K, 32 * items of a lane], A as `pack_tiles` stores it.
        b: [ceil(N / 4) * lanes of R, 4 * items of a lane], B likewise with tiles of 4.
    """

    layout = "spectral"
    parts = ("values", "masks", "rows", "starts", "a", "b")
    streamed = ("values",)
    gpu_stored = ("values",)
    gpu_parts = ("row_masks", "row_starts", "plain_a", "plain_b")
    dtypes = (torch.float32, torch.bfloat16)
    values: Tensor
    masks: Tensor
    rows: Tensor
    starts: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """Why this weight [N, K] is not stored with this rank: no such rank, or what remains is not sparse."""
        if reason := reason_against_rank(cls.layout, dense.shape, params):
            return reason
        return cls._reason_against_parts(*cls._split(dense, params["rank"]))

    @classmethod
    def _reason_against_parts(cls, b: Tensor, a: Tensor, s: Tensor) -> str | None:
        stored = b.numel() + a.numel() + int(s.count_nonzero())
        if stored <= max(GAIN * s.numel(), b.numel() + a.numel()):
            return None
        return (
            f"spectral: after rank {a.shape[0]} the remainder has {int(s.count_nonzero())} of {s.numel()} entries left,"
            f" so it stores more than {GAIN} of the dense weight; use from_parts with a sparse remainder, or another"
            " layout"
        )

    @classmethod
    def _split(cls, dense: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, A, S) in the dtype of the weight; remainders that are rounding are dropped.

        That is, up to `tolerance` times the entry or the weight's root mean square, whichever is more.
        """
        b, a = (part.to(dense.dtype) for part in factor(dense, rank))
        wide = dense.detach().double()
        rest = wide - b.double() @ a.double()
        small = rest.abs() <= tolerance(dense.dtype) * wide.abs().clamp_min(wide.square().mean().sqrt())
        return b, a, rest.masked_fill(small, 0.0).to(dense.dtype)

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """None: to find the parts in a plain weight is not cheap, so this layout is chosen by `from_parts`."""
        return ()

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a weight as its `rank` largest singular vectors and the entries that remain.

        Args:
            dense: [N, K] float32 or bfloat16, finite.
            params: rank, 1 to min(N, K).

        Returns:
            The packed weight, on the device of `dense`.

        Raises:
            TypeError: `dense` is not a tensor.
            ValueError: a wrong shape, dtype or params, NaN or Inf, or a remainder that is not sparse.
        """
        check_dense(dense, cls.dtypes, cls.layout)
        if reason := reason_against_rank(cls.layout, dense.shape, params):
            raise ValueError(reason)
        parts = cls._split(dense, params["rank"])
        reason = cls._reason_against_parts(*parts)
        if reason is not None:
            raise ValueError(reason)
        return cls.from_parts(*parts)

    @classmethod
    def from_parts(cls, b: Tensor, a: Tensor, s: Tensor) -> Self:
        """Store B A + S as it is.

        Args:
            b: [N, R] float32 or bfloat16, finite.
            a: [R, K], dtype of `b`, R at most min(N, K).
            s: [N, K] with zeros, dtype of `b`, finite.

        Returns:
            The packed weight [N, K].

        Raises:
            TypeError: a part is not a tensor.
            ValueError: shapes or dtypes do not match, or NaN or Inf.
        """
        check_factors(b, a, cls.dtypes, cls.layout)
        check_dense(s, cls.dtypes, cls.layout)
        shape = (int(b.shape[0]), int(a.shape[1]))
        if tuple(s.shape) != shape or s.dtype != b.dtype or s.device != b.device:
            raise ValueError(
                f"spectral: expected a sparse part {list(shape)} {b.dtype} on {b.device} as the factors give it, got"
                f" {list(s.shape)} {s.dtype} on {s.device}"
            )
        values, *rest = pack_strips(s, 1, words=WORDS[s.dtype])
        factors = (pack_tiles(a.detach()), pack_tiles(b.detach(), STRIP))
        return cls(shape, {"rank": a.shape[0]}, (values[:, 0], *rest, *factors))

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """B A + S of the parts in another dtype."""
        b, a, s = self.split()
        return self.from_parts(b.to(dtype), a.to(dtype), s.to(dtype))

    def damage(self) -> str | None:
        """Rows that are not each strip of a group once, or numbers where the tiles are filled up."""
        (n, k), rank = self.shape, self.params["rank"]
        factors = tiles_damage(self.a, (rank, k)) or tiles_damage(self.b, (n, rank), STRIP)
        return rows_damage(self.shape, self.rows, 1, words=len(self.masks) // len(self.rows)) or factors

    def gpu_form(self) -> tuple[Tensor, ...]:
        """Masks and starts of S as `masks_by_row` puts them; A [R', K] and B [N, R'] row by row.

        R is filled up with zeros to a power of two, at least 16, as the kernel takes it.
        """
        (n, k), rank = self.shape, self.params["rank"]
        b, a = unpack_tiles(self.b, (n, rank), STRIP), unpack_tiles(self.a, (rank, k))
        fill = max(16, 1 << (rank - 1).bit_length()) - rank
        return *masks_by_row(self.shape, self.masks, self.rows), F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B [N, R], A [R, K], S [N, K]) in the packed dtype, bit for bit (-0.0 in S has become 0.0)."""
        (n, k), rank = self.shape, self.params["rank"]
        sparse = (self.values[:, None], self.masks, self.rows, self.starts)
        s = unpack_strips((n, k), 1, sparse, words=len(self.masks) // len(self.rows))
        return unpack_tiles(self.b, (n, rank), STRIP), unpack_tiles(self.a, (rank, k)), s

    def unpack(self) -> Tensor:
        """B A + S [N, K] summed in float64, rounded once to the packed dtype."""
        b, a, s = self.split()
        return (b.double() @ a.double() + s.double()).to(b.dtype) + 0.0
