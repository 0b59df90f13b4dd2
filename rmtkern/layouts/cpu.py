"""The one custom op around rmtkern._C.linear, shared by every layout's cpu.py. It knows no layout by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch  # before _C, so that both use torch's OpenMP library
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rmtkern.errors import KernelUnavailable, refuse_onnx
from rmtkern.layouts.base import CPU_DTYPES, PackedWeight

MISSING: str | None = None

try:
    from rmtkern import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = (
        f"the extension rmtkern._C is not there ({error}); install a C++17 compiler and reinstall rmtkern,"
        " or run `python setup.py build_ext --inplace` in a checkout"
    )

__all__ = ["Norm", "as_array", "extension", "isas", "linear", "mlp", "supports", "unwatched"]


def isas() -> list[str]:
    """Names of the instruction sets that the extension runs on this CPU, best first; empty without the extension."""
    return [] if _C is None else _C.isas()


def supports(w: PackedWeight, x: Tensor) -> str | None:
    """Why the CPU kernels cannot compute x [T, K] times this weight, or None if they can."""
    if MISSING is not None:
        return MISSING
    if x.dtype not in w.dtypes or x.dtype not in CPU_DTYPES:
        return f"x is {x.dtype}; cast to {' or '.join(str(dtype) for dtype in w.dtypes if dtype in CPU_DTYPES)}"
    parts = w.tensors()
    if (held := next((part.dtype for part in parts if part.is_floating_point()), None)) != x.dtype:
        return f"x is {x.dtype}, the weight {held}; cast x, or pack the weight again in the dtype of x"
    for tensor in (x, *parts):
        if not tensor.is_cpu:
            return f"device {tensor.device}; move x and the weight to the cpu"
    return None


def extension() -> Any:
    """The module rmtkern._C; KernelUnavailable, with the remedy, if it was not built."""
    if _C is None:
        raise KernelUnavailable(MISSING)
    return _C


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A view for the extension; bfloat16, which NumPy lacks, crosses as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def unwatched(x: Tensor) -> bool:
    """Whether a kernel may run on x without PyTorch's dispatcher, whose cost is that of a small layer.

    Not where somebody looks at the operators of a call: a compiler, a tracer, a mode, a transform, the profiler.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not is_in_torch_dispatch_mode()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
    )


@dataclass(frozen=True, eq=False)
class _Held:
    """The parts of a weight as the extension takes them, and where they lay."""

    pointers: list[int]
    arrays: list[NDArray[Any]]
    params: list[int]


_held: WeakKeyDictionary[PackedWeight, _Held] = WeakKeyDictionary()


def _tensors(w: PackedWeight) -> tuple[Tensor, ...]:
    tensors = w.cpu_tensors()
    if tensors is None:
        raise KernelUnavailable(f"{w.label} is another library's form; pack the weight in one of ours")
    return tensors


def _hold(w: PackedWeight) -> _Held:
    tensors = _tensors(w)
    pointers = [part.data_ptr() for part in tensors]
    held = _held.get(w)
    if held is None or held.pointers != pointers:  # new, or its memory is another since
        held = _held[w] = _Held(pointers, [as_array(part) for part in tensors], list(w.params.values()))
    return held


Norm = tuple[Tensor | None, Tensor | None, float]
"""LayerNorm of the rows of x on their way into a kernel: weight [K] or None (ones), bias [K] or None (zeros), eps."""


def _norm_arrays(norm: Norm | None) -> tuple[NDArray[Any] | None, NDArray[Any] | None, float] | None:
    return None if norm is None else (_maybe(norm[0]), _maybe(norm[1]), norm[2])


