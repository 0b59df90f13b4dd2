"""pack_ and unpack_ on real architectures with random weights; where a decision is checked, the timer is injected."""

import copy
import csv
import io
import itertools
import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTModel

import rmtkern
from rmtkern import load, save
from rmtkern.errors import PackedModelError
from rmtkern.nn import AbsorbedActivation, PackedLinear
from rmtkern.ops import linear
from rmtkern.packing import guard, outputs, pack_, unpack_
from rmtkern.packing.timing import interleaved_ms, interleaved_samples
from rmtkern.testing import random_sparse
from tests.test_models import with_lora


def prune(model, sparsity):
    """Zero the smallest entries of every linear weight."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            weight.view(-1)[weight.abs().view(-1).argsort()[: round(sparsity * weight.numel())]] = 0.0
    return model.eval()


def mlp(sparsity=0.9, act=None):
    torch.manual_seed(0)
    act = nn.GELU() if act is None else act
    return prune(nn.Sequential(nn.Linear(128, 256), act, nn.Linear(256, 64)), sparsity)


def timer(cheap="bitmask", whole=None):
    """A timer that runs every call once and reports 1 ms for the `cheap` candidate, 2 ms for dense, 3 for others.

    `whole` is what it reports for the states of the whole model (default: packed is fastest).
    """

    def measure(calls, budget_ms):
        for call in calls.values():
            call()
        if "original" in calls:
            states = whole or {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}
            return {name: states[name] for name in calls}
        return {
            label: 1.0 if label.startswith(cheap) else 2.0 + 0.1 * i if label.startswith("dense") else 3.0
            for i, label in enumerate(calls)
        }

    return measure


def assert_same_function(model, dense, *args, **kwargs):
    """The accuracy rule for a whole model: twice the fp32 model's error against float64, plus 4 eps of the scale."""

    def first(output):
        return output if isinstance(output, torch.Tensor) else output[0]

    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with torch.no_grad():
        got, fp32 = first(model(*args, **kwargs)), first(dense(*args, **kwargs))
        exact = first(
            copy.deepcopy(dense).double()(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
        )
    allowed = 2 * (fp32 - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= allowed


def snapshot(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}


def test_bare_sequential_with_real_timing():
    model, x = mlp(0.95), torch.randn(512, 128)
    dense = copy.deepcopy(model)
    report = pack_(model, x, budget_ms=60)
    assert_same_function(model, dense, x)
    for layer in report.layers:
        times = layer.ms[512]
        best = min(ms for label, ms in times.items() if label.startswith("dense/"))
        assert {"dense/torch", "bitmask"} <= set(times)
        if not any("all were put back" in note for note in report.notes):  # the guard goes by the whole model alone
            assert layer.speedup >= 1 - 1e-9  # what was chosen is never slower than the strongest dense form
        assert layer.packed == isinstance(model.get_submodule(layer.name), PackedLinear) or not layer.packed
        if layer.packed:
            assert best / layer.speedup <= (1 - 0.03) * best
    times = report.end_to_end[0]
    assert times.packed_ms <= (1 + guard.GUARD_NOISE) * min(times.original_ms, times.dense_ms)


def timm_tiny():
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=7, img_size=64), (torch.randn(2, 3, 64, 64),)


def torchvision_small():
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=7
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision zeroes the head, which would hide any error
    return model, (torch.randn(2, 3, 32, 32),)


def transformers_small():
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8
    )
    return ViTModel(config), (torch.randn(2, 3, 32, 32),)


