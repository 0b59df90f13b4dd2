"""Which library computes what lies on a GPU, what CuPy gets from torch, and how a wish that cannot be met is refused.

CuPy itself runs only on a device (tests/gpu/test_spectra.py); here a recorder stands in for it.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rmtkern import arrays
from rmtkern.arrays import computing, gpu_route, returned, through_torch
from rmtkern.spectrum.fit import fit_spectra


@pytest.fixture
def installed(monkeypatch):
    """A function that makes cupy look installed or not."""

    def set_(present, device=True):
        monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda name: object() if present else None)
        monkeypatch.setitem(
            sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: device), ndarray=type(None))
        )

    monkeypatch.delenv("RMTKERN_SPECTRA", raising=False)
    return set_


def test_cupy_where_it_can_run_else_torch(installed, monkeypatch):
    for present, device, expected in ((True, True, "cupy"), (True, False, "torch"), (False, False, "torch")):
        installed(present, device)
        assert gpu_route() == expected
    installed(True)
    monkeypatch.setenv("RMTKERN_SPECTRA", "torch")
    assert gpu_route() == "torch"
    monkeypatch.setenv("RMTKERN_SPECTRA", "")
    assert gpu_route() == "cupy"


def test_a_wish_that_cannot_be_met_is_refused(installed, monkeypatch):
    monkeypatch.setenv("RMTKERN_SPECTRA", "cupy")
    installed(False)
    missing = "RMTKERN_SPECTRA is 'cupy', but the package cupy is not installed; install rmtkern\\[gpu-cuda13\\]"
    with pytest.raises(ValueError, match=missing):
        fit_spectra({"w": np.eye(20)})
    installed(True, device=False)
    with pytest.raises(ValueError, match="cupy sees no device; install the one of this machine's CUDA"):
        fit_spectra({"w": torch.eye(20)})
    monkeypatch.setenv("RMTKERN_SPECTRA", "jax")
    with pytest.raises(ValueError, match="RMTKERN_SPECTRA is 'jax'; valid: cupy, torch"):
        fit_spectra({"w": np.eye(20)})


def test_arrays_on_a_cpu_never_import_cupy(monkeypatch):
    monkeypatch.delenv("RMTKERN_SPECTRA", raising=False)
    monkeypatch.setattr(arrays, "_cupy", lambda: pytest.fail("imported cupy"))
    fit_spectra({"w": torch.randn(20, 30)})


def test_cupy_gets_torchs_device_stream_and_memory(installed, monkeypatch):
    """Everything that `computing` sets, in order, and that it is undone; with a recorder for both libraries."""
    log = []

    def context(name):
        @contextmanager
        def enter(*args):
            log.append((name, *args))
            yield
            log.append(("leave", name))

        return enter

    installed(True)
    tensor = SimpleNamespace(device=torch.device("cuda", 1))
    cupy = sys.modules["cupy"]
    cupy.cuda.Device, cupy.cuda.ExternalStream = context("Device"), context("ExternalStream")
    cupy.cuda.using_allocator = context("using_allocator")
    cupy.cuda.PythonFunctionAllocator = lambda *functions: SimpleNamespace(malloc=functions)
    monkeypatch.setattr(torch.cuda, "device", context("torch device"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(arrays.torch, "Tensor", SimpleNamespace)
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), computing([np.eye(2), tensor]):
        assert arrays._route.get() == "cupy" and torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise RuntimeError("inside")
    assert arrays._route.get() == "torch" and torch.backends.cuda.matmul.fp32_precision == before
    assert log[:4] == [
        ("torch device", tensor.device), ("Device", 1), ("ExternalStream", 77),
        ("using_allocator", (arrays._allocate, arrays._free)),
    ]  # fmt: skip


def test_memory_comes_from_torch_and_goes_back(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", lambda *args: log.append(args) or 4096)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", lambda address: log.append(address))
    assert arrays._allocate(512, 1) == 4096
    arrays._free(4096, 1)
    assert log == [(512, 1, "stream of 1"), 4096]


def test_through_torch_copies_nothing(rng):
    gram = np.cov(rng.standard_normal((2, 5, 30))[0])[None]
    values, vectors = through_torch("eigh", gram)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(gram), rtol=1e-12)
    np.testing.assert_allclose(vectors @ (values[..., None] * np.swapaxes(vectors, 1, 2)), gram, atol=1e-12)
    assert isinstance(through_torch("eigvalsh", gram), np.ndarray)
    assert torch.from_dlpack(gram).data_ptr() == gram.ctypes.data


def test_what_did_not_come_from_cupy_is_returned_as_it_is():
    tensor, array = torch.ones(2), np.ones(2)
    assert returned(array, tensor) is array and returned(tensor, array) is tensor