def _as_norm(weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Norm | None:
    return None if eps is None else (weight, bias, eps)


def _maybe(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else as_array(tensor)


def _run(
    layout: str,
    x: Tensor,
    features: int,
    parts: list[NDArray[Any]],
    params: Sequence[int],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
    norm: Norm | None,
) -> Tensor:
    y = torch.empty(x.shape[0], features, dtype=x.dtype)
    extension().linear(
        layout,
        as_array(x),
        parts,
        params,
        _maybe(bias),
        _maybe(scale),
        _maybe(residual),
        as_array(y),
        activation,
        torch.get_num_threads(),
        gated=gated,
        norm=_norm_arrays(norm),
    )
    return y


@torch.library.custom_op("rmtkern::cpu_linear", mutates_args=(), device_types="cpu")
def _cpu_linear(
    layout: str,
    x: Tensor,
    features: int,
    parts: Sequence[Tensor],
    params: Sequence[int],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    arrays = [as_array(part) for part in parts]
    numbers = list(params or ())  # AOTInductor gives None for an empty list
    norm = _as_norm(norm_weight, norm_bias, norm_eps)
    return _run(layout, x, features, arrays, numbers, bias, activation, residual, scale, gated, norm)


@_cpu_linear.register_fake
def _(
    layout: str,
    x: Tensor,
    features: int,
    parts: Sequence[Tensor],
    params: Sequence[int],
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    refuse_onnx()
    return x.new_empty(x.shape[0], features)


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
    norm: Norm | None = None,
) -> Tensor:
    """Apply a packed weight on the CPU: y = activation(x Wᵀ + bias) * scale + residual, in one kernel.

    With `gated` = F > 0 the rows of `w` and `bias` are a gate-up pair (pairs.py): y [T, F] = activation(x Wgᵀ + bg) *
    (x Wuᵀ + bu) * scale + residual.

    Args:
        x: [T, K] float32 or bfloat16 (the dtype of the weight), contiguous.
        w: packed [N, K].
        bias: [N], dtype of `x`, or None.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        residual: [T, N] ([T, F] if gated), dtype of `x`, or None, contiguous, added last.
        scale: [N] ([F] if gated), dtype of `x`, or None: LayerScale, after the activation.
        gated: F, or 0.
        norm: of the rows of `x` first, dtype of `x`; they are not written, but where the layout is not walked weight by
            weight, into the cache.

    Returns:
        [T, N] ([T, F] if gated), dtype of `x`; summed in float32 on torch.get_num_threads() threads.

    Raises:
        ValueError: a shape or a name does not match.
        TypeError: a wrong dtype or a tensor that is not contiguous.
        KernelUnavailable: the extension is not built.
    """
    features = gated or w.shape[0]
    if unwatched(x):
        held = _hold(w)
        return _run(w.layout, x, features, held.arrays, held.params, bias, activation, residual, scale, gated > 0, norm)
    return torch.ops.rmtkern.cpu_linear(
        w.layout,
        x,
        features,
        _tensors(w),
        list(w.params.values()),
        bias,
        activation,
        residual,
        scale,
        gated > 0,
        *(norm or ()),
    )


def _run_mlp(
    layouts: tuple[str, str],
    x: Tensor,
    sizes: tuple[int, int],
    parts: tuple[list[NDArray[Any]], list[NDArray[Any]]],
    params: tuple[list[int], list[int]],
    biases: tuple[Tensor | None, Tensor | None],
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    norm: Norm | None,
) -> Tensor:
    hidden, features = sizes
    y = torch.empty(x.shape[0], features, dtype=x.dtype)
    extension().mlp(
        layouts,
        as_array(x),
        hidden,
        parts,
        params,
        (_maybe(biases[0]), _maybe(biases[1])),
        _maybe(scale),
        _maybe(residual),
        as_array(y),
        activation,
        torch.get_num_threads(),
        norm=_norm_arrays(norm),
    )
    return y


@torch.library.custom_op("rmtkern::cpu_mlp", mutates_args=(), device_types="cpu")
def _cpu_mlp(
    first: str,
    second: str,
    x: Tensor,
    hidden: int,
    features: int,
    first_parts: Sequence[Tensor],
    second_parts: Sequence[Tensor],
    first_params: Sequence[int],
    second_params: Sequence[int],
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    parts = [as_array(part) for part in first_parts], [as_array(part) for part in second_parts]
    params = list(first_params or ()), list(second_params or ())  # AOTInductor gives None for an empty list
    biases = first_bias, second_bias
    norm, sizes = _as_norm(norm_weight, norm_bias, norm_eps), (hidden, features)
    return _run_mlp((first, second), x, sizes, parts, params, biases, activation, residual, scale, norm)


@_cpu_mlp.register_fake
def _(
    first: str,
    second: str,
    x: Tensor,
    hidden: int,
    features: int,
    first_parts: Sequence[Tensor],
    second_parts: Sequence[Tensor],
    first_params: Sequence[int],
    second_params: Sequence[int],
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], features)


def mlp(
    x: Tensor,
    first: PackedWeight,
    second: PackedWeight,
    biases: tuple[Tensor | None, Tensor | None],
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Apply two packed weights on the CPU in one call: y = (activation(x W1ᵀ + b1) W2ᵀ + b2) * scale + residual.

    What lies between them is rounded to the dtype of `x`, as by two calls of `linear`, and stays in the cache; of
    layouts that are walked weight by weight it is never written row by row.

    Args:
        x: [T, K] float32 or bfloat16 (the dtype of both weights), contiguous.
        first: packed [F, K], a form that csrc computes.
        second: packed [N, F], likewise; of any layout.
        biases: [F] and [N], dtype of `x`, or None.
        activation: of the first: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        residual: [T, N], dtype of `x`, or None, contiguous, added last.
        scale: [N], dtype of `x`, or None: LayerScale.
        norm: of the rows of `x` first, as in `linear`.

    Returns:
        [T, N], dtype of `x`; summed in float32 on torch.get_num_threads() threads.

    Raises:
        ValueError: a shape or a name does not match.
        TypeError: a wrong dtype or a tensor that is not contiguous.
        KernelUnavailable: the extension is not built, or a form is another library's.
    """
    layouts, sizes = (first.layout, second.layout), (first.shape[0], second.shape[0])
    if unwatched(x):
        a, b = _hold(first), _hold(second)
        both = (a.arrays, b.arrays), (a.params, b.params)
        return _run_mlp(layouts, x, sizes, *both, biases, activation, residual, scale, norm)
    params = list(first.params.values()), list(second.params.values())
    parts = _tensors(first), _tensors(second)
    return torch.ops.rmtkern.cpu_mlp(
        *layouts, x, *sizes, *parts, *params, *biases, activation, residual, scale, *(norm or ())
    )
