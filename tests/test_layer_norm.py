"""layer_norm(): accuracy on every instruction set, its errors, and how pack_ puts it into models and takes it out."""

import copy

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.layer_norm import layer_norm
from rmtkern.layouts import cpu
from rmtkern.packing import pack_, unpack_
from rmtkern.packing.norm import NormForward, watch_norms
from rmtkern.packing.sites import disable, enable
from tests.packing.test_pack import timer, timm_tiny, torchvision_small, transformers_small

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason="the extension is not built")
DTYPES = [torch.float32, torch.bfloat16]
ISAS = cpu.isas()


def exact(x, weight, bias, eps):
    """The definition, in NumPy float64."""
    x = x.double().numpy()
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.double().numpy()
    return torch.from_numpy(y if bias is None else y + bias.double().numpy())


def assert_accurate(y, x, weight=None, bias=None, eps=1e-5):
    """The rule of the project: twice PyTorch's error in this dtype, plus 4 eps of the output's scale."""
    want = exact(x, weight, bias, eps)
    dense = nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    allowed = 2 * (dense - want).abs().max() + 4 * torch.finfo(x.dtype).eps * want.abs().max()
    assert y.shape == x.shape and y.dtype == x.dtype
    assert (y - want).abs().max() <= allowed


def rows(t, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=generator) * 3 + 1
    weight, bias = torch.randn(2, k, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 2, 7, 16, 31, 64, 97, 192, 769])
def test_accuracy_on_ragged_shapes(monkeypatch, isa, dtype, k):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    for t in (1, 3, 16, 17, 197):
        x, weight, bias = rows(t, k, dtype)
        assert_accurate(layer_norm(x, weight, bias), x, weight, bias)
    assert_accurate(layer_norm(x), x)
    assert_accurate(layer_norm(x, weight, eps=1e-3), x, weight, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_constant_rows_give_the_bias_and_huge_means_keep_their_digits(monkeypatch, isa, dtype):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    _, weight, bias = rows(1, 97, dtype)
    for value in (0.0, 1.0, 0.1, -1e6, 3e38):  # no sum of the last fits float32
        x = torch.full((3, 97), value, dtype=dtype)
        assert_accurate(layer_norm(x, weight, bias), x, weight, bias)
    x = (1e6 + torch.randn(5, 97, generator=torch.Generator().manual_seed(0)).double() * 100).to(dtype)
    want = exact(x, weight, bias, 1e-5)
    # not by PyTorch's error, which is large here: differences of floats near their mean are exact in float32
    tolerance = 16 * torch.finfo(dtype).eps * want.abs().max()
    assert (layer_norm(x, weight, bias) - want).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_inf_and_nan_spoil_their_row_only(monkeypatch, isa, dtype):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    x, weight, bias = rows(4, 37, dtype)
    clean = layer_norm(x, weight, bias)
    x[1, 36], x[2, 0] = float("inf"), float("nan")
    y = layer_norm(x, weight, bias)
    assert y[1:3].isnan().all() and torch.equal(y[[0, 3]], clean[[0, 3]])


def test_leading_dims_strides_threads_and_compile():
    x, weight, bias = rows(24, 48, torch.float32)
    y = layer_norm(x, weight, bias)
    assert torch.equal(layer_norm(x.view(2, 3, 4, 48), weight, bias).view(24, 48), y)
    assert torch.equal(layer_norm(x[3], weight, bias), y[3])
    assert torch.equal(layer_norm(x.t().contiguous().t(), weight, bias), y)
    assert layer_norm(x[:0], weight).shape == (0, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer_norm(x, weight, bias), y) and torch.equal(layer_norm(x[:2], weight, bias), y[:2])
    finally:
        torch.set_num_threads(before)
    compiled = torch.compile(lambda x: layer_norm(x, weight, bias) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * y)


def test_errors():
    x, weight, bias = rows(2, 8, torch.float32)
    with pytest.raises(TypeError, match=r"x: expected a Tensor \[..., K\], got list"):
        layer_norm([1.0])
    for wrong in (torch.tensor(1.0), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"x: expected \[..., K >= 1\]"):
            layer_norm(wrong)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps: expected >= 0"):
            layer_norm(x, eps=eps)
    with pytest.raises(ValueError, match=r"weight: expected \[8\] torch.float32, got \[7\]"):
        layer_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"bias: expected \[8\] torch.float32, got \[8\] torch.float64"):
        layer_norm(x, weight, bias.double())
    with pytest.raises(KernelUnavailable, match=r"x is torch\.float64; cast to"):
        layer_norm(x.double())
    with pytest.raises(KernelUnavailable, match="device meta; move x to the cpu"):
        layer_norm(x.to("meta"))


def test_errors_of_the_extension():
    run = cpu.extension().layernorm
    x, y = np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(T, K\)"):
        run(x[0], None, None, y, 1e-5, 1)
    with pytest.raises(ValueError, match="layernorm needs K >= 1"):
        run(x[:, :0].copy(), None, None, y, 1e-5, 1)
    with pytest.raises(TypeError, match="x must be float32 or bfloat16"):
        run(x.astype(np.int32), None, None, y, 1e-5, 1)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        run(x, x[0, :7].copy(), None, y, 1e-5, 1)
    with pytest.raises(TypeError, match="bias must be float32 as x is"):
        run(x, None, np.zeros(8, np.uint16), y, 1e-5, 1)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 8\)"):
        run(x, None, None, y[:1], 1e-5, 1)
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        run(x, None, None, y, 1e-5, 0)
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        run(x, None, None, y, 1e-5, 1, "mmx")


