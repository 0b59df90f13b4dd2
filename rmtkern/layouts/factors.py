"""What the layouts with factors share: the SVD of a weight, and the check of given factors. It knows no layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rmtkern.layouts.base import check_dense

__all__ = ["GAIN", "check_factors", "factor", "reason_against_rank", "tolerance", "truncation_errors"]

GAIN = 0.8
"""A rank is worth timing if the factors have less than this share of the entries of the dense weight."""


def tolerance(dtype: torch.dtype) -> float:
    """The largest ‖W - W_r‖ / ‖W‖ (Frobenius) at which W counts as having rank r: 2 eps of its dtype.

    A product of rank r that was computed in this dtype is that far from rank r by rounding alone.
    """
    return 2 * torch.finfo(dtype).eps


def reason_against_rank(layout: str, shape: tuple[int, ...], params: Mapping[str, int]) -> str | None:
    """Why these params are no rank of a weight of this shape, or None."""
    if set(params) != {"rank"}:
        return f"{layout} takes the param rank, got {sorted(params)}"
    if not 1 <= params["rank"] <= min(shape):
        return f"{layout}: rank must be 1 to {min(shape)} for a weight of {tuple(shape)}, got {params['rank']}"
    return None


def factor(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank (Eckart and Young 1936), B = U √S and A = √S Vᵀ of the largest singular values.

    Args:
        dense: [N, K] of any float dtype, finite.
        rank: R, 1 to min(N, K).

    Returns:
        (B [N, R], A [R, K]) float64, on the device of `dense`.
    """
    u, s, vh = torch.linalg.svd(dense.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def truncation_errors(dense: Tensor) -> Tensor:
    """‖W - W_r‖ / ‖W‖ (Frobenius) for each rank r = 0 ... min(N, K); zeros for a weight of zeros.

    From the eigenvalues of the smaller Gram matrix in float64, several times faster than an SVD, which resolves errors
    down to about 1e-8.

    Args:
        dense: [N, K] of any float dtype, finite.

    Returns:
        [min(N, K) + 1] float64, not increasing.
    """
    wide = dense.detach().double()
    gram = wide.T @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.T
    energies = torch.linalg.eigvalsh(gram).clamp_min(0.0)  # ascending
    tails = torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)
    return (tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def check_factors(b: Tensor, a: Tensor, dtypes: tuple[torch.dtype, ...], layout: str) -> None:
    """Refuse factors that are no B [N, R] and A [R, K] of one dtype and device, R <= min(N, K), finite."""
    check_dense(b, dtypes, layout)
    check_dense(a, dtypes, layout)
    if a.shape[0] != b.shape[1] or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"{layout}: expected factors B [N, R] and A [R, K] of one dtype and device, got {list(b.shape)} {b.dtype}"
            f" on {b.device} and {list(a.shape)} {a.dtype} on {a.device}"
        )
    if a.shape[0] > min(b.shape[0], a.shape[1]):
        raise ValueError(
            f"{layout}: expected a rank of at most min(N, K) = {min(b.shape[0], a.shape[1])}, got {a.shape[0]};"
            " multiply the factors and pack the product"
        )