@pytest.mark.parametrize(
    ("build", "fc1", "packed", "left"),
    [
        (timm_tiny, "blocks.1.mlp.fc1", 9, 0),
        (torchvision_small, "encoder.layers.encoder_layer_1.mlp.0", 7, 2),  # in_proj is not pruned
        (transformers_small, "layers.1.mlp.fc1", 13, 0),
    ],
)
def test_real_models_round_trip(build, fc1, packed, left):
    torch.manual_seed(0)
    model, x = build()
    prune(model, 0.8)
    with torch.no_grad():
        model.get_submodule(fc1).weight[0, 0] = -0.0
    model.get_submodule(fc1).weight.requires_grad_(False)
    dense = copy.deepcopy(model)
    before = snapshot(model)
    report = pack_(model, x, timer=timer())
    assert (report.packed_layers, len(report.layers) - report.packed_layers) == (packed, left)
    assert report.packed_layers == sum(isinstance(module, PackedLinear) for module in model.modules())
    assert {layer.name: layer.activation for layer in report.layers}[fc1] == "gelu"
    assert sum(isinstance(module, AbsorbedActivation) for module in model.modules()) == 2
    assert_same_function(model, dense, *x)

    twin = copy.deepcopy(model)
    for packed_model in (model, twin):
        assert unpack_(packed_model) == packed
        assert {name: type(m) for name, m in packed_model.named_modules()} == {n: t for n, (t, _) in before.items()}
        state, wanted = packed_model.state_dict(), dense.state_dict()
        assert set(state) == set(wanted)
        for key, value in wanted.items():
            assert torch.equal(state[key].view(torch.int32), (value + 0.0).view(torch.int32)), key
        grads = {name: parameter.requires_grad for name, parameter in packed_model.named_parameters()}
        assert grads == {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
        assert not grads[f"{fc1}.weight"] and grads[f"{fc1}.bias"]
        assert unpack_(packed_model) == 0
    model.train()(*x)  # an ordinary model again


def test_keyword_and_several_examples():
    model, (x,) = transformers_small()
    prune(model, 0.8)
    dense = copy.deepcopy(model)
    report = pack_(model, [{"pixel_values": x}, {"pixel_values": x[:1]}], timer=timer())
    assert len(report.end_to_end) == 2
    assert {layer.tokens for layer in report.layers} == {(17, 34), (1, 2)}
    assert_same_function(model, dense, pixel_values=x)


def by_tokens(ms):
    """A timer that reports ms[T][label]; T is the row count of the calls' inputs."""

    def measure(calls, budget_ms):
        if "original" in calls:
            return dict.fromkeys(calls, 1.0)
        t = next(iter(calls.values()))().shape[0]
        return {label: ms[t].get(label, 9.0) for label in calls}

    return measure


def test_examples_that_disagree_keep_one_form_each():
    model = prune(nn.Sequential(nn.Linear(128, 64)), 0.9)
    dense = copy.deepcopy(model)
    ms = {4: {"dense/torch": 1.0, "bitmask": 2.0}, 400: {"dense/torch": 5.0, "bitmask": 1.0}}
    report = pack_(model, [torch.randn(400, 128), torch.randn(4, 128)], timer=by_tokens(ms))
    (layer,) = report.layers
    assert layer.form == "dense/torch | bitmask" and layer.packed and layer.speedup == 1.0
    assert layer.nbytes_after == sum(form.nbytes for form in (model[0].weight, *model[0].others)) > layer.nbytes_before
    assert [model[0].form(t).layout for t in (1, 4, 202, 203, 400)] == ["dense"] * 3 + ["bitmask"] * 2
    for t in (4, 400, 30):
        assert_same_function(model, dense, torch.randn(t, 128))
    assert unpack_(model) == 1 and torch.equal(model[0].weight, dense[0].weight)


def test_examples_that_nearly_agree_share_one_form():
    model = prune(nn.Sequential(nn.Linear(128, 64)), 0.9)
    ms = {4: {"dense/torch": 1.0, "bitmask": 0.98}, 400: {"dense/torch": 5.0, "bitmask": 1.0}}
    (layer,) = pack_(model, [torch.randn(400, 128), torch.randn(4, 128)], timer=by_tokens(ms)).layers
    assert layer.form == "bitmask" and len(model[0].tokens) == 1


@pytest.mark.parametrize(("ms", "form"), [(0.96, "bitmask"), (0.98, "nn.Linear")])
def test_sparse_must_win_by_the_margin(ms, form):
    model = prune(nn.Sequential(nn.Linear(128, 64)), 0.9)
    times = {4: {"dense/torch": 1.0, "bitmask": ms}}
    (layer,) = pack_(model, torch.randn(4, 128), timer=by_tokens(times), margin=0.03).layers
    assert layer.form == form
    assert ("short of the margin (3 % less time)" in layer.reason) == (form != "bitmask")


def test_the_strongest_dense_form_is_the_baseline():
    model, x = mlp(0.9), torch.randn(8, 128)
    dense = copy.deepcopy(model)
    ms = {8: {"dense/torch": 2.0, "dense/onednn": 1.0, "bitmask": 1.5}}
    report = pack_(model, x, timer=by_tokens(ms))
    assert [layer.form for layer in report.layers] == ["dense/onednn"] * 2
    assert report.packed_layers == 0 and report.packed_share == 0.0
    assert isinstance(model[0], PackedLinear) and model[0].activation == "gelu"
    assert "bitmask is 0.67x dense/onednn" in report.layers[0].reason
    assert_same_function(model, dense, x)
    assert unpack_(model) == 2 and isinstance(model[1], nn.GELU)


def test_a_dense_weight_has_no_sparse_candidate():
    model = mlp(0.0)
    report = pack_(model, torch.randn(8, 128), timer=timer())
    assert report.packed_layers == 0
    assert "no sparse candidate at sparsity 0.000; bitmask would be larger" in report.layers[0].reason


def test_nofm_is_found_and_layouts_can_be_named():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    model[0].weight.data = random_sparse(32, 64, 0, nofm=(2, 4))
    twin = copy.deepcopy(model)
    assert pack_(model, torch.randn(3, 64), timer=timer("nofm")).layers[0].form == "nofm(n=2,m=4)"
    (layer,) = pack_(twin, torch.randn(3, 64), timer=timer("nofm"), layouts=["bitmask"]).layers
    assert set(layer.ms[3]) == {"dense/torch", "dense/onednn", "dense/onednn_prepacked", "dense/own", "bitmask"}


def test_similar_layers_share_a_measurement_taken_on_the_least_sparse():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    for module, sparsity in zip(model, (0.92, 0.91, 0.93, 0.5), strict=True):
        weight = module.weight.data.view(-1)
        weight[torch.randperm(len(weight))[: round(sparsity * len(weight))]] = 0.0
    report = pack_(model, torch.randn(5, 64), timer=timer())
    assert [layer.measured_on for layer in report.layers] == ["1", "1", "1", "3"]


def test_guard_puts_slow_choices_back():
    model, x = mlp(0.9), torch.randn(8, 128)
    slow = timer(whole={"original": 4.0, "dense": 3.0, "packed": 5.0})
    report = pack_(model, x, timer=slow)
    assert report.packed_layers == 0
    assert any("went back to the dense form" in note for note in report.notes)
    times = report.end_to_end[0]
    assert times.packed_ms == min(times.original_ms, times.dense_ms)
    assert "put back to dense: the packed model was slower end to end" in report.layers[0].reason


def test_guard_ends_when_examples_disagree_about_the_dense_models():
    model, examples = mlp(0.9), [torch.randn(8, 128), torch.randn(64, 128)]
    whole = itertools.cycle([{"original": 1.0, "dense": 1.2}, {"original": 2.0, "dense": 1.9}])
    layers = timer("dense/onednn")

    def measure(calls, budget_ms):
        found = layers(calls, budget_ms)
        return {name: ms for name, ms in next(whole).items() if name in calls} if "original" in calls else found

    report = pack_(model, examples, timer=measure)
    assert [times.packed_ms for times in report.end_to_end] == [1.0, 2.0]  # 5 % behind at worst; dense would be 20 %
    assert any("the linears as they came were faster" in note for note in report.notes)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_guard_puts_everything_back_if_even_the_strongest_dense_model_is_slower():
    model, x = mlp(0.9), torch.randn(8, 128)
    before = snapshot(model)
    measure = timer("dense/onednn", whole={"original": 1.0, "dense": 3.0, "packed": 5.0})
    report = pack_(model, x, timer=measure)
    assert snapshot(model) == before
    assert any("the linears as they came were faster" in note for note in report.notes)
    assert {layer.form for layer in report.layers} == {"nn.Linear"}
    assert all("dense forms that are faster alone made the model slower" in layer.reason for layer in report.layers)


def test_guard_keeps_what_gains_when_the_dense_forms_lose():
    """Sparse and dense forms both win alone; in the whole model the swapped dense ones cost 3 ms, sparse gains 2."""
    torch.manual_seed(0)
    model = nn.Sequential(*prune(nn.Sequential(nn.Linear(128, 256)), 0.9), nn.Tanh(), nn.Linear(256, 64)).eval()
    layers = {True: timer("bitmask"), False: timer("dense/onednn")}

    def whole():
        held = [m.weight.layout for m in model.modules() if isinstance(m, PackedLinear)]
        return 10.0 + 3.0 * held.count("dense") - 2.0 * held.count("bitmask")

    def measure(calls, budget_ms):
        if "original" not in calls:
            return layers["bitmask" in calls](calls, budget_ms)
        return {name: (call(), whole())[1] for name, call in calls.items()}

    report = pack_(model, torch.randn(8, 128), timer=measure)
    assert [layer.form for layer in report.layers] == ["bitmask", "nn.Linear"]
    assert (report.end_to_end[0].original_ms, report.end_to_end[0].packed_ms) == (10.0, 8.0)
    assert report.end_to_end[0].dense_ms == 10.0


@pytest.mark.parametrize(
    ("looks", "slow"),
    [
        ([1.06, 0.999, 1.06], True),  # one lucky time does not let it stay
        ([0.99, 1.02, 1.03], True),
        ([1.03, 0.96, 0.98], False),  # nor does one unlucky time undo it
        ([1.012, 1.004, 1.008], False),
        ([1.011, 1.012, 1.013], True),
    ],
)
def test_one_time_near_the_edge_decides_nothing(looks, slow):
    """`looks`: what the packed model times in turn, as a multiple of the dense one."""
    model, x = mlp(0.9), torch.randn(8, 128)
    layers, turn = timer(), itertools.cycle(looks)

    def measure(calls, budget_ms):
        if "original" not in calls:
            return layers(calls, budget_ms)
        calls.get("packed", calls["original"])()
        sparse = any(isinstance(m, PackedLinear) and m.weight.layout == "bitmask" for m in model.modules())
        return {"original": 8.0, "packed": 8.0 * next(turn) if sparse else 8.0}

    report = pack_(model, x, timer=measure)
    assert (report.packed_layers == 0) == slow == any("went back to the dense" in note for note in report.notes)
    if not slow:
        assert report.end_to_end[0].packed_ms == pytest.approx(8.0 * sum(looks) / len(looks))
    assert report.end_to_end[0].speedup >= 1 / (1 + guard.GUARD_NOISE)


@pytest.mark.parametrize("packed", [0.95, 1.05])
def test_what_ran_before_a_state_does_not_count(packed, monkeypatch):
    """On a clock that tells a state that is cold, since another one ran, 20 % more than it takes when it is warm."""
    now, last, cost = 0.0, None, {"dense": 0.010, "bitmask": 0.010 * packed}

    class Timed(nn.Sequential):
        def forward(self, x):
            nonlocal now, last
            form = {
                "bitmask" if isinstance(m, PackedLinear) and m.weight.layout == "bitmask" else "dense" for m in self
            }
            form = min(form)
            now += cost[form] * (1.0 if form == last else 1.2)
            last = form
            return super().forward(x)

    monkeypatch.setattr("rmtkern.packing.timing.time.thread_time", lambda: now)
    monkeypatch.setattr("rmtkern.packing.timing.WALL", lambda: now)
    model, x = Timed(*mlp(0.9)).eval(), torch.randn(8, 128)
    layers = timer()
    report = pack_(
        model, x, timer=lambda calls, ms: interleaved_ms(calls, ms) if "original" in calls else layers(calls, ms)
    )
    found = report.end_to_end[0]
    assert found.original_ms == found.dense_ms == pytest.approx(10.0)
    assert found.packed_ms == pytest.approx(min(10.0, 10.0 * packed)) and report.packed_layers == 2 * (packed < 1)


def test_what_prepares_a_call_counts_in_the_budget_and_not_in_its_time():
    now = 0.0

    class Call:
        def __call__(self):
            nonlocal now
            now += 0.01

        prepare = __call__

    samples = interleaved_samples({"a": Call()}, 399.0, lambda: now)
    assert samples["a"] == pytest.approx([10.0] * 20)


def test_a_candidate_is_timed_as_the_module_that_will_run():
    kinds = {}

    def measure(calls, budget_ms):
        kinds.update({label: type(call.func) for label, call in calls.items() if hasattr(call, "func")})
        return timer()(calls, budget_ms)

    pack_(mlp(0.9), torch.randn(8, 128), timer=measure)
    assert {"bitmask", "dense/onednn"} <= kinds.keys() and set(kinds.values()) == {PackedLinear}


def test_guard_undoes_only_what_is_slow():
    model, x = mlp(0.9), torch.randn(8, 128)

    def measure(calls, budget_ms):
        if "original" in calls:
            calls["packed"]()
            both = sum(isinstance(m, PackedLinear) and m.weight.layout == "bitmask" for m in model.modules()) == 2
            return {"original": 4.0, "dense": 3.0, "packed": 5.0 if both else 2.0}
        first = next(iter(calls.values()))().shape[1] == 256
        return {label: 2.0 if label.startswith("dense") else (1.0 if first else 1.5) for label in calls}

    report = pack_(model, x, timer=measure)
    assert [layer.packed for layer in report.layers] == [True, False]  # the smaller win went first


def test_guard_undoes_only_where_it_is_slow():
    """Of two examples one loses: its token count runs dense, the other sparse."""
    model, examples = mlp(0.9), [torch.randn(8, 128), torch.randn(64, 128)]
    dense = copy.deepcopy(model)
    states = itertools.cycle([{"original": 4.0, "dense": 3.0}, {"original": 40.0, "dense": 30.0}])
    layers = timer()

    def measure(calls, budget_ms):
        if "original" not in calls:
            return layers(calls, budget_ms)
        times = next(states)
        calls["packed"]()
        ran = {m.form(8).layout for m in model.modules() if isinstance(m, PackedLinear)}
        slow = times["dense"] == 3.0 and "bitmask" in ran
        return {**times, "packed": 5.0 if slow else times["dense"] if times["dense"] == 3.0 else 10.0}

    report = pack_(model, examples, timer=measure)
    assert [layer.form for layer in report.layers] == ["dense/torch | bitmask"] * 2
    assert [times.speedup for times in report.end_to_end] == [1.0, 3.0]
    assert all("slower end to end at T=8" in layer.reason for layer in report.layers)
    for x in examples:
        assert_same_function(model, dense, x)


def test_what_another_kernel_gains_does_not_pay_for_a_sparse_layer_that_loses():
    torch.manual_seed(0)
    model = prune(nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 64)), 0.9)
    layers = timer()

    def measure(calls, budget_ms):
        if "layer_norm/kernel" in calls:
            return {"layer_norm/torch": 2.0, "layer_norm/kernel": 1.0}
        if "original" not in calls:
            return layers(calls, budget_ms)
        for name in calls.keys() & {"kernels", "packed"}:
            calls[name]()
            assert "forward" in vars(model[0])
        calls["original"]()
        assert "forward" not in vars(model[0])
        packed = 3.0 if isinstance(model[1], PackedLinear) or "kernels" in calls else 2.0
        return {name: {"original": 4.0, "dense": 4.0, "kernels": 2.0, "packed": packed}[name] for name in calls}

    report = pack_(model, torch.randn(8, 128), timer=measure)
    assert report.norms[0].used and "forward" in vars(model[0])
    assert report.packed_layers == 0
    (times,) = report.end_to_end
    assert (times.original_ms, times.packed_ms, times.kernels_ms) == (4.0, 2.0, None)