def faster(calls, budget_ms):
    """The LayerNorm kernel takes half of PyTorch's time; all else is dense."""
    times = timer("dense/torch")(calls, budget_ms)
    return {"layer_norm/torch": 2.0, "layer_norm/kernel": 1.0} if "layer_norm/kernel" in calls else times


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("build", [timm_tiny, torchvision_small, transformers_small])
def test_pack_uses_it_in_real_models_and_unpack_takes_it_back(build, dtype):
    model, x = build()
    if dtype is not None:
        model.bfloat16().float()  # so that unpack_, which keeps bfloat16's precision, gives the same bits
    model.eval()
    original = copy.deepcopy(model)

    def run(model):
        y = model(*x)
        return (y if isinstance(y, torch.Tensor) else y[0]).detach()

    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    before = run(model)
    report = pack_(model, x, dtype=dtype, timer=faster)
    assert {site.name for site in report.norms} == set(norms) and len(norms) >= 5
    assert all(site.used and (site.torch_ms, site.kernel_ms) == (2.0, 1.0) for site in report.norms)
    assert f"LayerNorm kernel in {len(norms)} of {len(norms)} modules: 2.00x PyTorch's" in str(report)
    assert len(NormForward.of(model)) == len(norms) == len(NormForward.of(copy.deepcopy(model)))
    with torch.no_grad():  # two blocks of bfloat16, or sums in another order
        tolerance = 0.05 if dtype else 1e-5
        torch.testing.assert_close(run(model), before, rtol=0, atol=tolerance * float(before.abs().max()))
    with pytest.raises(PackedModelError, match="the model is packed already"):
        pack_(model, x, timer=faster)
    unpack_(model)
    assert NormForward.of(model) == []
    states = model.state_dict(), original.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    assert torch.equal(run(model), before)


def test_pack_leaves_it_where_it_is_not_faster_or_not_wanted():
    model, x = timm_tiny()
    report = pack_(model.eval(), x, timer=timer("dense/torch"))  # both take 3 ms
    assert NormForward.of(model) == [] and not any(site.used for site in report.norms)
    assert "1.00x PyTorch's, short of the margin (3 % less time)" in report.norms[0].reason
    unpack_(model)
    assert pack_(model, x, timer=faster, norms=False).norms == () and NormForward.of(model) == []


@pytest.mark.parametrize("original", [1.0, 0.5])
def test_the_guard_puts_it_back(original):
    model, x = timm_tiny()

    def measure(calls, budget_ms):
        if "original" not in calls:
            return faster(calls, budget_ms)
        for call in calls.values():
            call()
        return {name: 2.0 if NormForward.of(model) else original for name in calls} | {"original": original}

    report = pack_(model.eval(), x, timer=measure, attention=False)
    assert NormForward.of(model) == [] and not any(site.used for site in report.norms)
    assert any("the LayerNorm kernel made the model slower" in note for note in report.notes)


def test_a_failing_pack_leaves_the_layer_norms():
    model, x = timm_tiny()

    def fails(calls, budget_ms):
        if "original" in calls:
            raise RuntimeError("stop")
        return faster(calls, budget_ms)

    with pytest.raises(RuntimeError, match="stop"):
        pack_(model.eval(), x, timer=fails)
    assert NormForward.of(model) == []
    assert not any("forward" in vars(module) for module in model.modules())


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherEps(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, 0.1)


class ByHand(nn.LayerNorm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) * self.weight


@pytest.mark.parametrize(
    ("norm", "x", "reason"),
    [
        (Doubled(8), torch.randn(4, 8), "does more than F.layer_norm"),
        (OtherEps(8), torch.randn(4, 8), "another eps"),
        (ByHand(8), torch.randn(4, 8), "is not one call of F.layer_norm"),
        (LayerNorm2d(8), torch.randn(1, 8, 3, 8), "F.layer_norm"),
        (nn.LayerNorm((4, 8)), torch.randn(2, 4, 8), "it normalises 2 dimensions"),
        (nn.LayerNorm(8).double(), torch.randn(4, 8).double(), "x is torch.float64"),
        (nn.LayerNorm(8), torch.randn(0, 8), "is empty"),
    ],
)
def test_what_the_kernel_cannot_compute_stays(norm, x, reason):
    model = nn.Sequential(norm, nn.Identity())
    with torch.no_grad(), watch_norms(model) as calls:
        model(x)
    assert reason in calls["0"][0].reason and type(norm).__name__ == type(model[0]).__name__


def test_layer_norms_with_hooks_are_not_watched():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False))
    model[0].register_forward_hook(lambda *_: None)
    with torch.no_grad(), watch_norms(model) as calls:
        model(torch.randn(4, 8))
    assert list(calls) == ["1"] and calls["1"][0].reason is None


def test_an_enabled_module_falls_back_to_its_own_forward():
    norm, x = nn.LayerNorm(8), torch.randn(4, 8)
    own = norm(x)
    enable([NormForward(norm)])
    wanted = norm(x)
    wanted.sum().backward()  # a gradient is wanted, so PyTorch computes it
    assert norm.weight.grad is not None and torch.equal(wanted, own)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fallen = norm(x.bfloat16())
    with torch.no_grad():
        assert norm(x.double().float()).shape == x.shape
        compiled = torch.compile(nn.Sequential(norm), backend="aot_eager")
        torch.testing.assert_close(compiled(x), own)
        fast = norm(x)
    disable(NormForward.of(norm))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x.bfloat16()), fallen)
    torch.testing.assert_close(fast, own)
    assert "forward" not in vars(norm)
