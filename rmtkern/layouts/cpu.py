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

__all__ = ["as_array", "extension", "isas", "linear", "supports", "unwatched"]


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


def _hold(w: PackedWeight) -> _Held:
    pointers = [part.data_ptr() for part in w.tensors()]
    held = _held.get(w)
    if held is None or held.pointers != pointers:  # new, or its memory is another since
        held = _held[w] = _Held(pointers, [as_array(part) for part in w.tensors()], list(w.params.values()))
    return held


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
) -> Tensor:
    y = torch.empty(x.shape[0], features, dtype=x.dtype)
    extension().linear(
        layout,
        as_array(x),
        parts,
        params,
        None if bias is None else as_array(bias),
        None if scale is None else as_array(scale),
        None if residual is None else as_array(residual),
        as_array(y),
        activation,
        torch.get_num_threads(),
        gated=gated,
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
) -> Tensor:
    arrays = [as_array(part) for part in parts]
    numbers = list(params or ())  # AOTInductor gives None for an empty list
    return _run(layout, x, features, arrays, numbers, bias, activation, residual, scale, gated)


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
        return _run(w.layout, x, features, held.arrays, held.params, bias, activation, residual, scale, gated > 0)
    return torch.ops.rmtkern.cpu_linear(
        w.layout,
        x,
        features,
        w.tensors(),
        list(w.params.values()),
        bias,
        activation,
        residual,
        scale,
        gated > 0,
    )