class Shared(nn.Module):
    """Cases that must stay dense, each with its reason."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Linear(32, 32)
        self.tied_too = nn.Linear(32, 32)
        self.tied_too.weight = self.tied.weight
        self.twice = nn.Linear(32, 32)
        self.also_twice = self.twice
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.read = nn.Linear(32, 32)
        self.peeked = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.own = type("OwnLinear", (nn.Linear,), {})(32, 32)
        self.wide = nn.Linear(32, 32)
        self.low = nn.Linear(32, 32).bfloat16()
        self.plain = nn.Linear(32, 32)

    def forward(self, x):
        x = self.twice(self.tied_too(self.tied(x)))
        x = self.own(self.normed(self.hooked(self.also_twice(x))))
        x = F.linear(x, self.read.weight.clone())
        x = self.peeked(x) if self.peeked.weight.data_ptr() else x
        x = x + self.low(x.bfloat16()).float()
        return self.plain(self.wide(x))


def test_reasons_to_stay_dense():
    model, x = prune(Shared(), 0.9), torch.randn(4, 32)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.packed}
    for name, words in {
        "tied": "its parameter is tied to tied_too.weight",
        "tied_too": "its parameter is tied to tied.weight",
        "twice": "shared under the names twice, also_twice",
        "also_twice": "shared under the names twice, also_twice",
        "hooked": "it has hooks or a replaced forward",
        "normed": "it is a ParametrizedLinear, whose forward may differ",
        "read": "other code reads its .weight besides its own forward and gives it to torch.Tensor.clone",
        "peeked": "other code reads its .weight besides its own forward and gives it to torch.Tensor.data_ptr",
        "unused": "the model never calls it on the example",
        "own": "it is a OwnLinear, whose forward may differ",
    }.items():
        assert words in reasons.pop(name)
    assert reasons == {}
    assert [layer.name for layer in report.layers if layer.packed] == ["wide", "low", "plain"]
    assert torch.allclose(model(x), dense(x), atol=0.02)  # one layer of it is in bfloat16
    assert all(type(module) is not type(dense) or module is model for module in model.modules())


def test_linears_in_lora_wrappers_are_packed_and_adapters_stay_dense():
    model, x = with_lora(), torch.randn(2, 3, 32, 32)
    rmtkern.prune_(model, 0.8, "uniform", show_progress=False)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    packed = {layer.name.removeprefix("blocks.0.") for layer in report.layers if layer.packed}
    assert packed == {"attn.qkv.base_layer", "attn.proj", "mlp.fc1.base_layer", "mlp.fc2"}
    reasons = [layer.reason for layer in report.layers if "lora" in layer.name]
    assert len(reasons) == 4 and all("no sparse candidate" in reason for reason in reasons)
    assert_same_function(model, dense, x)


def test_the_fast_path_of_a_transformer_encoder_gives_way():
    """In eval mode nn.TransformerEncoderLayer hands the weights of its linears to one fused op, if they are tensors."""
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True), nn.Linear(32, 32))
    prune(model, 0.9)
    dense, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    report = pack_(model, x, timer=timer())
    packed = [layer.name for layer in report.layers if layer.packed]
    assert packed == ["0.self_attn.out_proj", "0.linear1", "0.linear2", "1"]  # in_proj was not pruned
    assert_same_function(model, dense, x)


def test_models_that_no_kernel_can_run_keep_every_layer():
    report = pack_(mlp(0.9).double(), torch.randn(3, 128).double(), timer=timer())
    assert report.packed_layers == 0 and report.end_to_end == ()
    assert all("dtype torch.float64" in layer.reason for layer in report.layers)


@pytest.mark.parametrize("build", [timm_tiny, torchvision_small, transformers_small])
def test_bfloat16_behind_a_float32_interface(build):
    torch.manual_seed(0)
    model, x = build()
    dense = copy.deepcopy(prune(model, 0.8))
    names = {name: parameter.dtype for name, parameter in model.named_parameters()}
    report = pack_(model, x, dtype=torch.bfloat16, timer=timer())
    assert report.packed_layers > 0

    def first(output):
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    with torch.no_grad():
        exact, got, low = first(dense(*x)), first(model(*x)), first(copy.deepcopy(dense).bfloat16()(x[0].bfloat16()))
        twin = first(copy.deepcopy(model)(*x))
    assert got.dtype == torch.float32 and torch.equal(twin, got)
    # no farther from float32 than the dense bfloat16 model, up to the luck of rounding
    assert (got - exact).abs().max() <= 2 * (low.float() - exact).abs().max() + 2**-7 * exact.abs().max()
    with pytest.raises(PackedModelError, match="packed already"):
        pack_(model, x)
    assert unpack_(model) == report.packed_layers + sum("dense/" in layer.form for layer in report.layers)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == names
    assert not model._forward_hooks and not model._forward_pre_hooks
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name).bfloat16().float() + 0.0), name


class Kept(nn.Module):
    """Reaches two of its linears through a list and a bound method, which no swap changes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.list, self.function = [self.a], self.b.forward

    def forward(self, x):
        return self.c(self.function(self.list[0](x)))


