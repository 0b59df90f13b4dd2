"""Calls that no GPU kernel can take: each is refused with the reason of each backend, never computed wrongly.

Tensors on a device that is not there are fake ones, which have a device and a shape and no data.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtkern import ops
from rmtkern.errors import KernelUnavailable
from rmtkern.layer_norm import layer_norm
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import PackedLinear
from rmtkern.packing import pack_
from rmtkern.packing.device import device_of

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(*shape, device="cuda", dtype=torch.float32):
    with FAKE:
        return torch.empty(*shape, device=device, dtype=dtype)


def dense(n=16, k=64, device="cuda", dtype=torch.float32):
    """A dense weight whose tensor is fake."""
    w = LAYOUTS["dense"].pack(torch.ones(n, k).to(dtype), form=3)
    w._plain()  # as it lies on a GPU: not in tiles
    w.dense = fake(n, k, device=device, dtype=dtype)
    return w


@pytest.fixture
def device_there(monkeypatch):
    """PyTorch says that there is a device, and kernels are looked for anew."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "KERNELS", {})


def set_architecture(monkeypatch, name, major, minor):
    properties = SimpleNamespace(name=name, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None if name == package else find(name))


def test_no_triton(device_there, monkeypatch):
    without(monkeypatch, "triton")
    why = r"on cuda:0: cuda: form own is not PyTorch's; it is for triton; triton: the package triton is not installed"
    with pytest.raises(KernelUnavailable, match=why):
        ops.linear(fake(3, 64), dense())
    packed = LAYOUTS["bitmask"].pack(torch.eye(64))
    with pytest.raises(KernelUnavailable, match=r"cuda: layout bitmask has no cuda kernel yet; triton: the package tr"):
        ops.linear(fake(3, 64), packed)


def test_no_triton_leaves_a_model_dense_with_the_reason(device_there, monkeypatch):
    without(monkeypatch, "triton")
    set_architecture(monkeypatch, "NVIDIA H100", 9, 0)
    probe = dense(1, 1)  # a fake tensor cannot be packed: that asks for its values
    monkeypatch.setattr(LAYOUTS["dense"], "pack", lambda weight, **params: probe)
    with FAKE:
        found = device_of(nn.ParameterList([torch.empty(4, device="cuda")]), [])
    assert "triton: the package triton is not installed" in found.reason and not found.kernels
    assert found.here["cpu"] == "NVIDIA H100" and found.here["isa"].startswith("compute capability 9.0, triton ")


def test_no_cupy(device_there, monkeypatch):
    real = ops.importlib.import_module

    def load(name):
        if name.endswith(".dense.cuda"):
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
        return real(name)

    without(monkeypatch, "triton")
    monkeypatch.setattr(ops.importlib, "import_module", load)
    with pytest.raises(KernelUnavailable, match=r"cuda: the package cupy is not installed; triton: the package triton"):
        ops.linear(fake(3, 64), dense())


def test_an_import_of_ours_that_fails_is_no_missing_package(device_there, monkeypatch):
    def load(name):
        raise ModuleNotFoundError("No module named 'rmtkern.gone'", name="rmtkern.gone")

    monkeypatch.setattr(ops.importlib, "import_module", load)
    with pytest.raises(ModuleNotFoundError, match=r"rmtkern\.gone"):
        ops.load_kernels("dense")


@pytest.mark.parametrize(("name", "major", "minor"), [("Tesla V100", 7, 0), ("Tesla T4", 7, 5), ("NVIDIA Thor", 11, 0)])
def test_an_architecture_that_is_not_supported(device_there, monkeypatch, name, major, minor):
    pytest.importorskip("triton")
    set_architecture(monkeypatch, name, major, minor)
    with pytest.raises(KernelUnavailable, match=rf"triton: {name} is none of sm_80, sm_86, .*, gfx942"):
        ops.linear(fake(3, 64), dense())


def test_dtypes_that_are_not_supported(device_there):
    pytest.importorskip("triton")
    for form, backend in ((3, "triton"), (0, "cuda")):
        w = dense()
        w.params["form"] = form
        with pytest.raises(KernelUnavailable, match=rf"{backend}: x is torch.float64; cast to torch.float32 or torch"):
            ops.linear(fake(3, 64, dtype=torch.float64), w)
        with pytest.raises(KernelUnavailable, match=rf"{backend}: x is torch.float16, the weight torch.float32; cast"):
            ops.linear(fake(3, 64, dtype=torch.float16), w)


