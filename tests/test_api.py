"""analyze and prune_ on whole models: exact counts, nothing else changed, and every refusal before any change."""

import copy
import json
import logging

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rmtkern import api
from rmtkern.api import analyze, prune_
from rmtkern.errors import PackedModelError
from rmtkern.models import PrunableWeight, prunable_weights
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.pruning.presets import AUTO, AUTO_CALIBRATED, PRESETS
from rmtkern.pruning.score import GROUPED, SCORES

UNSTRUCTURED = [name for name, preset in PRESETS.items() if preset.score not in GROUPED]
DATA_FREE = [name for name in UNSTRUCTURED if not PruneConfig(method=name).resolve(True).needs_calibration]
IMAGES = torch.randn(4, 3, 32, 32)
LABELLED = IMAGES, torch.tensor([0, 1, 1, 0])
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}
MODELS = {
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=32, num_heads=2),
    "timm eva02": lambda: timm.create_model(
        "eva02_base_patch14_224", depth=1, img_size=32, patch_size=16, embed_dim=48, num_heads=2
    ),
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), embed_dim=16, num_heads=(1, 2)
    ),
    "hf vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)),
    "hf clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)),
    "torchvision vit": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=10),
    "torchvision swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4]),
}


def vit():
    """A ViT small enough to prune hundreds of times: attention, MLP, convolution, tied head."""
    model = nn.ModuleDict(
        {
            "patch_embed": nn.Conv2d(3, 24, 8, 8),
            "blocks": nn.ModuleList(
                nn.ModuleDict(
                    {
                        "attn": nn.ModuleDict({"qkv": nn.Linear(24, 72), "proj": nn.Linear(24, 24)}),
                        "mlp": nn.ModuleDict({"fc1": nn.Linear(24, 48), "fc2": nn.Linear(48, 24)}),
                    }
                )
                for _ in range(2)
            ),
            "head": nn.Linear(24, 5),
        }
    )
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def zeros(model, targets=None):
    return sum(int((weight.parameter == 0).sum()) for weight in prunable_weights(model, targets))


def total(model, targets=None):
    return sum(weight.parameter.numel() for weight in prunable_weights(model, targets))


# -- counts (T13) ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.999), st.sampled_from(DATA_FREE), st.integers(0, 2**31))
def test_the_sparsity_is_met_to_the_single_weight(sparsity, method, seed):
    torch.manual_seed(seed)
    model = vit()
    plan = prune_(model, sparsity, method)
    goal = round(sparsity * total(model))
    assert zeros(model) == plan.selected.zeros == goal
    plan.verify(model)
    for layer in plan.layers:
        assert layer.zeros == int((model.get_parameter(layer.name) == 0).sum())
    assert plan.prunable.total == total(model, "all")
    assert plan.parameters.total == sum(parameter.numel() for parameter in model.parameters())


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0, 0.99), min_size=2, max_size=4), st.lists(st.sampled_from(DATA_FREE), min_size=4, max_size=4)
)
def test_masks_only_grow_over_cumulative_cycles(sparsities, methods):
    model = vit()
    masks = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
    for sparsity, method in zip(sorted(sparsities), methods, strict=False):
        prune_(model, sparsity, method)
        after = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
        assert all(bool((new | ~old).all()) for old, new in zip(masks, after, strict=True))
        masks = after
        assert zeros(model) == round(sparsity * total(model))


@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_the_same_request_gives_the_same_zeros(method):
    first = MODELS["timm vit"]()
    second = copy.deepcopy(first)
    images = None if method in DATA_FREE else LABELLED
    plans = [prune_(model, 0.6, method, calibration=images, seed=5) for model in (first, second)]
    assert plans[0].to_json() == plans[1].to_json()
    assert unchanged(first, state(second))


def test_equal_scores_go_by_layer_and_index():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2))
    for layer in model:
        layer.weight.data.fill_(1.0)
    prune_(model, 14 / 24, "magnitude")
    assert model[0].weight.eq(0).all()
    assert model[1].weight.flatten().eq(0).tolist() == [True] * 2 + [False] * 10