def test_a_linear_that_a_swap_would_miss_stays(tmp_path):
    model, x = prune(Kept(), 0.9), torch.randn(4, 32)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert [layer.name for layer in report.layers if layer.packed] == ["c"]
    assert "keeps it in another place than its name" in report.layers[0].reason
    assert_same_function(model, dense, x)
    save(model, tmp_path / "kept.safetensors")
    assert_same_function(load(tmp_path / "kept.safetensors", Kept()), dense, x)


def test_masked_logits_are_infinite_in_both_models():
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(64) > 60, -torch.inf)

    model, x = prune(Masked(nn.Linear(128, 64)), 0.9), torch.randn(4, 128)
    dense = copy.deepcopy(model)
    assert pack_(model, x, timer=timer()).packed_layers == 1
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    with torch.no_grad():
        got, want = model(x), dense(x)
    assert outputs.deviation_of([[got]], [[want.clamp(min=-1e3)]], 1.0) is not None
    assert outputs.deviation_of([[1j * got[:, :60]]], [[1j * want[:, :60] * 3]], 0.5) is not None


def test_a_model_without_numbers_is_refused_before_anything_is_timed():
    model = mlp()
    model[2].bias.data[5] = float("nan")
    with pytest.raises(
        ValueError, match=r"the model's output on example 0 has NaN entries, so nothing can be compared"
    ):
        pack_(model, torch.randn(4, 128))
    with pytest.raises(ValueError, match=r"the model's output on example 1 has NaN entries"):
        pack_(mlp(), [torch.randn(4, 128), torch.full((4, 128), float("nan"))])
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_failure_gives_the_float32_model_back():
    model, x = mlp(0.9), torch.randn(8, 128)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())

    def broken(calls, budget_ms):
        raise RuntimeError("no clock")

    with pytest.raises(RuntimeError, match="no clock"):
        pack_(model, x, dtype=torch.bfloat16, timer=broken)
    assert snapshot(model) == before and not model._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_of_one_shape_and_two_dtypes_are_measured_apart():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.high, self.low = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()

        def forward(self, x):
            return self.low(self.high(x).bfloat16()).float()

    torch.manual_seed(0)
    report = pack_(prune(Mixed(), 0.9), torch.randn(8, 64), timer=timer())
    assert [layer.measured_on for layer in report.layers] == ["high", "low"]
    assert report.groups_measured == 2


