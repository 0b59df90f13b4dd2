"""masked_linear(): a linear whose weight is pruned by a live threshold, with gradients, for sparse fine-tuning.

No mask is stored. For inference prune once and pack: docs/gpu.md says what the threshold costs in every call.
"""

import importlib.util
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rmtkern.activations import FUNCTIONS, GRADIENTS, apply_activation
from rmtkern.errors import KernelUnavailable
from rmtkern.gpu import has_device

__all__ = ["BACKENDS", "masked_linear"]

BACKENDS = ("triton", "reference")


def masked_linear(
    x: Tensor,
    w: Tensor,
    threshold: float | Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear with a weight that is pruned in every call: y = activation(x (W o [|W| >= threshold])ᵀ + bias).

    The gradient of W is the gradient of the pruned weight where it is kept, and 0 where it is pruned: as if W had been
    pruned before and its zeros held. A pruned entry keeps its value, so that a lower threshold brings it back; an entry
    that training moves below the threshold is pruned from then on. No gradient flows to the threshold.

    Under autocast x, W and bias are cast to its dtype first, and the threshold is compared with the cast weight.

    Args:
        x: [..., K] float32, float16 or bfloat16 (also float64 with backend "reference").
        w: [N, K], dtype and device of `x`.
        threshold: >= 0, compared in float32 (float64 if `w` is); a number, or a tensor [] on the device of `x`, which
            may change between calls without compiling or waiting.
        bias: [N], dtype and device of `x`.
        activation: None, "gelu" (exact erf form), "gelu_tanh", "relu" or "silu".
        backend: "triton" or "reference" (PyTorch's operations); default "triton" on a GPU, else "reference".

    Returns:
        [..., N], dtype of `x`. With the kernels sums are float32 and rounded once, in both directions; the same call
        gives the same bits.

    Raises:
        TypeError: `x` or `w` is no tensor.
        ValueError: a shape, dtype, device or name does not match, or the threshold is negative or not finite.
        KernelUnavailable: the kernels cannot take this call; the message says why.

    Source: docs/math.md (31).
    """
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        raise TypeError(f"expected two Tensors, got {type(x).__name__} and {type(w).__name__}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, w, bias, activation)
    limit = _threshold(threshold, w)
    backend = _backend(x, w, backend)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias))
    keep = trained and activation is not None
    row = None if bias is None else bias.contiguous()
    y, _ = _forward(tokens, w.contiguous(), limit, row, activation, keep, backend)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _check(x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w: expected [N, K] with N, K >= 1, got {list(w.shape)}")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} but the weight expects [..., {w.shape[1]}]")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating point, got {x.dtype}")
    if activation is not None and activation not in FUNCTIONS:
        raise ValueError(f"unknown activation {activation!r}; valid: None, {', '.join(FUNCTIONS)}")
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"bias: expected [{w.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("w", w), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name}: expected {x.dtype} on {x.device} as x, got {tensor.dtype} on {tensor.device}; cast or move it"
            )


def _threshold(threshold: float | Tensor, w: Tensor) -> Tensor:
    """The threshold as a tensor [] in the dtype that magnitudes are compared in."""
    dtype = torch.promote_types(w.dtype, torch.float32)
    if not isinstance(threshold, Tensor):
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold: expected a finite number >= 0, got {threshold!r}")
        return torch.full((), threshold, dtype=dtype, device=w.device)
    if threshold.shape != () or threshold.device != w.device:
        raise ValueError(
            f"threshold: expected a number or a tensor [] on {w.device}, got {list(threshold.shape)} on "
            f"{threshold.device}; move it"
        )
    return threshold.detach().to(dtype)


def _backend(x: Tensor, w: Tensor, backend: str | None) -> str:
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    backend = backend or ("triton" if x.device.type == "cuda" else "reference")
    if backend == "triton":
        reason = _reason_against_triton(x, w)
        if reason is not None:
            raise KernelUnavailable(
                f"no kernel runs masked_linear on {x.device}: triton: {reason}; backend='reference' does without"
            )
    return backend


def _reason_against_triton(x: Tensor, w: Tensor) -> str | None:
    """Why the kernels cannot take this call, or None if they can; without a device triton is never imported."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not has_device():
        return "no CUDA device"
    from rmtkern.layouts import triton_masked

    return triton_masked.reason_against(x.reshape(-1, x.shape[-1]), w)


def _kept(w: Tensor, threshold: Tensor, value: Tensor) -> Tensor:
    """The value where |w| is not below the threshold, else 0."""
    return torch.where(w.abs().to(threshold.dtype) < threshold, 0, value)


@torch.library.custom_op("rmtkern::masked_linear", mutates_args=())
def _forward(
    x: Tensor, w: Tensor, threshold: Tensor, bias: Tensor | None, activation: str | None, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Result [T, N], and with `keep` what the activation was applied to [T, N], else [0]."""
    if backend == "triton" and len(x):
        from rmtkern.layouts import triton_masked

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return triton_masked.forward(x, w, threshold, bias, activation, keep)
    before = F.linear(x, _kept(w, threshold, w), bias)
    y = apply_activation(before, activation)
    return y, x.new_empty(0) if not keep else before.clone() if y is before else before


@_forward.register_fake
def _(
    x: Tensor, w: Tensor, threshold: Tensor, bias: Tensor | None, activation: str | None, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], w.shape[0])
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.custom_op("rmtkern::masked_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    before: Tensor,
    x: Tensor,
    w: Tensor,
    threshold: Tensor,
    activation: str | None,
    to_x: bool,
    to_w: bool,
    to_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], w [N, K] and the bias [N]; [0] for each that is not needed."""
    grad, none = grad.contiguous(), x.new_empty(0)
    if backend == "triton" and len(x):
        from rmtkern.layouts import triton_masked

        with torch.cuda.device_of(x):
            found = triton_masked.backward(grad, before, x, w, threshold, activation, (to_x, to_w, to_bias))
        return tuple(none.clone() if part is None else part for part in found)  # type: ignore[return-value]
    if activation is not None:
        grad = GRADIENTS[activation](grad, before)
    return (
        grad @ _kept(w, threshold, w) if to_x else none,
        _kept(w, threshold, grad.t() @ x) if to_w else none.clone(),
        grad.sum(0) if to_bias else none.clone(),
    )


@_backward.register_fake
def _(
    grad: Tensor,
    before: Tensor,
    x: Tensor,
    w: Tensor,
    threshold: Tensor,
    activation: str | None,
    to_x: bool,
    to_w: bool,
    to_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = zip((to_x, to_w, to_bias), (x.shape, w.shape, w.shape[:1]), strict=True)
    of_x, of_w, of_bias = (x.new_empty(size if needed else 0) for needed, size in sizes)
    return of_x, of_w, of_bias


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w, threshold, _, activation, keep, backend = inputs
    if activation is not None and not keep:
        raise ValueError("rmtkern::masked_linear: gradients through an activation need keep=True")
    ctx.save_for_backward(x, w, threshold, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.backend = activation, backend  # type: ignore[attr-defined]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, w, threshold, before = ctx.saved_tensors  # type: ignore[attr-defined]
    needed = [bool(ctx.needs_input_grad[place]) for place in (0, 1, 3)]  # type: ignore[attr-defined]
    found = _backward(grad, before, x, w, threshold, ctx.activation, *needed, ctx.backend)  # type: ignore[attr-defined]
    of_x, of_w, of_bias = (part if wanted else None for part, wanted in zip(found, needed, strict=True))
    return of_x, of_w, None, of_bias, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
