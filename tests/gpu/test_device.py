"""What only a device can show: dispatch without a named backend, moves, files, streams, tuning, compiler, huge tensors.

The first test of a new machine: `pytest tests/gpu -m gpu -k this_device`.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from rmtkern import load, ops, pack_, save, unpack_
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.pairs import interleave
from rmtkern.nn import PackedLinear
from rmtkern.packing.device import device_of
from rmtkern.testing import accuracy_excess, assert_as_accurate_as_dense, random_sparse

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
GIB = 2**30


def packed(layout, n=80, k=208, dtype=torch.bfloat16):
    """(packed, the weight that it holds) on the device."""
    w = random_sparse(n, k, 0.7, nofm=(2, 4) if layout == "nofm" else None).to(DEVICE, dtype)
    params = {"dense": {"form": 3}, "nofm": {"n": 2, "m": 4}, "block": {"r": 32, "c": 32}}
    if layout in ("lowrank", "spectral"):
        factors = w[:, :5].contiguous(), w[:5] / 2
        form = (
            LAYOUTS[layout].from_factors(*factors) if layout == "lowrank" else LAYOUTS[layout].from_parts(*factors, w)
        )
    else:
        form = LAYOUTS[layout].pack(w, **params.get(layout, {}))
    return form, form.unpack()


every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
def test_this_device_computes_every_layout_without_being_told_how(layout):
    form, w = packed(layout)
    x = torch.randn(37, 208, device=DEVICE, dtype=torch.bfloat16)
    y = ops.linear(x, form, activation="gelu")
    assert_as_accurate_as_dense(y, x, w, None, "gelu")
    again = ops.linear(x, form, activation="gelu", backend="triton")
    if layout == "nofm":  # which CuPy's kernel computes where CuPy is installed
        assert_as_accurate_as_dense(again, x, w, None, "gelu")
    else:
        assert torch.equal(y, again)


def test_this_device_is_one_that_pack_takes():
    assert device_of(nn.Linear(2, 2).to(DEVICE), []).reason is None
    rows = {row[:2]: row for row in ops.available().rows}
    assert all(rows[layout, "triton"][3] for layout in LAYOUTS)


def test_the_form_of_pytorch_is_computed_by_pytorch():
    w = random_sparse(80, 64, 0.5).to(DEVICE)
    x, bias = torch.randn(9, 64, device=DEVICE), torch.randn(80, device=DEVICE)
    form = LAYOUTS["dense"].pack(w)
    assert torch.equal(ops.linear(x, form, bias, activation="gelu"), F.gelu(F.linear(x, w, bias)))
    pair = LAYOUTS["dense"].pack(interleave(w[:40], w[40:]))
    y = ops.gated_linear(x, pair, activation="silu")
    assert accuracy_excess(y, x, w[:40], None, "silu", up=(w[40:], None)) <= 1


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "block"])  # its large ones are for a GPU
def test_a_weight_goes_to_the_cpu_and_comes_back(layout):
    form, w = packed(layout)
    x = torch.randn(5, 208, device=DEVICE, dtype=torch.bfloat16)
    before = ops.linear(x, form)
    assert_as_accurate_as_dense(ops.linear(x.cpu(), form.cpu()), x.cpu(), w.cpu())
    assert torch.equal(ops.linear(x, form.to(DEVICE)), before)


def model_and_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    for i in (0, 2):
        model[i].weight.data = random_sparse(*model[i].weight.shape, 0.9, seed=i)
    return model, torch.randn(6, 64)


def always_bitmask(calls, budget_ms):
    for call in calls.values():
        call()
    return {name: 1.0 if name in ("bitmask", "packed") else 2.0 for name in calls}


def test_a_model_packed_here_is_saved_and_loaded_anywhere(tmp_path):
    model, x = model_and_example()
    plain = [model[0].weight.clone(), model[2].weight.clone()]
    pack_(model.to(DEVICE), x.to(DEVICE), timer=always_bitmask)
    save(model, tmp_path / "packed.safetensors")
    again = load(tmp_path / "packed.safetensors", model_and_example()[0])
    assert all(isinstance(part, PackedLinear) for part in (again[0], again[2]))
    with torch.no_grad():
        here, there = model(x.to(DEVICE)).cpu(), again(x)
        back = again.to(DEVICE)(x.to(DEVICE)).cpu()
    scale = here.abs().max()
    assert (here - there).abs().max() < 1e-5 * scale and torch.equal(here, back)
    unpack_(again.cpu())
    assert all(torch.equal(again[i].weight, w) for i, w in zip((0, 2), plain, strict=True))


@every_layout
def test_tuning_changes_no_result(layout, monkeypatch):
    form, w = packed(layout)
    monkeypatch.setenv("RMTKERN_AUTOTUNE", "1")
    for tokens in (5, 200):
        x = torch.randn(tokens, 208, device=DEVICE, dtype=torch.bfloat16)
        assert_as_accurate_as_dense(ops.linear(x, form), x, w)


@every_layout
def test_the_current_stream_is_used(layout):
    form, w = packed(layout)
    x = torch.randn(400, 208, device=DEVICE, dtype=torch.bfloat16)
    expected = ops.linear(x, form)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # about 10 ms: on another stream the product would come before its input
        late = x * 1
        y = ops.linear(late, form)
    stream.synchronize()
    assert torch.equal(y, expected)
    assert_as_accurate_as_dense(y, x, w)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_compiler_takes_a_packed_layer_whole(mode):
    form, _ = packed("bitmask")
    module = PackedLinear(form, torch.zeros(80, device=DEVICE, dtype=torch.bfloat16), "gelu")
    x = torch.randn(40, 208, device=DEVICE, dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    with torch.no_grad():
        expected = module(x)
        for _ in range(3):  # a graph is recorded in the second call and launched in the third
            assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize(("n", "k"), [(16, 512), (512, 16)], ids=["x", "y"])
def test_more_elements_than_32_bits_count(layout, n, k):
    tokens = 2**22 + 77  # times 512 columns: over 2^31 elements of x or of y
    if torch.cuda.mem_get_info()[0] < 7 * GIB:
        pytest.skip("needs 7 GiB of free memory on the device")
    form, w = packed(layout, n, k)
    x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
    y = ops.linear(x, form)
    for rows in (slice(0, 100), slice(tokens // 2, tokens // 2 + 100), slice(-100, None)):
        assert_as_accurate_as_dense(y[rows], x[rows], w)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device only")
    form, w = packed("bitmask")
    form, x = form.to("cuda:1"), torch.randn(9, 208, device="cuda:1", dtype=torch.bfloat16)
    assert torch.cuda.current_device() == 0
    assert_as_accurate_as_dense(ops.linear(x, form), x, w.to("cuda:1"))
    with pytest.raises(ops.KernelUnavailable, match=r"x is on cuda:0, the weight on cuda:1; move both to one device"):
        ops.linear(x.to("cuda:0"), form)
