"""The one accuracy rule of the project, random sparse weights, and copies of modules to try something on."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.activations import apply_activation

__all__ = ["accuracy_excess", "assert_as_accurate_as_dense", "excess_over", "random_copy", "random_sparse"]


Up = tuple[Tensor, Tensor | None]


def _dense(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    up: Up | None,
) -> Tensor:
    y = apply_activation(F.linear(x, w, bias), activation)
    if up is not None:
        y = y * F.linear(x, *up)
    if scale is not None:
        y = y * scale
    return y if residual is None else y + residual


def accuracy_excess(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    up: Up | None = None,
) -> float:
    """The error of `y` against float64 over what the accuracy rule allows: at most 1 if `y` is accurate enough.

    The rule: at most 2x the error of the dense PyTorch op in the dtype of `x`, plus 4 eps of the output's scale (its
    largest magnitude).

    Args:
        y: [..., N], the result to judge.
        x: [..., K].
        w: [N, K] dense.
        bias: [N] or None.
        activation: a name in `ops.ACTIVATIONS`.
        residual: [..., N] or None.
        scale: [N] or None.
        up: (weight [N, K], bias [N] or None) of a gated linear, whose product multiplies the activation's result.

    Returns:
        Ratio >= 0; NaN or Inf in `y` gives inf.

    Raises:
        ValueError: `y` has the wrong shape or dtype.
    """
    expected = (*x.shape[:-1], w.shape[0])
    if y.shape != expected or y.dtype != x.dtype:
        raise ValueError(f"y: expected {list(expected)} {x.dtype}, got {list(y.shape)} {y.dtype}")
    if y.numel() == 0:
        return 0.0
    with torch.no_grad():
        wide = [None if t is None else t.double() for t in (x, w, bias, residual, scale)]
        wide_up = None if up is None else (up[0].double(), None if up[1] is None else up[1].double())
        exact = _dense(wide[0], wide[1], wide[2], activation, wide[3], wide[4], wide_up)  # type: ignore[arg-type]
        return excess_over(y, _dense(x, w, bias, activation, residual, scale, up), exact)


def excess_over(y: Tensor, dense: Tensor, exact: Tensor) -> float:
    """The error of `y` over what the accuracy rule allows, as `accuracy_excess` does it for a linear.

    Args:
        y: the result to judge, in the dtype that the rule is about.
        dense: PyTorch's result in that dtype, in any.
        exact: in float64.

    Returns:
        Ratio >= 0; NaN or Inf in `y` gives inf.
    """
    error = float((y.double() - exact).abs().max())
    allowed = 2 * float((dense.double() - exact).abs().max()) + 4 * torch.finfo(y.dtype).eps * float(exact.abs().max())
    if error != error or error == float("inf"):
        return float("inf")
    return error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))


def assert_as_accurate_as_dense(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    up: Up | None = None,
) -> None:
    """Raise AssertionError unless `y` = act(x wᵀ + bias) [* (x upᵀ + up bias)] * scale + residual within the rule."""
    excess = accuracy_excess(y, x, w, bias, activation, residual, scale, up)
    if not excess <= 1:
        raise AssertionError(f"the error against float64 is {excess:.3g} times what the accuracy rule allows")


def random_sparse(
    n: int, k: int, sparsity: float, *, seed: int = 0, nofm: tuple[int, int] | None = None, scale: float | None = None
) -> Tensor:
    """A random weight [n, k] float32 with zeros.

    Args:
        n: rows.
        k: columns.
        sparsity: fraction of zeros in [0, 1], each place drawn by itself; exact at 0 and 1. Unused with `nofm`.
        seed: of the generator.
        nofm: (n, m): n non-zeros kept in each group of m columns instead.
        scale: standard deviation of the entries; default 1 / sqrt(k).

    Returns:
        [n, k] float32.

    Raises:
        ValueError: a sparsity outside [0, 1], or `k` not divisible by m.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected 0 to 1, got {sparsity}")
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * (k**-0.5 if scale is None else scale)
    if nofm is None:
        return w * (torch.rand(n, k, generator=generator) >= sparsity)
    kept, m = nofm
    if k % m:
        raise ValueError(f"k: expected a multiple of m = {m}, got {k}")
    ranks = torch.rand(n, k // m, m, generator=generator).argsort(-1).argsort(-1)
    return w * (ranks < kept).view(n, k)


def random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64 on the CPU with random numbers in place of its values, and without hooks.

    Args:
        module: of which only the structure matters; it may be on the meta device.
        generator: of the numbers.

    Returns:
        Parameters and buffers of floats are uniform with variance 1 / last dimension (vectors: 1); others are kept.
    """
    trial = copy.deepcopy(module)
    meta = any(tensor.is_meta for tensor in (*trial.parameters(), *trial.buffers()))
    trial = (trial.to_empty(device="cpu") if meta else trial.cpu()).double()
    for tensor in (*trial.parameters(), *trial.buffers()):
        if tensor.is_floating_point():
            bound = (3 / max(tensor.shape[-1] if tensor.ndim > 1 else 1, 1)) ** 0.5
            tensor.data.uniform_(-bound, bound, generator=generator)
    for part in trial.modules():  # other people's hooks are not for random numbers
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return trial
