"""pack_ and MLPs: which modules are a chain of linears, when they run in one kernel, and that unpack_ takes it back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.mlp import GluMlp, Mlp
from torch import nn
from torch.nn import functional as F

from rmtkern import load, save
from rmtkern.errors import PackedModelError
from rmtkern.layouts import cpu
from rmtkern.nn import PackedLinear
from rmtkern.packing import PackReport, is_packed, pack_, unpack_
from rmtkern.packing import mlp as packing_mlp
from rmtkern.packing.mlp import Chain, MlpForward, find_chains
from rmtkern.packing.sites import KernelForward
from rmtkern.storage import read_metadata
from tests.packing.test_pack import assert_same_function, mlp, prune, timm_tiny, torchvision_small, transformers_small
from tests.test_files import written

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason="the extension is not built")


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def found(module):
    return [
        (chain.name, chain.order, chain.linears, chain.activation)
        for chain in find_chains(module.eval(), linears(module))
    ]


def timer(kernel_ms=1.0, whole=None):
    """A timer that runs every call once: bitmask 2 ms, dense 3, two linears in one kernel `kernel_ms`, apart 4."""

    def measure(calls, budget_ms):
        for call in calls.values():
            call()
        if "original" in calls:
            states = whole or {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}
            return {name: states[name] for name in calls}
        fixed = {"bitmask": 2.0, "mlp/torch": 4.0, "mlp/kernel": kernel_ms}
        return {label: fixed.get(label, 5.0 + 0.1 * i) for i, label in enumerate(calls)}

    return measure


class Functional(nn.Module):
    """The activation is no module, so no linear absorbs it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(Functional):
    """Not a chain: it adds what the second linear has not."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class Hidden(Residual):
    """Not a chain: the hidden features go elsewhere too."""

    def forward(self, x):
        h = self.act(self.fc1(x))
        return self.fc2(h) * h.mean()


class ByLength(Residual):
    """A chain on few tokens only, which trying it cannot see."""

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(x)))
        return y if x.shape[1] < 9 else 2 * y


ORDER = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


@pytest.mark.parametrize(
    ("module", "chains"),
    [
        (Mlp(64, 96), [("", ORDER, ("fc1", "fc2"), "act")]),
        (nn.Sequential(nn.LayerNorm(64), Mlp(64, 96)), [("1", ORDER, ("fc1", "fc2"), "act")]),
        (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64), nn.Tanh()),
         [("", ("0", "1", "2", "3"), ("1", "2"), None)]),
        (nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 5)),
         [("", ("0", "1", "2", "3", "4"), ("0", "2"), "1")]),
        (Mlp(64, 96, norm_layer=nn.LayerNorm), []),
        (GluMlp(64, 96), []),
        (Functional(), []),
        (Residual(), []),
        (Hidden(), []),
    ],
)  # fmt: skip
def test_which_modules_are_chains(module, chains):
    assert found(module) == chains


def test_a_linear_that_must_stay_makes_no_chain():
    module = Mlp(64, 96).eval()
    assert find_chains(module, {"fc1": module.fc1}) == []
    module.forward = lambda x: x
    assert find_chains(module, linears(module)) == []


SITES = [
    (timm_tiny, "blocks.{}.mlp", ("fc1", "fc2")),
    (torchvision_small, "encoder.layers.encoder_layer_{}.mlp", ("0", "3")),
    (transformers_small, "layers.{}.mlp", ("fc1", "fc2")),
]


@pytest.mark.parametrize(("build", "site", "names"), SITES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_real_models_go_and_come_back(build, site, names, dtype, tmp_path):
    torch.manual_seed(0)
    model, x = build()
    prune(model, 0.8)
    dense = copy.deepcopy(model)
    before = {name: type(module) for name, module in model.named_modules()}
    report = pack_(model, *x, dtype=dtype, timer=timer())
    sites = [site.format(i) for i in range(2)]
    assert [(mlp.name, mlp.used, mlp.torch_ms, mlp.kernel_ms) for mlp in report.mlps] == [
        (s, True, 4.0, 1.0) for s in sites
    ]
    assert "MLP kernel in 2 of 2 modules: 4.00x the two linears'" in str(report)
    assert PackReport.from_json(report.to_json()).mlps == report.mlps
    older = json.loads(report.to_json())
    del older["mlps"]
    assert PackReport.from_json(json.dumps(older)).mlps == ()
    for name in sites:
        module = model.get_submodule(name)
        assert isinstance(vars(module)["forward"], MlpForward)
        assert all(isinstance(module.get_submodule(child), PackedLinear) for child in names)
    if dtype is None:
        assert_same_function(model, dense, *x)
    with torch.no_grad():
        wanted = model(*x)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
        save(model, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", build()[0])
        assert len([f for f in KernelForward.of(loaded) if isinstance(f, MlpForward)]) == 2
        for twin in (loaded, copy.deepcopy(model)):
            got = twin(*x)
            assert torch.equal(got if isinstance(got, torch.Tensor) else got[0], wanted)
    for packed in (loaded, model):
        held = sum(isinstance(module, PackedLinear) for module in packed.modules())
        assert unpack_(packed) == held > 0
        assert {name: type(module) for name, module in packed.named_modules()} == before and not is_packed(packed)
        state = packed.state_dict()
        for key, value in dense.state_dict().items():
            assert torch.equal(state[key], value if dtype is None else value.to(dtype).float()), key


def test_the_forward_calls_the_kernel_once(monkeypatch):
    model, x = mlp(), torch.randn(3, 128)
    pack_(model, x, timer=timer())
    calls = []
    real = packing_mlp.packed_mlp
    monkeypatch.setattr(packing_mlp, "packed_mlp", lambda *args: calls.append(args[:2]) or real(*args))
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: pytest.fail("a linear ran by itself"))
    with torch.no_grad():
        model(x)
    assert calls == [(model[0], model[2])]


def test_compile_gradients_autocast_and_train_mode():
    model, x = mlp(), torch.randn(3, 128)
    dense = copy.deepcopy(model)
    pack_(model, x, timer=timer())
    torch._dynamo.reset()
    with torch.no_grad():
        y = model(x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
            assert (model(x) - dense(x)).abs().max() <= 0.05 * y.abs().max()
    assert model(x).requires_grad
    with pytest.raises(PackedModelError, match="a packed model has no backward pass"):
        model(x).sum().backward()
    model.train()
    with pytest.raises(PackedModelError, match="a packed model cannot train"):
        model(x)


def test_separate_linears_where_they_are_not_slower():
    model, x = mlp(), torch.randn(3, 128)
    report = pack_(model, x, timer=timer(kernel_ms=3.9))
    assert [site.used for site in report.mlps] == [False] and KernelForward.of(model) == []
    assert report.mlps[0].reason == "1.03x the two linears', short of the margin (3 % less time)"
    assert pack_(mlp(), x, timer=timer(), mlps=False).mlps == ()


def test_every_token_count_counts():
    model = mlp()
    rounds = []

    def measure(calls, budget_ms):
        if "mlp/kernel" in calls:
            rounds.append(1)
        return timer(1.0 if len(rounds) < 2 else 4.0)(calls, budget_ms)

    report = pack_(model, [torch.randn(3, 128), torch.randn(200, 128)], timer=measure)
    assert len(rounds) == 2 and [site.used for site in report.mlps] == [False]
    assert report.mlps[0].shapes == (((3, 128),), ((200, 128),))


def test_the_guard_makes_the_linears_separate_again():
    model, x = mlp(), torch.randn(3, 128)

    def measure(calls, budget_ms):
        if "original" not in calls:
            return timer()(calls, budget_ms)
        calls["packed"]()
        fused = bool(KernelForward.of(model))
        return {name: 5.0 if name != "packed" else 9.0 if fused else 4.0 for name in calls}

    report = pack_(model, x, timer=measure)
    assert KernelForward.of(model) == [] and [site.used for site in report.mlps] == [False]
    assert "end to end the MLP kernel made the model slower: its modules run by themselves again" in report.notes


def test_a_forward_that_does_not_always_do_what_was_tried_keeps_its_linears():
    torch.manual_seed(0)
    model, x = prune(nn.Sequential(ByLength()), 0.8), torch.randn(2, 12, 64)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert [site.used for site in report.mlps] == [False] and "differs by" in report.mlps[0].reason
    assert_same_function(model, dense, x)


def test_an_activation_that_is_not_absorbed_keeps_its_linears():
    model, x = mlp(act=nn.Tanh()), torch.randn(3, 128)
    assert pack_(model, x, timer=timer()).mlps == () and KernelForward.of(model) == []


@pytest.fixture
def file(tmp_path):
    model = mlp()
    pack_(model, torch.randn(3, 128), timer=timer())
    save(model, tmp_path / "mlp.safetensors")
    return tmp_path / "mlp.safetensors"


DAMAGE = {
    "keys": (lambda entry: entry.pop("order"), "an object of activation, linears, order"),
    "order": (lambda entry: entry.update(order=["0", "0"]), "different names"),
    "linears": (lambda entry: entry.update(linears=["0"]), "2 names"),
    "activation": (lambda entry: entry.update(activation=1), "a name or null"),
    "parts": (lambda entry: entry.update(order=["0", "1", "2", "9"]), "has other parts in the model"),
    "turned": (lambda entry: entry.update(linears=["2", "0"]), "one after the other"),
    "elsewhere": (lambda entry: entry.update(order=["1", "0", "2"]), "one after the other"),
    "not linear": (lambda entry: entry.update(linears=["0", "1"], activation=None), "two packed linears that fit"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_of_a_file_is_refused(name, file):
    change, message = DAMAGE[name]
    tensors = load_file(file)
    record = json.loads(read_metadata(file)["rmtkern"])
    change(record["mlps"][""])
    model = mlp()
    with pytest.raises(ValueError, match=message):
        load(written(file.parent, tensors, record), model)
    assert not is_packed(model)


def test_names_of_a_chain():
    chain = Chain("a.b", ("0", "1", "2", "3"), ("1", "3"), "2")
    assert chain.paths == ("a.b.1", "a.b.3") and chain.steps == (("0",), ("1", "2", "3"), ())