def test_zeros_stay_zero_under_training_with_their_gradient_masked():
    """A trainable module: momentum and decay keep a zero at zero once its gradient is."""
    model = vit()
    plan = prune_(model, 0.5, "magnitude")
    masks = {layer.name: model.get_parameter(layer.name) == 0 for layer in plan.layers}
    for optimizer in (
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        torch.optim.AdamW(model.parameters(), 0.01),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            sum(parameter.square().sum() + parameter.sum() for parameter in model.parameters()).backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.masked_fill_(mask, 0)
            optimizer.step()
        assert zeros(model) == plan.selected.zeros
        plan.verify(model)


# -- real models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_method_on_real_models(name):
    model = MODELS[name]().eval()
    for step, method in enumerate(UNSTRUCTURED):
        images = None if method in DATA_FREE else LABELLED
        if name == "hf clip" and PRESETS[method].restore != "none":
            continue  # it has no classes
        sparsity = 0.2 + 0.7 * step / len(UNSTRUCTURED)
        plan = prune_(model, sparsity, method, calibration=images)
        assert zeros(model) == round(sparsity * total(model))
        plan.verify(model)
    assert prunable_weights(model, "embed")[0].parameter.ne(0).all()  # not asked, not touched
    output = model(IMAGES)
    assert torch.isfinite(output if isinstance(output, torch.Tensor) else output[0]).all()


@pytest.mark.parametrize("name", ["timm vit", "hf vit", "torchvision vit"])
@pytest.mark.parametrize("score", ["magnitude", "activation", "random"])
def test_two_of_four_on_real_models(name, score):
    model = MODELS[name]().eval()
    plan = prune_(model, 0.5, pattern="2:4", score=score, calibration=IMAGES if score == "activation" else None)
    for weight in prunable_weights(model):
        assert ((weight.as_matrix().reshape(-1, 4) != 0).sum(1) == 2).all()
    assert plan.sparsity == 0.5
    assert plan.layers[0].params == {"n": 2, "m": 4}


@pytest.mark.parametrize("score", ["magnitude", "activation", "random"])
def test_two_of_four_that_four_outputs_share(score):
    model = MODELS["timm vit"]().eval()
    plan = prune_(model, 0.5, pattern="2:4x4", score=score, calibration=IMAGES if score == "activation" else None)
    for weight in prunable_weights(model):
        kept = (weight.as_matrix() != 0).unflatten(0, (-1, 4))
        assert torch.equal(kept, kept[:, :1].expand_as(kept))  # the four rows of a strip agree
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert plan.sparsity == 0.5
    assert plan.layers[0].params == {"n": 2, "m": 4, "r": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", DATA_FREE)
def test_dtypes(dtype, method):
    model = vit().to(dtype)
    plan = prune_(model, 0.55, method, haar=0.5 if method == "seb" else 0.0)
    assert zeros(model) == plan.selected.zeros == round(0.55 * total(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(torch.signbit(weight.parameter[weight.parameter == 0]).any() for weight in prunable_weights(model))


def test_only_the_asked_weights_change_and_stay_the_same_parameters():
    model = vit().train()
    model["blocks"][0]["mlp"]["fc1"].weight.requires_grad_(False)
    parameters, before = dict(model.named_parameters()), state(model)
    grads = {name: parameter.requires_grad for name, parameter in parameters.items()}
    plan = prune_(model, 0.5, "magnitude", targets="mlp", ignore="blocks.1.*")
    assert [layer.name for layer in plan.layers] == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad == grads[name] and parameter.grad is None
        if name in {layer.name for layer in plan.layers}:
            assert torch.equal(parameter[parameter != 0], before[name][parameter != 0])
        else:
            assert torch.equal(parameter, before[name])
    assert model.training and list(model.state_dict()) == list(before)


def test_channels_last_convolutions_and_transposed_linears():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), transformers.pytorch_utils.Conv1D(12, 8)).to(
        memory_format=torch.channels_last
    )
    before = state(model)
    plan = prune_(model, 0.5, "uniform", targets="all", pattern="2:4")
    plan.verify(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert ((model[0].weight.reshape(16, -1, 4) != 0).sum(-1) == 2).all()
    assert ((model[1].weight.t().reshape(12, -1, 4) != 0).sum(-1) == 2).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value[value != 0], before[name][value != 0])


def test_magnitude_takes_the_smallest_of_all_layers():
    model = vit()
    before = torch.cat([weight.parameter.flatten() for weight in prunable_weights(model)]).abs()
    prune_(model, 0.3, "magnitude")
    after = torch.cat([weight.parameter.flatten() for weight in prunable_weights(model)])
    assert before[after == 0].max() <= before[after != 0].min()


def test_wanda_follows_the_inputs():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    images = torch.randn(50, 8) * torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 0.001])
    plan = prune_(model, 0.5, "wanda", calibration=images)
    assert model[0].weight[:, 0].ne(0).all() and model[0].weight[:, 7].eq(0).all()
    assert model[0].weight.eq(0).sum(1).tolist() == [4] * 6
    assert plan.calibration_images == 50


