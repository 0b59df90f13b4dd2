"""nofm 2:4 on sparse tensor cores with the whole epilogue in one kernel: sparse_product.cu, by CuPy.

Importing this file imports cupy, which builds the kernel by NVRTC when a tile and an epilogue are first used and keeps
it on disk. It needs CUDA 12.5 or later (PTX ISA 8.5).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor

from rmtkern.errors import KernelUnavailable
from rmtkern.gpu import ARCHITECTURES, FEATURES, ROWS, architecture
from rmtkern.layouts.gpu_configs import choose
from rmtkern.layouts.nofm import sparse_product
from rmtkern.layouts.nofm.weight import NofMWeight
from rmtkern.layouts.refusals import reason_against

__all__ = ["launch", "linear", "supports"]

DTYPES = (torch.float16, torch.bfloat16)
SEES_DEVICE = bool(cupy.cuda.is_available())


def supports(w: NofMWeight, x: Tensor) -> str | None:
    """Why this kernel cannot compute x [T, K] times this weight, or None if it can."""
    if not w.halved:
        return f"the pattern is {w.params['n']}:{w.params['m']}; sparse tensor cores take 2:4"
    reason = reason_against(w.values, x, DTYPES, "cuda")
    if reason is not None:
        return reason
    if max(w.shape) >= FEATURES:
        return f"the weight is {w.shape}; N and K must be less than 2^23"
    if x.shape[0] >= ROWS:
        return "tokens reach 2^31; split the call"
    if not SEES_DEVICE:
        return "cupy sees no device; install the one of this machine's CUDA"
    return _reason_against_device(x.device)


def _reason_against_device(device: torch.device) -> str | None:
    """Why the kernel does not run on a device; not asked while PyTorch traces."""
    if torch.compiler.is_compiling():
        return None
    properties = torch.cuda.get_device_properties(device)
    known = torch.version.hip is None and architecture("cuda", 10 * properties.major + properties.minor) is not None
    names = ", ".join(name for name in ARCHITECTURES if name.startswith("sm_"))
    return None if known else f"{properties.name} is none of {names}"


@functools.cache
def _built(device: torch.device, options: tuple[str, ...], shared: int) -> Any:
    """The kernel on the current device, with leave to use so many bytes of shared memory."""
    try:
        kernel = cupy.RawModule(code=sparse_product.source(), options=options).get_function(sparse_product.NAME)
        kernel.max_dynamic_shared_size_bytes = shared
    except Exception as error:  # of CuPy, NVRTC or the driver
        raise KernelUnavailable(
            f"layout 'nofm' on {device}: cuda: cupy cannot build the kernel, which needs NVRTC of CUDA 12.5 or later:"
            f" {str(error).strip()[:500]}; use backend='triton'"
        ) from error
    return kernel


def _argument(value: Tensor | int | None) -> Any:
    """A kernel's parameter as CuPy takes it: an address, or a number of 32 bits."""
    if isinstance(value, int):
        return np.int32(value)
    return np.uint64(0 if value is None else value.data_ptr())


@contextmanager
def _torchs_stream(device: torch.device) -> Iterator[None]:
    """CuPy works on torch's device and current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device), cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream):
        yield


def launch(
    y: Tensor,
    x: Tensor,
    kept: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> None:
    """Write y [T, N] ([T, F] if gated); kept and meta: of `NofMWeight.gpu_tensors`. All else as in `linear`."""
    widths = sparse_product.pieces(x, kept)
    if widths is None:  # views that begin between two copies
        x, kept = x.clone(), kept.clone()
        widths = sparse_product.pieces(x, kept)
        assert widths is not None
    tokens, n = len(x), len(kept)
    config = choose("sparse_product", 2, ARCHITECTURES[0], tokens, widths == sparse_product.WIDE)  # one table for all
    options = sparse_product.options(config, x.dtype == torch.bfloat16, activation, gated, widths)
    shared = sparse_product.shared_bytes(config)
    arguments = (x, kept, meta, bias, scale, residual, y, tokens, n, y.shape[1], x.shape[1])
    with _torchs_stream(x.device):
        kernel = _built(x.device, options, shared)
        grid = sparse_product.grid(config, (tokens, n))
        kernel(grid, (32 * config.warps,), tuple(map(_argument, arguments)), shared_mem=shared)


@torch.library.custom_op("rmtkern::sparse_product", mutates_args=())
def _sparse_product(
    x: Tensor,
    features: int,
    kept: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    y = x.new_empty(x.shape[0], features)
    launch(y, x, kept, meta, bias, activation, residual, scale, gated)
    return y


@_sparse_product.register_fake
def _(
    x: Tensor,
    features: int,
    kept: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], features)


def linear(
    x: Tensor,
    w: NofMWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    gated: int = 0,
) -> Tensor:
    """Apply a 2:4 weight on sparse tensor cores: y = activation(x Wᵀ + bias) * scale + residual in one kernel.

    Args, returns: as `linear` of layouts/triton.py, for float16 and bfloat16.

    Raises:
        KernelUnavailable: CuPy cannot build the kernel.
    """
    kept, _, meta = w.gpu_tensors()
    features = gated or w.shape[0]
    return torch.ops.rmtkern.sparse_product(x, features, kept, meta, bias, activation, residual, scale, gated > 0)