def test_a_bfloat16_model_of_nothing_but_linears_is_held_to_its_own_tolerance(monkeypatch):
    monkeypatch.setitem(outputs.OUTPUT_TOLERANCE, torch.bfloat16, -1.0)  # nothing meets it
    with pytest.raises(PackedModelError, match="the packed model's output on example 0 differs by"):
        pack_(mlp(0.9).bfloat16(), torch.randn(8, 128).bfloat16(), timer=timer())


def test_our_own_dense_form_is_chosen_and_held_to_the_accuracy_rule(monkeypatch):
    model, dense = mlp(0.0), mlp(0.0)
    x = torch.randn(8, 128)
    report = pack_(model, x, timer=timer("dense/own"))
    assert [layer.form for layer in report.layers] == ["dense/own"] * 2 and report.packed_layers == 0
    assert_same_function(model, dense, x)
    assert unpack_(model) == 2 and torch.equal(model[0].weight, dense[0].weight)
    calls = []

    def inaccurate(*args):
        calls.append(args)
        return 0.5 if len(calls) <= 2 else 7.0  # good while it is timed, bad once a layer is packed

    monkeypatch.setattr("rmtkern.packing.layers.accuracy_excess", inaccurate)
    report = pack_(model, x, timer=timer("dense/own"), layouts=["dense"])
    assert [layer.form for layer in report.layers] == ["nn.Linear"] * 2 and len(calls) == 4
    assert "dense/own misses the accuracy rule by a factor 7" in report.layers[0].reason