def test_auto_is_the_chosen_preset():
    assert prune_(vit(), 0.5).config.method == AUTO
    assert prune_(MODELS["timm vit"](), 0.5, calibration=IMAGES).config.method == AUTO_CALIBRATED


def test_calibration_that_is_not_used_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        prune_(vit(), 0.5, "magnitude", calibration=IMAGES)
    assert "uses no calibration images" in caplog.text


def test_the_plan_travels_as_json():
    model = vit()
    plan = prune_(model, 0.5, "seb")
    again = PrunePlan.from_json(plan.to_json())
    again.verify(model)
    assert again == plan or again.to_json() == plan.to_json()
    assert set(json.loads(plan.to_json())["fits"]) == {layer.name for layer in plan.layers}
    assert str(again) == str(plan)


def test_a_config_holds_the_same_fields():
    first, second, third = vit(), vit(), vit()
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    config = PruneConfig(0.4, "seb", targets=("mlp",))
    plans = [prune_(first, config), prune_(second, config=config), prune_(third, 0.4, "seb", targets="mlp")]
    assert plans[0].to_json() == plans[1].to_json() == plans[2].to_json()


# -- refusals ----------------------------------------------------------------------------------------------------------


def broken(model, value):
    model["blocks"][1]["mlp"]["fc1"].weight.data[2, 3] = value
    return model


def expanded(model):
    fc1 = model["blocks"][1]["mlp"]["fc1"]
    fc1.weight = nn.Parameter(fc1.weight.data[:1].expand(fc1.weight.shape))
    return model


def sharing(model):
    model["blocks"][1]["mlp"]["fc1"].weight = nn.Parameter(model["blocks"][0]["mlp"]["fc1"].weight.data)
    return model


def meta():
    with torch.device("meta"):
        return vit()


def packed():
    model = vit()
    model["blocks"][0]["mlp"]["fc1"] = type("PackedLinear", (nn.Module,), {})()
    return model


