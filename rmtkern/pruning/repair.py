"""What the weights that stay become once the others have gone. Knows a mask, and no budget, score or pattern."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rmtkern.pruning.products import product

__all__ = ["CALIBRATED_REPAIRS", "REPAIRS", "damped", "definite"]

_DAMPING = 0.01
_STEPS = 100
_TOLERANCE = 1e-3  # of the output's energy norm; the loss is then within 0.03 % of the least


def none(matrix: Tensor, mask: Tensor, moment: Tensor | None) -> Tensor:
    """The matrix with zeros where the mask is true and unchanged elsewhere, [N, K]."""
    return matrix.masked_fill(mask, 0)


def obs(matrix: Tensor, mask: Tensor, moment: Tensor | None) -> Tensor:
    """The survivors that lose least: each row's least squares over the inputs, given its zeros.

    Row w becomes argmin_v (v - w)ᵀ H (v - w) over the v that are zero on the mask, that is H_SS v_S = (H w)_S over its
    survivors S. All rows are solved at once by conjugate gradients from the masked row, in coordinates where H has a
    unit diagonal; every step lowers every row's loss. For one weight that goes this is the Optimal Brain Surgeon.

    Args:
        matrix: [N, K], any float dtype.
        mask: bool [N, K], true where a weight goes.
        moment: [K, K] second moments of the inputs, symmetric, positive definite: see `damped`.

    Returns:
        [N, K] in the dtype of `moment`, exactly 0 where the mask is true.

    Raises:
        ValueError: no moments.

    Source: Hassibi and Stork 1993 (one weight), Frantar and Alistarh 2022, arXiv 2208.11580 (least squares on a mask).
    """
    if moment is None:
        raise ValueError("repair 'obs' needs the second moments of the inputs; pass calibration=images")
    keep = (~mask).to(moment.dtype)
    inverse = 1 / moment.diagonal()
    target = matrix.to(moment.dtype)
    found = target * keep
    enough = _TOLERANCE**2 * (product(target, moment) * target).sum(1, keepdim=True)
    solution, residual = found.clone(), product(target - found, moment) * keep
    rows = torch.arange(len(found), device=found.device)
    scaled = residual * inverse
    direction, size = scaled, (residual * scaled).sum(1, keepdim=True)
    for _ in range(_STEPS):
        going = (size > enough).flatten()
        if len(rows) > len(found) // 16 and int(going.sum()) <= 0.75 * len(rows):  # rows that are done leave
            found[rows] = solution
            rows, solution, residual, direction = rows[going], solution[going], residual[going], direction[going]
            keep, size, enough, going = keep[going], size[going], enough[going], going[going]
        if not bool(going.any()):
            break
        image = product(direction, moment).mul_(keep)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(going[:, None] & (curvature > 0), size / curvature, 0)
        solution = solution.addcmul(step, direction)
        residual = residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(torch.where(before > 0, size / before, 0), direction)
    found[rows] = solution
    return found.masked_fill_(mask, 0)


REPAIRS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"none": none, "obs": obs}
"""Name -> function(matrix [N, K], mask [N, K], moment [K, K] | None) -> matrix [N, K], zero on the mask."""

CALIBRATED_REPAIRS: tuple[str, ...] = ("obs",)
"""The repairs that need calibration images."""


def damped(moment: Tensor) -> Tensor:
    """A second moment with 1 % of its mean diagonal added to the diagonal, so that it can be inverted; a copy.

    An input that is always zero gets the mean diagonal: its weights cost nothing and disturb no other.

    Args:
        moment: [..., K, K], positive semidefinite.

    Source: Frantar and Alistarh 2023, arXiv 2301.00774, damping.
    """
    moment = moment.clone()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal.add_(torch.where(diagonal <= 0, mean, _DAMPING * mean))
    return moment


@contextmanager
def definite() -> Iterator[None]:
    """Around decompositions of second moments that have to be positive definite, to the rounding of their dtype.

    Raises:
        ValueError: they are not; see `damped`.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError("the second moments are singular; pass more calibration images") from error