def test_a_bfloat16_model_packs_as_it_is():
    model = mlp(0.9).bfloat16()
    x = torch.randn(8, 128).bfloat16()
    report = pack_(model, x, timer=timer())
    assert report.packed_layers == 2 and model(x).dtype == torch.bfloat16
    assert unpack_(model) == 2 and model[0].weight.dtype == torch.bfloat16


def test_impossible_dtypes():
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or torch.bfloat16 or None, got torch.float16"):
        pack_(mlp(0.9), torch.randn(3, 128), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch.float32 for a model with torch.bfloat16 weights; call model.float"):
        pack_(mlp(0.9).bfloat16(), torch.randn(3, 128).bfloat16(), dtype=torch.float32)


class Gated(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.fc, self.act, self.out, self.keep = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), keep

    def forward(self, x):
        h = self.fc(x)
        y = self.out(self.act(h))
        return y + h if self.keep else y


@pytest.mark.parametrize(("keep", "activation"), [(True, None), (False, None)])
def test_an_activation_with_another_reader_is_not_absorbed(keep, activation):
    """`h` is alive when `out` runs, so that it may be read again: whether it is cannot be seen, so it stays."""
    model, x = prune(Gated(keep), 0.9), torch.randn(4, 64)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert report.layers[0].activation is activation and report.packed_layers == 2
    assert_same_function(model, dense, x)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (timm.layers.GELU(), "gelu"),
        (nn.Tanh(), None),
        (nn.Dropout(0.5), None),
        (nn.PReLU(), None),
        (nn.ReLU(inplace=True), None),
    ],
)
def test_activations(act, name):
    model, x = mlp(0.9, act), torch.randn(4, 128)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert report.layers[0].activation == name and report.packed_layers == 2
    assert isinstance(model[1], AbsorbedActivation) == (name is not None)
    assert_same_function(model, dense, x)
    unpack_(model)
    assert model[1] is act