@pytest.mark.parametrize("make, fields, error, message", [
    (vit, {"sparsity": 1.0}, ValueError, r"sparsity: expected a fraction in \[0, 1\), got 1.0"),
    (vit, {"sparsity": -0.5}, ValueError, "got -0.5"),
    (vit, {"method": "magic"}, ValueError, "unknown method 'magic'; expected one of auto, hybrid, magnitude"),
    (vit, {"pattern": "blocky"}, ValueError, "unknown pattern 'blocky'"),
    (vit, {"pattern": "2:4", "sparsity": 0.7}, ValueError, "pattern '2:4' takes only sparsity 0.5"),
    (vit, {"pattern": "8:16"}, ValueError, r"blocks.0.attn.qkv.weight has 24 in features, not divisible by 16"),
    (vit, {"targets": "blocks.7.*"}, ValueError, "target 'blocks.7.\\*' matches no weight; this model has the roles"),
    (vit, {"ignore": "hed"}, ValueError, "ignore='hed' matches no weight"),
    (vit, {"ignore": ("attn", "mlp")}, ValueError, "nothing to prune"),
    (vit, {"method": "wanda"}, ValueError, "method 'wanda' with score 'activation' needs images"),
    (vit, {"method": "obs"}, ValueError, r"method 'obs' with score 'obs' needs images; pass calibration=, or take a "
     "method without: magnitude, uniform, row, random, seb, rmt, alphapruning$"),
    (vit, {"method": "row", "repair": "obs"}, ValueError, "method 'row' with repair 'obs' needs images"),
    (vit, {"repair": "half"}, ValueError, "unknown repair 'half'; expected one of none, obs"),
    (vit, {"repair": 1}, TypeError, "repair: expected a string, got int"),
    (vit, {"budget": "half"}, ValueError, "unknown budget 'half'"),
    (vit, {"score": "half"}, ValueError, "unknown score 'half'"),
    (vit, {"method": "wanda", "calibration": 3}, TypeError, "expected a tensor or an iterable of batches, got int"),
    (vit, {"method": "wanda", "calibration": []}, ValueError, "expected at least one image"),
    (vit, {"config": "seb"}, TypeError, "config: expected a PruneConfig, got str"),
    (vit, {"config": PruneConfig(), "method": "seb"}, TypeError, "got a PruneConfig and method; put everything into"),
    (vit, {"config": PruneConfig(), "sparsity": 0.6}, TypeError, "got a PruneConfig and sparsity"),
    (vit, {"config": PruneConfig(), "sparsity": PruneConfig()}, TypeError, "got two PruneConfig"),
    (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, "nothing to prune: targets= and ignore= leave no Linear"),
    (lambda: broken(vit(), float("nan")), {}, ValueError, "blocks.1.mlp.fc1.weight has NaN or Inf entries"),
    (lambda: broken(vit(), float("-inf")), {}, ValueError, "blocks.1.mlp.fc1.weight has NaN or Inf entries"),
    (meta, {}, ValueError, "blocks.0.attn.qkv.weight is a meta tensor"),
    (lambda: sharing(vit()), {}, ValueError, "fc1.weight and blocks.1.mlp.fc1.weight share their memory and are two"),
    (lambda: expanded(vit()), {}, ValueError, r"fc1.weight is an expanded tensor, .*give it its own: .clone\(\)"),
    (packed, {}, PackedModelError, r"blocks.0.mlp.fc1 is packed.*unpack_\(model\) first"),
    (lambda: torch.zeros(3, 3), {}, TypeError, "expected a torch.nn.Module, got Tensor"),
])  # fmt: skip
def test_bad_requests_change_nothing(make, fields, error, message):
    model = make()
    before = state(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        prune_(model, **fields)
    if isinstance(model, nn.Module) and not any(value.is_meta for value in before.values()):
        values = model.state_dict()
        assert all(torch.equal(values[name].nan_to_num(7), value.nan_to_num(7)) for name, value in before.items())


def test_calibration_in_autocast_is_refused():
    model, images = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"call prune_ outside of it"):
        prune_(model, 0.5, targets="all", calibration=images)
    with torch.autocast("cpu", torch.bfloat16):
        assert prune_(model, 0.5, targets="all").sparsity == 0.5


def test_a_lazy_module_is_asked_to_run_first():
    for module in (nn.LazyLinear(4), nn.LazyConv2d(4, 1)):
        for verb in (prune_, analyze):
            with pytest.raises(ValueError, match=r"0.weight has no values before the model ran .*; run it once"):
                verb(nn.Sequential(module))


def test_too_many_zeros_already():
    model = vit()
    prune_(model, 0.5)
    before = state(model)
    with pytest.raises(ValueError, match=r"asks for .* are zero already and stay so; ask for at least 0.5"):
        prune_(model, 0.25)
    assert unchanged(model, before)


