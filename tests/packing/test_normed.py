"""pack_ and LayerNorm before a linear: where the linear normalises its rows itself, and that unpack_ takes it back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rmtkern import load, save
from rmtkern.layouts import cpu
from rmtkern.nn import PackedLinear
from rmtkern.packing import PackReport, is_packed, pack_, unpack_
from rmtkern.packing.norm import watch_norms
from rmtkern.packing.normed import LeavingForward, find_normed
from rmtkern.packing.outputs import outputs_on
from rmtkern.packing.sites import KernelForward, disable, enable
from rmtkern.storage import read_metadata
from tests.packing.test_pack import assert_same_function, prune, timm_tiny, torchvision_small, transformers_small
from tests.test_files import written

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason="the extension is not built")


def timer(kernel_ms=1.0, whole=None, apart=4.0):
    """A timer that runs every call once: bitmask 2 ms, dense 5, what is fused `kernel_ms`, apart 4."""

    def measure(calls, budget_ms):
        for call in calls.values():
            call()
        if "original" in calls:
            states = whole or {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}
            return {name: states[name] for name in calls}
        fixed = {"bitmask": 2.0, "normed/kernel": kernel_ms, "normed/torch": apart, "mlp/kernel": 1.0, "mlp/torch": 4.0}
        return {label: fixed.get(label, 5.0 + 0.1 * i) for i, label in enumerate(calls)}

    return measure


def leaving(model):
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(f.module)]: f for f in KernelForward.of(model) if isinstance(f, LeavingForward)}


def found(model, *examples):
    model.eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    calls = [((x,), {}) for x in examples]
    with watch_norms(model) as seen:
        outputs = outputs_on(model, calls)
    norms = {name: model.get_submodule(name) for name, found in seen.items() if found[0].reason is None}
    return find_normed(model, norms, linears, calls, outputs, 1e-4)


class Block(nn.Module):
    """norm -> linear, in several ways that nearly are."""

    def __init__(self, way):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.way = way

    def forward(self, x):
        y = self.norm(x)
        if self.way == "alone":
            return x + self.b(self.a(y))
        if self.way == "shape":
            return self.a(y) * y.shape[-1] + self.b(x)
        if self.way == "two linears":
            return self.a(y) + self.b(y)
        if self.way == "values":
            return self.a(y) + y
        if self.way == "view":
            return self.a(y.view(-1, 64)).view(x.shape) + self.b(x)
        return self.a(y) + self.a(x)  # the linear has another input too


@pytest.mark.parametrize(
    ("way", "pairs"),
    [
        ("alone", {"norm": "a"}),
        ("shape", {"norm": "a"}),
        ("two linears", {}),
        ("values", {}),
        ("view", {}),
        ("mix", {}),
    ],
)
def test_which_norms_feed_one_linear_alone(way, pairs):
    torch.manual_seed(0)
    assert found(Block(way), torch.randn(2, 3, 64), torch.randn(1, 5, 64)) == pairs


def test_norms_that_are_altered_or_have_two_dimensions_stay():
    model = nn.Sequential(nn.LayerNorm((3, 64)), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 5))
    model[2].register_forward_hook(lambda *args: None)
    assert found(model, torch.randn(2, 3, 64)) == {}


SITES = [
    (timm_tiny, ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"], 2),
    (torchvision_small, [f"encoder.layers.encoder_layer_{i}.ln_2" for i in range(2)], 2),
    (transformers_small, [f"layers.{i}.layernorm_after" for i in range(2)], 2),
]


@pytest.mark.parametrize(("build", "norms", "mlps"), SITES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_real_models_go_and_come_back(build, norms, mlps, dtype, tmp_path):
    torch.manual_seed(0)
    model, x = build()
    prune(model, 0.8)
    dense = copy.deepcopy(model)
    before = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        report = pack_(model, *x, dtype=dtype, timer=timer())
        assert [site.name for site in report.normed if site.used] == norms and sorted(leaving(model)) == norms
        assert len([site for site in report.mlps if site.used]) == mlps
        assert f"normed linear kernel in {len(norms)} of" in str(report)
        assert PackReport.from_json(report.to_json()).normed == report.normed
        if dtype is None:
            assert_same_function(model, dense, *x)
        wanted = model(*x)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
        save(model, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", build()[0])
        assert sorted(leaving(loaded)) == norms
        for twin in (loaded, copy.deepcopy(model)):
            got = twin(*x)
            assert torch.equal(got if isinstance(got, torch.Tensor) else got[0], wanted)
        forwards = KernelForward.of(model)  # taken out and put in again, linears follow
        disable(forwards)
        assert not any(module.norms for module in model.modules() if isinstance(module, PackedLinear))
        assert leaving(model) == {}
        enable(forwards)
        assert torch.equal(got if isinstance(got := model(*x), torch.Tensor) else got[0], wanted)
    for packed in (loaded, model):
        assert unpack_(packed) > 0
        assert {name: type(module) for name, module in packed.named_modules()} == before and not is_packed(packed)
        state = packed.state_dict()
        for key, value in dense.state_dict().items():
            assert torch.equal(state[key], value if dtype is None else value.to(dtype).float()), key


def small():
    torch.manual_seed(0)
    return prune(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 7)), 0.8)


@torch.no_grad()
def pack_small(**options):
    model = small()
    return model, pack_(model, torch.randn(3, 64), timer=timer(**options))


def test_the_norm_leaves_its_rows_only_where_the_linear_takes_them():
    model, report = pack_small()
    dense, x = small(), torch.randn(5, 64)
    assert [site.used for site in report.normed] == [True]
    assert report.normed[0].reason == "4.00x LayerNorm and linear apart"
    with torch.no_grad():
        assert model[0](x) is x
        assert_same_function(model, dense, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model[0](x) is not x
            assert (model(x) - dense(x)).abs().max() <= 0.05 * dense(x).abs().max()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))
    assert model[0](x) is not x and model(x).requires_grad  # the norm has a gradient
    assert_same_function(model, dense, x)
    linear = model[1]
    model[1] = linear.unpack()  # somebody takes the linear out by hand
    with torch.no_grad():
        assert model[0](x) is not x
        assert_same_function(model, dense, x)


def test_apart_where_that_is_not_slower():
    model, report = pack_small(kernel_ms=3.9)
    assert [site.used for site in report.normed] == [False] and leaving(model) == {}
    assert report.normed[0].reason == "1.03x LayerNorm and linear apart, short of the margin (3 % less time)"
    assert pack_(small(), torch.randn(3, 64), timer=timer(), norms=False).normed == ()


def test_the_guard_takes_it_back():
    model = small()

    def measure(calls, budget_ms):
        if "original" not in calls:
            return timer()(calls, budget_ms)
        calls["packed"]()
        return {name: 5.0 if name != "packed" else 9.0 if leaving(model) else 4.0 for name in calls}

    with torch.no_grad():
        report = pack_(model, torch.randn(3, 64), timer=measure)
    assert leaving(model) == {} and [site.used for site in report.normed] == [False]
    assert not any(module.norms for module in model.modules() if isinstance(module, PackedLinear))
    assert any("the normed linear kernel made the model slower" in note for note in report.notes)
    with torch.no_grad():
        x = torch.randn(4, 64)
        assert_same_function(model, small(), x)


DAMAGE = {
    "no linear": (lambda r: r.update(normed={"0": "2"}), "a LayerNorm of norms and a linear"),
    "no norm": (lambda r: r.update(normed={"2": "1"}), "a LayerNorm of norms and a linear"),
    "other width": (lambda r: r.update(normed={"0": "3"}), "0 does not normalise the 96 columns of 3"),
    "kind": (lambda r: r.update(normed=[]), "normed: expected an object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_of_a_file_is_refused(name, tmp_path):
    model, _ = pack_small()
    save(model, tmp_path / "normed.safetensors")
    record = json.loads(read_metadata(tmp_path / "normed.safetensors")["rmtkern"])
    assert record["normed"] == {"0": "1"} and record["norms"] == ["0"]
    change, message = DAMAGE[name]
    change(record)
    fresh = small()
    with pytest.raises(ValueError, match=message):
        load(written(tmp_path, load_file(tmp_path / "normed.safetensors"), record), fresh)
    assert not is_packed(fresh)