def test_an_activation_that_serves_two_linears_is_not_absorbed():
    act = nn.GELU()
    model = prune(nn.Sequential(nn.Linear(64, 64), act, nn.Linear(64, 64), act), 0.9)
    report = pack_(model, torch.randn(4, 64), timer=timer())
    assert [layer.activation for layer in report.layers] == [None, None]


def test_a_gated_unit_is_refused_rather_than_changed():
    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(64, 64), nn.SiLU()

        def forward(self, x):
            x = self.fc(x)
            x = self.act(x) * x
            return x

    model, x = prune(Swish(), 0.9), torch.randn(4, 64)
    dense, before = copy.deepcopy(model), snapshot(model)
    try:
        pack_(model, x, timer=timer())
    except PackedModelError as error:
        assert "nothing was changed" in str(error)
        assert snapshot(model) == before
    assert_same_function(model, dense, x)


def test_packed_model_runs_non_contiguous_input_and_compiles():
    torch._dynamo.reset()
    model = mlp(0.9)
    dense = copy.deepcopy(model)
    pack_(model, torch.randn(6, 128).t().contiguous().t(), timer=timer())
    x = torch.randn(128, 9).t()
    assert_same_function(model, dense, x)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_a_packed_model_refuses_to_train():
    model, x = mlp(0.9), torch.randn(4, 128)
    pack_(model, x, timer=timer())
    with pytest.raises(PackedModelError, match=r"has no backward pass"):
        model(x).sum().backward()
    with pytest.raises(PackedModelError, match=r"cannot train; call eval\(\)"):
        model.train()(x)
    with pytest.raises(PackedModelError, match=r"packed already; call rmtkern.unpack_\(model\) first"):
        pack_(model, x)


