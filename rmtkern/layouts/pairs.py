"""How a gate-up pair lies in one weight: rows in chunks, so that one epilogue finds both. It knows no layout."""

from torch import Tensor

__all__ = ["CHUNK", "interleave", "rows_of", "separate"]

CHUNK = 8
"""Rows of a chunk; part of the format (`gate_chunk` in csrc/kernels.h)."""


def rows_of(features: int) -> int:
    """Rows N of the weight that holds a pair with `features` outputs: 2 F, filled up to whole chunks."""
    return 2 * CHUNK * -(-features // CHUNK)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """One weight (or bias) of a gate-up pair, for `ops.gated_linear`.

    Args:
        gate: [F, K] or [F], any dtype.
        up: the same shape and dtype.

    Returns:
        [N, K] or [N] with N = 2 ceil(F / 8) 8: 8 rows of `gate`, the same 8 of `up`, the next 8 of `gate` ...; the last
        chunks are filled up with zeros.

    Raises:
        TypeError: one is no tensor.
        ValueError: shapes or dtypes differ, or there are no rows.
    """
    for name, part in (("gate", gate), ("up", up)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected a Tensor [F, K] or [F], got {type(part).__name__}")
    if gate.ndim not in (1, 2) or 0 in gate.shape or up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"gate and up: expected the same shape [F, K] or [F], F >= 1, and the same dtype, got {list(gate.shape)}"
            f" {gate.dtype} and {list(up.shape)} {up.dtype}"
        )
    features, rest = gate.shape[0], gate.shape[1:]
    stacked = gate.new_zeros(2, rows_of(features) // 2, *rest)
    stacked[0, :features], stacked[1, :features] = gate.detach(), up.detach()
    return stacked.view(2, -1, CHUNK, *rest).transpose(0, 1).reshape(-1, *rest).contiguous()


def separate(pairs: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """(gate, up), [F, ...] each, contiguous, of what `interleave` returned.

    Args:
        pairs: [N, ...].
        features: F.

    Raises:
        ValueError: N is not what F outputs need.
    """
    if features < 1 or pairs.ndim < 1 or pairs.shape[0] != rows_of(features):
        raise ValueError(
            f"features: {features} outputs need {rows_of(features)} rows of pairs, got {list(pairs.shape)}"
        )
    rest = pairs.shape[1:]
    stacked = pairs.view(-1, 2, CHUNK, *rest).transpose(0, 1).reshape(2, -1, *rest)
    return stacked[0, :features].contiguous(), stacked[1, :features].contiguous()