class Injected(BaseException):
    """Not an Exception, like an interrupt from the keyboard: it must be survived too."""


@pytest.mark.parametrize(
    "stage",
    ["prunable_weights", "check_values", "calibrate", "fit_spectra", "make_masks", "prune_layerwise", "mask_hash"],
)
def test_a_failure_at_any_stage_changes_nothing(monkeypatch, stage):
    model = MODELS["timm vit"]().train()
    before = state(model)
    calls = []
    real = getattr(api, stage)

    def fail(*args, **kwargs):
        calls.append(stage)
        if stage in ("make_masks", "prune_layerwise"):
            real(*args, **kwargs)
        raise Injected

    monkeypatch.setattr(api, stage, fail)
    with pytest.raises(Injected):
        prune_(model, 0.5, "rmt", score="activation", repair="obs", calibration=IMAGES)
    assert calls == [stage]
    assert unchanged(model, before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("stage", "times", "fields"),
    [
        ("reallocate", 1, {"method": "ser", "calibration": LABELLED}),
        ("layer_weights", 1, {"method": "ser", "calibration": LABELLED}),
        ("sensitivities", 1, {"calibration": IMAGES}),
        ("hold_out", 1, {"budget": "best", "score": "admm", "calibration": IMAGES}),
        ("model_outputs", 1, {"budget": "best", "score": "admm", "calibration": IMAGES}),
        ("relative_change", 2, {"budget": "best", "score": "admm", "calibration": IMAGES}),
    ],
)
def test_a_failure_at_the_stages_of_other_methods_changes_nothing(monkeypatch, stage, times, fields):
    """After the stage, which may have trained, measured or pruned already."""
    model = MODELS["timm vit"]().train()
    before, calls, real = state(model), [], getattr(api, stage)

    def fail(*args, **kwargs):
        found = real(*args, **kwargs)
        calls.append(stage)
        if len(calls) == times:
            raise Injected
        return found

    monkeypatch.setattr(api, stage, fail)
    with pytest.raises(Injected):
        prune_(model, 0.5, **fields)
    assert len(calls) == times
    assert unchanged(model, before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_failure_while_writing_restores_what_was_written(monkeypatch, failing):
    model = MODELS["timm vit"]()
    before = state(model)
    written = []
    real = PrunableWeight.to_parameter

    def fail(self, matrix):
        written.append(self.name)
        if len(written) == failing:
            raise Injected
        return real(self, matrix)

    monkeypatch.setattr(PrunableWeight, "to_parameter", fail)
    with pytest.raises(Injected):
        prune_(model, 0.5, "magnitude")
    assert len(written) == failing
    assert unchanged(model, before)


def test_a_model_that_fails_on_the_images_is_unchanged():
    model = MODELS["timm vit"]().train()
    before = state(model)
    with pytest.raises(ValueError, match=r"the model does not take a batch of float32 \[2, 3, 40, 40\] \(Assert"):
        prune_(model, 0.5, "wanda", calibration=torch.randn(2, 3, 40, 40))
    assert unchanged(model, before) and model.training


# -- analyze -----------------------------------------------------------------------------------------------------------


def test_analyze_fits_every_matrix():
    model = vit()
    before = state(model)
    fits = analyze(model)
    assert list(fits) == [weight.name for weight in prunable_weights(model, "all")]
    assert fits["patch_embed.weight"].shape == (24, 192)
    assert unchanged(model, before)
    assert list(analyze(model, targets=None)) == [weight.name for weight in prunable_weights(model)]
    assert list(analyze(model, targets="mlp", ignore="blocks.0.*")) == [
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.weight",
    ]


def test_analyze_splits_what_is_fused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2), "conv": nn.Conv2d(32, 32, 3, groups=2)})
    names = ["attn.in_proj_weight[q]", "attn.in_proj_weight[k]", "attn.in_proj_weight[v]", "attn.out_proj.weight",
             "conv.weight[group 0]", "conv.weight[group 1]"]  # fmt: skip
    fits = analyze(model, split_qkv=True)
    assert list(fits) == names
    model["attn"].in_proj_weight.data[:32] *= 10
    assert analyze(model, split_qkv=True)[names[0]].sigma_plus == pytest.approx(
        10 * fits[names[0]].sigma_plus, rel=1e-5
    )
    assert next(iter(analyze(model))) == "attn.in_proj_weight"


