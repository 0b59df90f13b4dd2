"""mlp() and normed_linear(): two packed linears, or LayerNorm and one, in one CPU kernel where there is one.

They check a call once and know no model; packing decides who uses them.
"""

import os

from torch import Tensor

from rmtkern.layer_norm import layer_norm
from rmtkern.layouts import cpu
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.cpu import Norm
from rmtkern.ops import ACTIVATIONS, KERNELS, linear, load_kernels

__all__ = ["mlp", "normed_linear", "reason_against"]


def reason_against(x: Tensor, *weights: PackedWeight) -> str | None:
    """Why one kernel cannot compute all of a call with x [..., K], or None if it can; shapes are not looked at.

    Args:
        x: the input.
        weights: what it is multiplied with, one after the other.
    """
    if not x.is_cpu:
        return f"device {x.device}; the kernel is for the cpu"
    if forced := os.environ.get("RMTKERN_BACKEND"):
        return None if forced == "cpu" else f"RMTKERN_BACKEND is {forced!r}"
    for w in weights:
        load_kernels(w.layout)
        kernel = KERNELS[w.layout]["cpu"]
        reason = kernel if isinstance(kernel, str) else kernel.supports(w, x)
        if reason is None and w.cpu_tensors() is None:
            reason = "another library computes it"
        if reason is not None:
            return f"{w.label}: {reason}"
    return cpu.MISSING


def mlp(
    x: Tensor,
    first: PackedWeight,
    second: PackedWeight,
    *,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    activation: str | None = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Apply an MLP of two packed weights: y = (activation(x W1ᵀ + b1) W2ᵀ + b2) * scale + residual.

    One kernel computes both, strip of tokens by strip, so that the hidden features stay in the cache; layouts that are
    walked weight by weight (all but `dense`, `lowrank`, `spectral` and the 2:4 of bfloat16 rows) also leave them in
    the form that the second reads. Where `reason_against` has a reason, these are two calls of `linear`.

    Args:
        x: [..., K]; any strides, any leading dims, also none or an empty one.
        first: packed [F, K].
        second: packed [N, F].
        first_bias: [F], dtype of `x` as all others.
        second_bias: [N].
        activation: of the hidden features: None, "gelu" (exact erf form), "gelu_tanh", "relu" or "silu".
        scale: [N], multiplied after the second bias (LayerScale).
        residual: [..., N], added last.
        norm: (weight [K] or None, bias [K] or None, eps) of a LayerNorm of the rows of `x` first.

    Returns:
        [..., N], dtype of `x`. The hidden features are rounded to it, as between two linears. No gradient flows.

    Raises:
        TypeError: `x` or a weight has the wrong type.
        ValueError: a shape, dtype, device or name does not match.
        KernelUnavailable: no kernel supports one of the linears; the message gives each one's reason.
    """
    if not isinstance(x, Tensor) or not isinstance(first, PackedWeight) or not isinstance(second, PackedWeight):
        got = ", ".join(type(value).__name__ for value in (x, first, second))
        raise TypeError(f"expected a Tensor and two PackedWeights, got {got}")
    (hidden, k), n = first.shape, second.shape[0]
    if second.shape[1] != hidden:
        raise ValueError(f"second: expected [N, {hidden}], as the first gives {hidden} features, got {second.shape}")
    lead = x.shape[:-1]
    if reason_against(x, first, second) is not None or x.ndim == 0 or x.shape[-1] != k or 0 in lead:
        y = linear(_normed(x, norm), first, first_bias, activation=activation)
        return linear(y, second, second_bias, scale=scale, residual=residual)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; valid: {', '.join(map(str, ACTIVATIONS))}")
    _check_rows(x, first_bias=(first_bias, hidden), second_bias=(second_bias, n), scale=(scale, n))
    if residual is not None and (residual.shape != (*lead, n) or residual.dtype != x.dtype or not residual.is_cpu):
        got = f"{list(residual.shape)} {residual.dtype}"
        raise ValueError(f"residual: expected {[*lead, n]} {x.dtype} on the cpu, got {got}")
    added = None if residual is None else residual.detach().reshape(-1, n).contiguous()
    b1, b2, s = (None if row is None else row.detach().contiguous() for row in (first_bias, second_bias, scale))
    rows = x.detach().reshape(-1, k).contiguous()
    y = cpu.mlp(rows, first, second, (b1, b2), activation, added, s, _checked(x, norm))
    return y.reshape(*lead, n)


def normed_linear(
    x: Tensor, w: PackedWeight, bias: Tensor | None = None, *, norm: Norm, activation: str | None = None
) -> Tensor:
    """Apply LayerNorm and a packed weight: y = activation(norm(x) Wᵀ + bias).

    One kernel computes both: layouts that are walked weight by weight normalise the rows on their way into panels,
    others get them strip by strip. Where `reason_against` has a reason, these are calls of `layer_norm` and `linear`.

    Args:
        x: [..., K]; any strides, any leading dims, also none or an empty one.
        w: packed [N, K].
        bias: [N], dtype of `x` as all others.
        norm: (weight [K] or None, bias [K] or None, eps >= 0), as `layer_norm` takes them.
        activation: None, "gelu" (exact erf form), "gelu_tanh", "relu" or "silu".

    Returns:
        [..., N], dtype of `x`. The normalised rows are rounded to it, as by `layer_norm`. No gradient flows.

    Raises:
        TypeError: `x` or `w` has the wrong type.
        ValueError: a shape, dtype, device or name does not match.
        KernelUnavailable: no kernel supports one of the two; the message gives each one's reason.
    """
    if not isinstance(x, Tensor) or not isinstance(w, PackedWeight):
        raise TypeError(f"expected a Tensor and a PackedWeight, got {type(x).__name__} and {type(w).__name__}")
    (n, k), lead = w.shape, x.shape[:-1]
    if reason_against(x, w) is not None or x.ndim == 0 or x.shape[-1] != k or 0 in lead:
        return linear(_normed(x, norm), w, bias, activation=activation)
    _check_rows(x, bias=(bias, n))
    rows, b = x.detach().reshape(-1, k).contiguous(), None if bias is None else bias.detach().contiguous()
    y = cpu.linear(rows, w, b, activation, None, norm=_checked(x, norm))
    return y.reshape(*lead, n)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else layer_norm(x, norm[0], norm[1], eps=norm[2])


def _checked(x: Tensor, norm: Norm | None) -> Norm | None:
    """The norm as a kernel takes it."""
    if norm is None:
        return None
    weight, bias, eps = norm
    if not eps >= 0:
        raise ValueError(f"norm: expected eps >= 0, got {eps}")
    _check_rows(x, **{"the norm's weight": (weight, x.shape[-1]), "the norm's bias": (bias, x.shape[-1])})
    rows = (None if row is None else row.detach().contiguous() for row in (weight, bias))
    return *rows, eps  # type: ignore[return-value]


def _check_rows(x: Tensor, **rows: tuple[Tensor | None, int]) -> None:
    for name, (row, size) in rows.items():
        if row is not None and (row.shape != (size,) or row.dtype != x.dtype or not row.is_cpu):
            raise ValueError(f"{name}: expected [{size}] {x.dtype} on the cpu, got {list(row.shape)} {row.dtype}")