@pytest.mark.parametrize(("form", "backend"), [(3, "triton"), (0, "cuda")])
def test_weight_and_input_on_two_devices(device_there, form, backend):
    pytest.importorskip("triton")
    for x, w, at in ((fake(3, 64), dense(device="cpu"), "cuda:0, the weight on cpu"),
                     (fake(3, 64), dense(device="cuda:1"), "cuda:0, the weight on cuda:1")):  # fmt: skip
        w.params["form"] = form
        with pytest.raises(KernelUnavailable, match=rf"{backend}: x is on {at}; move both to one"):
            ops.linear(x, w)
    w = dense()
    w.params["form"] = form
    with pytest.raises(
        KernelUnavailable, match=r"on cpu: cpu: x is on cpu, the weight on cuda:0; move both to the cpu"
    ):
        ops.linear(torch.randn(3, 64), w)


@pytest.mark.parametrize("layout", ["bitmask", "nofm", "block"])
def test_a_weight_of_a_gpu_and_an_input_of_the_cpu(layout):
    params = {"nofm": {"n": 2, "m": 4}, "block": {"r": 4, "c": 1}}.get(layout, {})
    w = LAYOUTS[layout].pack(torch.eye(64), **params)
    first = w.parts[0]
    setattr(w, first, fake(*getattr(w, first).shape))
    with pytest.raises(KernelUnavailable, match=r"cpu: device cuda:0; move x and the weight to the cpu"):
        ops.linear(torch.randn(3, 64), w)


@pytest.mark.parametrize("which", ["bias", "scale", "residual"])
def test_everything_else_must_be_where_x_is(which):
    w = LAYOUTS["bitmask"].pack(torch.eye(64))
    shapes = {"bias": (64,), "scale": (64,), "residual": (3, 64)}
    with pytest.raises(ValueError, match=rf"{which}: expected a tensor on cpu like x, got cuda:0; move it"):
        ops.linear(torch.randn(3, 64), w, **{which: fake(*shapes[which])})
    with pytest.raises(ValueError, match=rf"{which}: expected a tensor on cuda:0 like x, got cpu; move it"):
        ops.linear(fake(3, 64), w, **{which: torch.ones(shapes[which])})
    both = LAYOUTS["bitmask"].pack(torch.eye(64))
    gated = {"bias": (64,), "scale": (32,), "residual": (3, 32)}
    with pytest.raises(ValueError, match=rf"{which}: expected a tensor on cpu like x, got cuda:0; move it"):
        ops.gated_linear(torch.randn(3, 64), both, **{which: fake(*gated[which])})


def test_a_module_says_the_same(device_there, monkeypatch):
    without(monkeypatch, "triton")
    module = PackedLinear(dense())
    with torch.no_grad(), pytest.raises(KernelUnavailable, match=r"triton: the package triton is not installed"):
        module(fake(2, 5, 64))
    with torch.no_grad(), pytest.raises(KernelUnavailable, match=r"cpu: x is on cpu, the weight on cuda:0"):
        module(torch.randn(2, 5, 64))


def test_layer_norm_is_for_the_cpu():
    with pytest.raises(KernelUnavailable, match=r"device cuda:0; move x to the cpu"):
        layer_norm(fake(3, 8))
    with pytest.raises(ValueError, match=r"weight: expected a tensor on cpu like x, got cuda:0; move it"):
        layer_norm(torch.randn(3, 8), fake(8))
    with pytest.raises(ValueError, match=r"bias: expected a tensor on cpu like x, got cuda:0; move it"):
        layer_norm(torch.randn(3, 8), None, fake(8))


def test_more_elements_than_32_bits_count(device_there, monkeypatch):
    """Rows and stored values are counted in 32 bits; K and N below 2^23; products of the two in 64."""
    pytest.importorskip("triton")
    set_architecture(monkeypatch, "NVIDIA H100", 9, 0)
    with pytest.raises(KernelUnavailable, match=r"triton: tokens or stored values reach 2\^31; split the call"):
        ops.linear(fake(2**31, 2), dense(2, 2))
    with pytest.raises(
        KernelUnavailable, match=r"triton: the weight is \(8388608, 2\); N and K must be less than 2\^23"
    ):
        w = dense(2, 2)
        w.shape = (2**23, 2)
        ops.linear(fake(3, 2), w)
    from rmtkern.layouts.triton import supports

    assert supports(dense(2, 2), fake(2**31 - 1, 2)) is None  # 2^32 - 2 elements: their offsets have 64 bits


def test_a_model_on_several_devices_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].bias = nn.Parameter(fake(8, device="cuda:1"))
    with pytest.raises(ValueError, match=r"on one device, got cpu \(0\.weight\), cuda:1 \(1\.bias\); call model\.to"):
        pack_(model, torch.randn(2, 8))