def test_analyze_passes_its_options_on():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plain = analyze(model)["0.weight"]
    assert analyze(model, edge="tw", beta=0.5)["0.weight"].sigma_plus != plain.sigma_plus
    assert analyze(model, alpha=0.1)["0.weight"].sigma2 != plain.sigma2
    assert analyze(model, k_hill=5)["0.weight"].hill_alpha != plain.hill_alpha
    assert analyze(model, legacy=True)["0.weight"].sigma_plus != plain.sigma_plus
    assert analyze(model, max_bytes=1)["0.weight"].sigma_plus == pytest.approx(plain.sigma_plus, rel=1e-9)
    with pytest.raises(ValueError, match="alpha"):
        analyze(model, alpha=0.7)


def test_analyze_refusals():
    with pytest.raises(ValueError, match="nothing to analyse"):
        analyze(nn.ReLU())
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight has NaN or Inf entries"):
        analyze(broken(vit(), float("nan")))
    with pytest.raises(ValueError, match="is a meta tensor"):
        analyze(meta())
    with pytest.raises(PackedModelError, match=r"unpack_\(model\) first"):
        analyze(packed())
    with pytest.raises(ValueError, match="target 'xyz' matches no weight"):
        analyze(vit(), targets="xyz")


@pytest.mark.parametrize("pattern", ["2x1", "4x1", "8x1", "1x2", "4x2"])
@pytest.mark.parametrize("method", ["magnitude", "uniform", "row", "seb", "rmt"])
def test_mini_blocks_go_whole_and_to_the_single_block(pattern, method):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    plan = prune_(model, 0.6, method, pattern, targets="all")
    r, c = map(int, pattern.split("x"))
    blocks = zeros = 0
    for old, module in zip(before, (model[0], model[2]), strict=True):
        units = (module.weight.detach() == 0).view(module.out_features // r, r, -1, c)
        assert torch.equal(units.any(3).any(1), units.all(3).all(1))  # no block is cut
        blocks, zeros = blocks + units[:, 0, :, 0].numel(), zeros + int(units[:, 0, :, 0].sum())
        if method != "rmt":
            assert torch.equal(module.weight[module.weight != 0], old[module.weight != 0])
    assert zeros == round(0.6 * blocks)
    assert plan.selected.zeros == zeros * r * c
    plan.verify(model)


@pytest.mark.parametrize("pattern", ["32x32", "16x64", "128x16"])
@pytest.mark.parametrize("score", [score for score in SCORES if score not in GROUPED])
def test_large_blocks_go_whole_with_every_score(pattern, score):
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128))
    plan = prune_(model, 0.5, "uniform", pattern, targets="all", calibration=torch.randn(300, 64), score=score)
    r, c = map(int, pattern.split("x"))
    for module in (model[0], model[2]):
        units = (module.weight.detach() == 0).view(module.out_features // r, r, -1, c)
        assert torch.equal(units.any(3).any(1), units.all(3).all(1))
        assert int(units[:, 0, :, 0].sum()) == units[:, 0, :, 0].numel() // 2
    plan.verify(model)


def test_the_weakest_mini_blocks_go():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    strength = torch.rand(2, 8).repeat_interleave(4, 0)
    model[0].weight.data.copy_(strength * torch.randn(8, 8).sign())
    prune_(model, 0.5, "magnitude", "4x1", targets="all")
    threshold = strength.unique().sort().values[7]
    assert torch.equal(model[0].weight == 0, strength <= threshold)


def test_a_shape_that_mini_blocks_do_not_divide_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"0\.weight is 6x8 \(out x in features\), which pattern '4x1' does not divide"
    ):
        prune_(model, 0.5, pattern="4x1", targets="all")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
