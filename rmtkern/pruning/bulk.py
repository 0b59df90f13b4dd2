"""Pruning of singular values during training: some of those below the Marchenko-Pastur edge go, the matrix stays dense.

It knows matrices and their fits, and no training.
"""

from torch import Tensor

from rmtkern.spectrum.decompose import singular_values
from rmtkern.spectrum.denoise import truncate
from rmtkern.spectrum.fit import FitOptions, fit_singular_values

__all__ = ["cut_bulk", "share_kept"]

_OPTIONS = FitOptions(alpha=0.25, edge="tw", beta=0.5)
_NONZERO = 1e-6


def share_kept(epoch: int, until: int) -> float:
    """f(e) = max(0, 1 - e / until): the share of the singular values below the edge that a cut after epoch e keeps.

    Source: arXiv 2503.01922, MP-based pruning of fully connected networks (until = 200); docs/math.md (26).
    """
    return max(0.0, 1 - epoch / until)


def cut_bulk(matrix: Tensor, keep: float, *, gate: float = 0.1) -> tuple[Tensor, int]:
    """Set the smallest singular values below the edge to 0 and recompose, if the Marchenko-Pastur law fits.

    Of the values that lie below the Tracy-Widom edge (level 0.5) and above 1e-6 of the largest, the smallest
    floor((1 - keep) count) go: with keep = 0 only the spikes stay.

    Args:
        matrix: [N, K] floating point.
        keep: share that stays, [0, 1].
        gate: largest fit error mu at which anything goes, [0, 1]; 1: always.

    Returns:
        [N, K] in the dtype of `matrix`, the same tensor if nothing goes; and the number of values that went.

    Raises:
        ValueError: keep or gate out of range.

    Source: arXiv 2503.01922, MP-based pruning of fully connected networks; docs/math.md (26).
    """
    for name, value in (("keep", keep), ("gate", gate)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    shape = (matrix.shape[0], matrix.shape[1])
    values = singular_values([matrix.detach().double()])[0]
    fit = fit_singular_values(values, shape, _OPTIONS)
    if fit.sigma_plus is None or fit.mu is None or fit.mu > gate:
        return matrix, 0
    present = int((values > _NONZERO * values[0]).sum())
    spikes = int((values >= fit.sigma_plus).sum())
    gone = int((1 - keep) * max(0, present - spikes) + 1e-9)
    return (truncate(matrix.detach(), present - gone), gone) if gone else (matrix, 0)