def test_bad_input():
    x = torch.randn(4, 128)
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got list"):
        pack_([], x)
    with pytest.raises(ValueError, match=r"Sequential has no nn.Linear, so there is nothing to pack"):
        pack_(nn.Sequential(nn.ReLU()).eval(), x)
    with pytest.raises(ValueError, match=r"a lone nn.Linear cannot be swapped in place; wrap it in nn.Sequential"):
        pack_(nn.Linear(128, 4).eval(), x)
    with pytest.raises(PackedModelError, match=r"the model is in train mode; call model.eval\(\) first"):
        pack_(mlp().train(), x)
    partly = mlp()
    partly[1].train()
    with pytest.raises(PackedModelError, match=r"1 is in train mode; call model.eval\(\) first"):
        pack_(partly, x)
    with pytest.raises(TypeError, match=r"example: expected a tensor, a tuple of arguments, a dict .* got NoneType"):
        pack_(mlp(), None)
    with pytest.raises(ValueError, match=r"example: expected at least one example input, got an empty list"):
        pack_(mlp(), [])
    with pytest.raises(
        ValueError, match=r"the model cannot run example 1: .*; pass what you would call the model with"
    ):
        pack_(mlp(), [x, torch.randn(4, 127)])
    with pytest.raises(
        ValueError, match=r"unknown layout 'csr'; valid: dense, bitmask, block, nofm, lowrank, spectral"
    ):
        pack_(mlp(), x, layouts=["csr"])
    with pytest.raises(ValueError, match=r"margin: expected 0 <= margin < 1, got 1"):
        pack_(mlp(), x, margin=1)
    for kind in (torch.float64, torch.float16):
        with pytest.raises(
            ValueError, match=rf"dtype: torch.bfloat16 for a model with {kind} weights; call model.float"
        ):
            pack_(mlp().to(kind), x.to(kind), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"0 has no weight before the model ran; run it once"):
        pack_(nn.Sequential(nn.LazyLinear(4)).eval(), x)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"autocast is on.*call pack_ outside of it"),
    ):
        pack_(mlp(), x)
    broken = mlp()
    broken[2].weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"2.weight has NaN or Inf entries; repair the checkpoint"):
        pack_(broken, x)
    with pytest.raises(TypeError, match=r"unpack_|model: expected an nn.Module, got int"):
        unpack_(3)
    packed = mlp()
    pack_(packed, x, timer=timer())
    with pytest.raises(
        ValueError, match=r"a lone PackedLinear cannot be swapped in place; use linear = packed.unpack\(\)"
    ):
        unpack_(packed[0])

    class Mute(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            return "no tensor"

    with pytest.raises(TypeError, match=r"the model's output on example 0 holds no tensor"):
        pack_(Mute(nn.Linear(128, 4)).eval(), x)


def test_an_empty_batch_packs_nothing():
    report = pack_(mlp(), torch.randn(0, 128), timer=timer())
    assert all("the example gives it no tokens" in layer.reason for layer in report.layers)


@pytest.mark.parametrize("stage", ["timer", "guard", "verify", "pack"])
def test_a_failure_halfway_leaves_the_model_as_it_was(stage, monkeypatch):
    model, x = mlp(0.9), torch.randn(4, 128)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    calls = []

    def fails(times, budget_ms):
        calls.append(times)
        if (stage == "timer" and len(calls) == 2) or (stage == "guard" and "original" in times):
            times["packed"]() if stage == "guard" else None
            raise KeyboardInterrupt
        return timer()(times, budget_ms)

    if stage == "verify":
        monkeypatch.setitem(outputs.OUTPUT_TOLERANCE, torch.float32, -1.0)
    if stage == "pack":
        monkeypatch.setattr("rmtkern.packing.pack.pack_layer", lambda *args: 1 / 0)
    expected = {"verify": PackedModelError, "pack": ZeroDivisionError}.get(stage, KeyboardInterrupt)
    with pytest.raises(expected):
        pack_(model, x, timer=fails)
    assert snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or "_rmtkern_inside" in vars(module) for module in model.modules())


def test_watching_restores_classes_when_the_model_raises():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot run example 0"):
        pack_(model, torch.randn(4, 5))
    assert snapshot(model) == before


def test_a_candidate_that_is_wrong_is_never_chosen(monkeypatch):
    model, x = mlp(0.9), torch.randn(4, 128)

    def wrong(x, w, bias=None, **options):
        return linear(x, w, bias, **options) + (1e-3 if w.layout == "bitmask" else 0.0)

    monkeypatch.setattr("rmtkern.packing.layers.linear", wrong)
    report = pack_(model, x, timer=timer())
    assert report.packed_layers == 0
    assert "bitmask misses the accuracy rule by a factor" in report.layers[0].reason


def test_report_formats():
    model, x = mlp(0.9), torch.randn(4, 128)
    report = pack_(model, [x, x[:2]], timer=timer())
    text = str(report)
    assert "2 of 2 layers packed, 100.0 % of the linear weights" in text
    assert "example 1: original 9 ms, strongest dense" in text and "packed 4 ms: 2.25x" in text
    record = json.loads(report.to_json())
    assert record["packed_layers"] == 2 and record["packed_share"] == 1.0
    assert record["layers"][0]["ms"]["4"]["bitmask"] == 1.0
    assert record["nbytes_before"] == 4 * (128 * 256 + 256 * 64) > record["nbytes_after"]
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["layer"] for row in rows] == ["0", "2"]
    assert report.to_markdown().startswith("| layer | shape |")


def test_interleaved_times_have_the_right_order():
    a, b = torch.randn(300, 300), torch.randn(30, 30)
    ms = interleaved_ms({"large": lambda: a @ a, "small": lambda: b @ b}, budget_ms=20)
    assert ms["large"] > ms["small"] > 0


def test_a_mini_block_pattern_is_recognised_from_the_weight():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    with torch.no_grad():
        model[0].weight *= (torch.rand(32, 64) > 0.7).repeat_interleave(4, 0)
    report = pack_(model, torch.randn(40, 64), timer=timer("block(r=4,c=1)"))
    assert report.layers[0].form == "block(r=4,c=1)"
    assert {"bitmask", "block(r=2,c=1)", "block(r=4,c=1)"} <= set(report.layers[0].ms[40])
    assert not any(label.startswith("block") for label in report.layers[1].ms[40])
