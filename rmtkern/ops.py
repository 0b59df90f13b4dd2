"""linear() and gated_linear(): check a call once, select a kernel and call it; available() says which run here.

The path is the registry: a kernel is `rmtkern/layouts/<layout>/<backend>.py`. This file knows no model.
"""

import importlib
import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from rmtkern.activations import FUNCTIONS
from rmtkern.errors import KernelUnavailable
from rmtkern.gpu import has_device
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.pairs import rows_of
from rmtkern.tables import Table, Tabulated

__all__ = ["ACTIVATIONS", "Availability", "available", "gated_linear", "linear", "load_kernels"]

ACTIVATIONS = (None, *FUNCTIONS)
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # device -> fastest first
OWN_ORDER = {("cuda", "nofm"): ("triton", "cuda")}  # device, layout -> another order: no device has timed nofm/cuda
NAMES = ("cpu", "cuda", "triton", "reference")  # "reference" runs only when named
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # what csrc/isa is written for
NEEDS = {"triton": "triton"}  # the package without which no kernel of a backend can be imported
NO_DEVICE = "no CUDA device"
KERNELS: dict[str, dict[str, ModuleType | str]] = {}  # layout -> backend -> module, or why there is none

_log = logging.getLogger(__name__)
_used: set[tuple[str, str]] = set()


def load_kernels(layout: str) -> None:
    """Import every backend of a layout into KERNELS, once; a call then does plain dict look-ups, which compile traces.

    Args:
        layout: a name in LAYOUTS.

    Raises:
        ValueError: no such layout.
    """
    if layout in KERNELS:
        return
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; valid: {', '.join(LAYOUTS)}")
    found: dict[str, ModuleType | str] = {}
    for backend in NAMES:
        path = f"rmtkern.layouts.{layout}.{backend}"
        need = NEEDS.get(backend)
        if importlib.util.find_spec(path) is None:
            found[backend] = f"layout {layout} has no {backend} kernel yet"
        elif need is not None and importlib.util.find_spec(need) is None:
            found[backend] = _missing(need)
        elif backend in BACKENDS["cuda"] and not has_device():
            found[backend] = NO_DEVICE  # so that a machine without one never imports triton
        else:
            found[backend] = _imported(path)
    KERNELS[layout] = found


def _imported(path: str) -> ModuleType | str:
    """A kernel's module, or which package it imports that is not there or cannot load its libraries (nofm's cupy)."""
    try:
        return importlib.import_module(path)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            return _missing(error.name)
        return str(error).strip().partition("\n")[0]


def _missing(package: str) -> str:
    return f"the package {package} is not installed"


def _candidates(device: str, layout: str, backend: str | None) -> tuple[str, ...]:
    """Backends to try for a layout, in order; `backend` or RMTKERN_BACKEND forces one."""
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("RMTKERN_BACKEND"), "RMTKERN_BACKEND"
    if not backend:
        return OWN_ORDER.get((device, layout)) or BACKENDS.get(device, ())
    if backend not in NAMES:
        raise ValueError(f"{source} is {backend!r}; valid: {', '.join(NAMES)}")
    return (backend,)


def _select(x: Tensor, w: PackedWeight, backend: str | None) -> ModuleType:
    if w.layout not in KERNELS:
        load_kernels(w.layout)
    reasons = []
    for name in _candidates(x.device.type, w.layout, backend):
        kernel = KERNELS[w.layout][name]
        if isinstance(kernel, str):
            reasons.append(f"{name}: {kernel}")
            continue
        reason = kernel.supports(w, x)
        if reason is None:
            if not torch.compiler.is_compiling() and (w.layout, name) not in _used:
                _used.add((w.layout, name))
                _log.info("first use of kernel %s/%s", w.layout, name)
            return kernel
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) if reasons else f"no backend is written for this device; move the model to {_devices()}"
    raise KernelUnavailable(f"no kernel runs layout {w.layout!r} on {x.device}: {why}")


def _devices() -> str:
    return " or ".join(BACKENDS)


def linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a packed weight in one kernel: y = activation(x Wᵀ + bias) * scale + residual.

    Args:
        x: [..., K]; any strides, any leading dims, also none or an empty one.
        w: packed [N, K].
        bias: [N], dtype of `x`.
        activation: None, "gelu" (exact erf form), "gelu_tanh", "relu" or "silu".
        scale: [N], dtype of `x`, multiplied after the activation (LayerScale).
        residual: [..., N], dtype of `x`, added last.
        backend: force "cpu", "cuda", "triton" or "reference"; default, RMTKERN_BACKEND or the fastest that supports
            the call (never the reference).

    Returns:
        [..., N], dtype of `x`. No gradient flows through it.

    Raises:
        TypeError: `x` or `w` has the wrong type.
        ValueError: a shape, dtype, device or name does not match.
        KernelUnavailable: no kernel supports this call; the message gives each one's reason.
    """
    return _call(x, w, bias, activation, scale, residual, backend, 0)


def gated_linear(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    features: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a packed gate-up pair in one kernel: y = activation(x Wgᵀ + bg) * (x Wuᵀ + bu) * scale + residual.

    Args:
        x: [..., K]; any strides, any leading dims, also none or an empty one.
        w: packed [N, K], the rows of Wg and Wu [F, K] as `layouts.pairs.interleave` puts them, N = 2 ceil(F / 8) 8.
        bias: [N], bg and bu likewise, dtype of `x`.
        activation: of the gate: None, "gelu" (exact erf form), "gelu_tanh", "relu" or "silu" (SwiGLU).
        scale: [F], dtype of `x`, multiplied after the product of the two.
        residual: [..., F], dtype of `x`, added last.
        features: F; default N / 2. Needed where F is not divisible by 8.
        backend: as in `linear`.

    Returns:
        [..., F], dtype of `x`. No gradient flows through it.

    Raises:
        TypeError: `x` or `w` has the wrong type.
        ValueError: a shape, dtype, device or name does not match.
        KernelUnavailable: no kernel supports this call; the message gives each one's reason.

    Source: Shazeer (2020), "GLU variants improve transformer".
    """
    n = w.shape[0] if isinstance(w, PackedWeight) else 0
    features = n // 2 if features is None else features
    if n and (features < 1 or rows_of(features) != n):
        raise ValueError(
            f"features: {features} outputs do not fit the {n} rows of the packed pair; expected N = 2 ceil(F / 8) 8"
        )
    return _call(x, w, bias, activation, scale, residual, backend, features)


def _call(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    scale: Tensor | None,
    residual: Tensor | None,
    backend: str | None,
    gated: int,
) -> Tensor:
    """Either verb: `gated` is F of a gate-up pair, or 0."""
    if not isinstance(x, Tensor) or not isinstance(w, PackedWeight):
        raise TypeError(f"expected a Tensor and a PackedWeight, got {type(x).__name__} and {type(w).__name__}")
    (rows, k), n = w.shape, gated or w.shape[0]
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)} but the packed weight expects [..., {k}]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; valid: {', '.join(map(str, ACTIVATIONS))}")
    if bias is not None:
        _check_row("bias", bias, rows, x)
    if scale is not None:
        _check_row("scale", scale, n, x)
    lead = x.shape[:-1]
    if residual is not None:
        if residual.shape != (*lead, n) or residual.dtype != x.dtype:
            raise ValueError(f"residual: expected {[*lead, n]} {x.dtype}, got {list(residual.shape)} {residual.dtype}")
        _check_device("residual", residual, x)
    kernel = _select(x, w, backend)
    if 0 in lead:
        return x.new_empty((*lead, n))
    tokens = x.detach().reshape(-1, k).contiguous()
    added = None if residual is None else residual.detach().reshape(-1, n).contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    scale = None if scale is None else scale.detach().contiguous()
    y = kernel.linear(tokens, w, bias, activation, added, scale, gated)
    return y.reshape(*lead, n)


def _check_row(name: str, row: Tensor, size: int, x: Tensor) -> None:
    if row.shape != (size,) or row.dtype != x.dtype:
        raise ValueError(f"{name}: expected [{size}] {x.dtype}, got {list(row.shape)} {row.dtype}")
    _check_device(name, row, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {tensor.device}; move it")


@dataclass(frozen=True)
class Availability(Tabulated):
    """Which layouts run on which backend and instruction set here, and why not the others.

    Args:
        rows: (layout, backend, isa, runs, why not or "") for each; isa is "-" where the backend has no choice of ours.
    """

    rows: tuple[tuple[str, str, str, bool, str], ...]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(("layout", "backend", "isa", "runs", "why not"), self.rows)

    def to_json(self) -> str:
        """JSON list with one object per row."""
        return json.dumps(
            [dict(zip(("layout", "backend", "isa", "runs", "why"), row, strict=True)) for row in self.rows]
        )


def available() -> Availability:
    """Which layouts run on which backend and instruction set on this machine, and why not the others.

    Returns:
        An object that prints as a table; one row for each layout, backend and instruction set.
    """
    from rmtkern.layouts import cpu

    rows: list[tuple[str, str, str, bool, str]] = []
    for layout in LAYOUTS:
        load_kernels(layout)
        for backend, kernel in KERNELS[layout].items():
            if isinstance(kernel, str):
                more = "" if torch.cuda.is_available() or kernel == NO_DEVICE else f"; {NO_DEVICE}"
                rows.append((layout, backend, "-", False, kernel + more))
            elif backend in BACKENDS["cuda"] and not torch.cuda.is_available():
                rows.append((layout, backend, "-", False, NO_DEVICE))
            elif getattr(kernel, "linear", None) is cpu.linear:
                runs = cpu.isas()
                rows += [(layout, backend, isa, True, "") for isa in runs]
                if cpu.MISSING is not None:
                    rows.append((layout, backend, "-", False, cpu.MISSING))
                else:
                    missing = [isa for isa in ISAS if isa not in runs]
                    rows += [(layout, backend, isa, False, f"this CPU lacks {isa}") for isa in missing]
            else:
                note = "only when named: backend='reference'" if backend == "reference" else ""
                rows.append((layout, backend, "-", True, note))
    return Availability(tuple(rows))
