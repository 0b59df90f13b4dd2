"""prune_ layer by layer on whole models: float64 references, exact counts, every way to pass images, refusals."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning import layerwise
from rmtkern.pruning.calibrate import second_moment, weights_in_order
from rmtkern.pruning.pattern import parse_pattern, unit_of, whole_units
from rmtkern.pruning.repair import damped
from rmtkern.pruning.stages import Call, Stage, find_stages
from tests.pruning.test_stages import waiting_threads
from tests.test_api import IMAGES, MODELS, Injected, state, unchanged, zeros

PATTERNS = [
    ("unstructured", 0.6),
    ("2:4", 0.5),
    ("2:4x4", 0.5),
    ("1x2", 0.5),
    ("2x1", 0.4),
    ("4x1", 0.5),
    ("4x2", 0.5),
    ("8x1", 0.5),
]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)).double()


def moment_of(module, x, name="weight"):
    stage = Stage("", module, tuple(prunable_weights(module, "all")))
    calls = [Call((part,), {}) for part in x.split(3)]
    with torch.no_grad():
        weight, uses = next(found for found in weights_in_order(stage, calls[0]) if found[0].name == name)
        return second_moment(stage, weight, uses, calls)


def test_second_moments_of_linear_and_convolution():
    x = torch.randn(10, 7, 12, dtype=torch.float64)
    flat = x.reshape(-1, 12).numpy()
    found = moment_of(nn.Linear(12, 4).double(), x)
    np.testing.assert_allclose(found[0], flat.T @ flat / len(flat), rtol=1e-12, atol=1e-12)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2).double()
    images = torch.randn(5, 4, 9, 8, dtype=torch.float64)
    columns = nn.functional.unfold(images, (3, 2), 1, (1, 0), (2, 1)).transpose(1, 2).reshape(-1, 24).numpy()
    found = moment_of(conv, images)
    assert found.shape == (2, 12, 12)
    for group, part in enumerate(np.split(columns, 2, axis=1)):
        np.testing.assert_allclose(found[group], part.T @ part / len(part), rtol=1e-12, atol=1e-12)


def test_second_moments_of_attention_that_functions_hide():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = torch.randn(6, 5, 8, dtype=torch.float64)

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attention

        def forward(self, x):
            return self.attn(x, x, x)[0]

    probe = copy.deepcopy(attention)
    probe.out_proj.weight.data.copy_(torch.eye(8))
    probe.out_proj.bias.data.zero_()
    for name, inputs in (("attn.in_proj_weight", x), ("attn.out_proj.weight", probe(x, x, x)[0].detach())):
        flat = inputs.reshape(-1, 8).numpy()
        np.testing.assert_allclose(moment_of(Self(), x, name)[0], flat.T @ flat / len(flat), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["obs", "admm", "wanda", "magnitude"])
def test_survivors_solve_the_normal_equations_behind_the_pruned_prefix(method, monkeypatch):
    monkeypatch.setattr("rmtkern.pruning.repair._TOLERANCE", 1e-5)
    model, x = mlp(), torch.randn(300, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    dense = copy.deepcopy(model)
    plan = prune_(model, 0.5, method, targets="all", calibration=x, repair="obs")
    plan.verify(model)
    assert plan.config.repair == "obs" and plan.calibration_images == 300
    with torch.no_grad():
        behind = model[1](model[0](x))  # the second layer is fit to what the pruned first one gives
    for layer, inputs in ((0, x), (2, behind)):
        h = damped(inputs.t() @ inputs / len(inputs)).numpy()
        old, new = dense[layer].weight.detach().numpy(), model[layer].weight.detach().numpy()
        for row in range(len(old)):
            keep = new[row] != 0
            expected = np.linalg.solve(h[np.ix_(keep, keep)], h[keep] @ old[row])
            # conjugate gradients stop at 1e-5 of the output's energy norm
            np.testing.assert_allclose(new[row][keep], expected, atol=2e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["obs", "admm"])
def test_exact_counts_for_every_pattern_on_real_models(name, method):
    dense = MODELS[name]().train()
    for pattern, sparsity in PATTERNS:
        model = copy.deepcopy(dense)
        plan = prune_(model, sparsity, method, pattern, calibration=IMAGES)
        kind, params = parse_pattern(pattern)
        unit = unit_of(params)
        total = gone = 0
        for weight in prunable_weights(model):
            zero = weight.as_matrix() == 0
            assert bool((zero == unit_entries_of(zero, unit)).all())
            if kind == "n:m":
                assert zero.reshape(-1, params["m"]).sum(1).eq(params["m"] - params["n"]).all()
            units = whole_units(zero, unit)
            total, gone = total + units.numel(), gone + int(units.sum())
        assert gone == round(sparsity * total)
        plan.verify(model)
        assert model.training and waiting_threads() == 0
        assert torch.isfinite(next(iter(model.parameters()))).all()


def unit_entries_of(zero, unit):
    return whole_units(zero, unit).repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)


def test_zeros_that_are_there_already_stay_and_count():
    model = MODELS["timm vit"]()
    prune_(model, 0.3, "magnitude")
    before = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
    total = sum(mask.numel() for mask in before)
    for budget in ("uniform", "row", "global"):
        again = copy.deepcopy(model)
        prune_(again, 0.6, "admm", budget=budget, calibration=IMAGES)
        after = [weight.as_matrix() == 0 for weight in prunable_weights(again)]
        assert all(bool((new | ~old).all()) for old, new in zip(before, after, strict=True))
        assert zeros(again) == round(0.6 * total)


def test_budget_row_takes_the_same_from_every_row():
    model = MODELS["hf vit"]()
    prune_(model, 0.5, "admm", budget="row", calibration=IMAGES)
    for weight in prunable_weights(model):
        assert (weight.as_matrix() == 0).sum(1).eq(weight.shape[1] // 2).all()


def test_every_way_to_pass_images_gives_the_same():
    model = MODELS["timm vit"]().eval()
    x = torch.randn(10, 3, 32, 32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(10)), 4)
    plans = []
    for images in (x, (x, torch.arange(10)), list(x.split(4)), loader, [{"x": x}], iter([x]), x.double()):
        one = copy.deepcopy(model)
        plans.append(prune_(one, 0.5, "wanda", repair="obs", calibration=images))  # which reads the images twice
    assert {plan.calibration_images for plan in plans} == {10}
    assert len({plan.layers[0].mask_hash for plan in plans}) == 1


def test_text_transformers_with_batches_of_keyword_arguments():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 50, (3, n)), "attention_mask": torch.ones(3, n)} for n in (7, 5)]
    assert [s.name for s in find_stages(model, prunable_weights(model))] == ["encoder.layer.0", "encoder.layer.1"]
    dense = model(**batches[0]).last_hidden_state
    losses = {}
    for repair in ("none", "obs"):
        pruned = copy.deepcopy(model)
        plan = prune_(pruned, 0.5, "obs", "2:4", calibration=batches, repair=repair)
        plan.verify(pruned)
        assert plan.sparsity == 0.5 and plan.calibration_images == 6
        losses[repair] = float((pruned(**batches[0]).last_hidden_state - dense).detach().square().mean())
    assert losses["obs"] < losses["none"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)
    prune_(model, 0.5, targets="all", calibration=torch.randn(40, 12))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert zeros(model, "all") == (12 * 16 + 16 * 8) // 2


def test_grouped_and_depthwise_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    for pattern in ("unstructured", "4x1", "8x1"):
        one = copy.deepcopy(model)
        if pattern == "8x1":
            one = one[:3]
        prune_(one, 0.5, "admm", pattern, targets="all", calibration=torch.randn(6, 4, 9, 9)).verify(one)


def test_dead_inputs_few_images_and_constant_images():
    model = mlp().float()
    x = torch.randn(40, 12)
    x[:, 3] = 0
    for images in (x, x[:1], torch.ones(4, 12), torch.zeros(4, 12)):
        for method in ("obs", "admm"):
            one = copy.deepcopy(model)
            prune_(one, 0.5, method, targets="all", calibration=images).verify(one)
            assert all(torch.isfinite(parameter).all() for parameter in one.parameters())


@pytest.mark.parametrize("images, error, message", [
    (torch.empty(0, 3, 32, 32), ValueError, "expected at least one image, got none"),
    ([], ValueError, "expected at least one image, got none"),
    (torch.randn(2, 3, 40, 40), ValueError, r"does not take a batch of float32 \[2, 3, 40, 40\] \(.*; pass images as"),
    (torch.randn(3, 32, 32), ValueError, r"does not take a batch of float32 \[\d, 32, 32\]"),
    (torch.randn(2, 1, 32, 32), ValueError, r"does not take a batch of float32 \[\d, 1, 32, 32\] \(.*channels"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ValueError, r"does not take a batch of uint8 \[\d, 3, 32, 32\]"),
    ([IMAGES, torch.randn(2, 3, 40, 40)], ValueError, r"does not take a batch of float32 \[2, 3, 40, 40\]"),
    ([{"pictures": IMAGES}], ValueError, r"a batch of pictures float32 .*unexpected keyword argument 'pictures'"),
    ({"x": IMAGES}, TypeError, "expected a tensor or an iterable of batches, got dict"),
    ([(["a", "b"], torch.tensor([0, 1]))], TypeError, "images, \\(images, labels\\) or mappings, got tuple of list"),
    (torch.full((2, 3, 32, 32), torch.nan), ValueError, r"the (inputs of|gradients at) blocks.0.attn.qkv.weight "),
    ([IMAGES, IMAGES.mul(torch.inf)], ValueError, r"the (inputs of|gradients at) blocks.0.attn.qkv.weight "),
    ([np.zeros((2, 3, 32, 32))], TypeError, "expected batches that are tensors of images"),
    ("folder", TypeError, "expected a tensor or an iterable of batches, got str"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["auto", "obs"])
def test_bad_calibration_changes_nothing(images, error, message, method):
    model = MODELS["timm vit"]().train()
    before = state(model)
    with pytest.raises(error, match=message):
        prune_(model, 0.5, method, calibration=images)
    assert unchanged(model, before) and all(module.training for module in model.modules())
    assert waiting_threads() == 0 and all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("stage", ["second_moment", "weights_in_order", "REPAIRS"])
def test_a_failure_in_the_middle_changes_nothing(monkeypatch, stage, at):
    model = MODELS["torchvision swin"]().train()  # two blocks, so that the first is pruned when the second fails
    before, calls = state(model), []
    real = getattr(layerwise, stage)

    def fail(*args):
        calls.append(stage)
        if len(calls) > at:
            raise Injected
        return (real["obs"] if stage == "REPAIRS" else real)(*args)

    monkeypatch.setattr(layerwise, stage, {"obs": fail} if stage == "REPAIRS" else fail)
    with pytest.raises(Injected):
        prune_(model, 0.5, "obs", targets="all", calibration=IMAGES)
    assert len(calls) == at + 1
    assert unchanged(model, before) and all(module.training for module in model.modules())
    assert waiting_threads() == 0


def test_a_repair_that_overflows_is_refused():
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).half()
    model[0].weight.data.copy_(torch.tensor([[1.0, 60000.0]]))
    x = torch.randn(50, 1) * torch.tensor([[1.0, 1e-3]]) + 1e-5 * torch.randn(50, 2)
    model[0].weight.data[0, 0] = 30000
    x = torch.cat([x[:, :1] * 1e3, x[:, :1]], 1)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"0.weight: the repair overflows torch.float16; prune a float32 model"):
        prune_(model, 0.5, "random", targets="all", repair="obs", calibration=x.half(), seed=_seed_that_drops(0, model))
    assert torch.equal(model[0].weight, before)


def _seed_that_drops(column, model):
    for seed in range(20):
        one = copy.deepcopy(model)
        prune_(one, 0.5, "random", targets="all", seed=seed)
        if one[0].weight[0, column] == 0:
            return seed
    raise AssertionError("no seed drops this column")
