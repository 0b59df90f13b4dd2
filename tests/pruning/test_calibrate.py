"""Second moments against a direct computation in float64, and a model that is left as it was."""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F

from rmtkern.models import prunable_weights
from rmtkern.pruning.calibrate import calibrate, second_moments
from rmtkern.pruning.stages import Call, Stage

RTOL = 1e-5  # squares in float32, summed in float64


def moments(model, images, targets="all"):
    return calibrate(model, prunable_weights(model, targets), images).features


def second_moment(x):
    return x.detach().double().reshape(-1, x.shape[-1]).square().mean(0)[None].numpy()


def test_linear_layers():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(70, 4, 6)
    found = calibrate(model, prunable_weights(model, "all"), x)
    assert found.images == 70
    np.testing.assert_allclose(found.features["0.weight"], second_moment(x), rtol=RTOL)
    np.testing.assert_allclose(found.features["2.weight"], second_moment(model[1](model[0](x))), rtol=RTOL)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (4, 2), "padding": "same", "dilation": (2, 1)},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": 3, "groups": 4},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own remark on speed
def test_convolutions(options):
    conv = nn.Conv2d(4, 8, **options)
    x = torch.randn(5, 4, 12, 11)
    groups, (height, width) = conv.groups, conv.kernel_size
    # the moments are those of the unfolded input: read them off a convolution whose kernel picks one entry each
    expected = np.zeros((groups, 4 // groups * height * width))
    for k in range(expected.shape[1]):
        pick = nn.Conv2d(4, groups, bias=False, dtype=torch.float64, **options)
        pick.weight.data.zero_().reshape(groups, -1)[:, k] = 1
        expected[:, k] = pick(x.double()).square().mean((0, 2, 3)).detach()
    found = moments(nn.Sequential(conv), x)["0.weight"]
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_attention_projections_hidden_in_functions():
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight)
    x = torch.randn(3, 3, 32, 32)
    seen = {}
    attention = model.encoder.layers[1].self_attention
    attention.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    found = moments(model, x)
    prefix = "encoder.layers.encoder_layer_1.self_attention."
    np.testing.assert_allclose(found[prefix + "in_proj_weight"], second_moment(seen["x"]), rtol=RTOL)
    probe = nn.MultiheadAttention(16, 2, batch_first=True)  # the same attention with an identity for out_proj
    probe.load_state_dict(attention.state_dict())
    probe.out_proj.weight.data.copy_(torch.eye(16))
    probe.out_proj.bias.data.zero_()
    context = probe(seen["x"], seen["x"], seen["x"], need_weights=False)[0]
    np.testing.assert_allclose(found[prefix + "out_proj.weight"], second_moment(context), rtol=1e-4)


def test_cross_attention_keeps_query_and_key_apart():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x[:, :2], x[:, 2:] * 3, x[:, 2:] * 3)[0]

    x = torch.randn(3, 7, 4)
    found = moments(Cross(), x)["attn.in_proj_weight"]
    other = second_moment(x[:, 2:] * 3)
    np.testing.assert_allclose(found, np.concatenate([second_moment(x[:, :2]), other, other]), rtol=RTOL)


def test_attention_with_separate_projections():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x[..., :3], x[..., 2:])[0]

    x = torch.randn(3, 5, 4)
    found = moments(Cross(), x)
    assert list(found)[-1] == "attn.out_proj.weight"
    for name, part in (("q", x), ("k", x[..., :3]), ("v", x[..., 2:])):
        np.testing.assert_allclose(found[f"attn.{name}_proj_weight"], second_moment(part), rtol=RTOL)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_base_patch14_224"])
def test_timm_models_that_bypass_their_modules(name):
    model = timm.create_model(name, depth=1, embed_dim=48, num_heads=2, img_size=56)
    found = moments(model, torch.randn(2, 3, 56, 56))
    assert set(found) == {weight.name for weight in prunable_weights(model, "all")}
    assert all((moment > 0).all() for moment in found.values())


def test_encoder_layers_with_a_fused_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8))
    weights = prunable_weights(model, "all")
    found = calibrate(model, weights, torch.randn(4, 5, 8)).features
    assert {weight.name for weight in weights} == set(found)
    assert torch.backends.mha.get_fastpath_enabled()


def test_transposed_linear_of_transformers():
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(5, 3))
    x = torch.randn(4, 2, 3)
    np.testing.assert_allclose(moments(model, x)["0.weight"], second_moment(x), rtol=RTOL)


def test_every_way_to_pass_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(10, 3, 2, 2), torch.arange(10)
    expected = moments(model, x)["1.weight"]
    named = [{"input": x, "labels": y}, ({"input": x}, y), {"input": x, "label": y}]
    ways = [(x, y), list(x.split(3)), [(x[:4], y[:4]), (x[4:], y[4:])], iter([x]), [{"input": x}], x.double(),
            *([one] for one in named),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4), (x[:5], x[5:])]  # fmt: skip
    for images in ways:
        found = calibrate(model, prunable_weights(model, "all"), images)
        assert found.images == 10
        np.testing.assert_allclose(found.features["1.weight"], expected, rtol=RTOL)


def test_bfloat16_models():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).bfloat16()
    x = torch.randn(9, 6)
    np.testing.assert_allclose(moments(model, x)["0.weight"], second_moment(x.bfloat16()), rtol=RTOL)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments(model, torch.randn(2, 3, 6, 6))
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="does not take a batch"):  # the failure must not leave the mode behind
        moments(model, torch.randn(2, 3, 9, 9))
    assert [module.training for module in model] == [True, True, False, True, True]
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.used(x))


def test_refusals():
    model = Partly()
    with pytest.raises(ValueError, match=r"no image reached idle.weight; add it to ignore="):
        moments(model, torch.randn(2, 4))
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        moments(model, [])
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        moments(model, torch.empty(0, 4))
    with pytest.raises(TypeError, match="expected a tensor or an iterable of batches, got int"):
        moments(model, 3)
    with pytest.raises(TypeError, match="expected a tensor or an iterable of batches, got str"):
        moments(model, "images/")
    with pytest.raises(TypeError, match=r"expected batches that are tensors of images.*got ndarray"):
        moments(model, [np.zeros((2, 4))])
    with pytest.raises(ValueError, match=r"the inputs of used.weight have NaN or Inf"):
        moments(model, torch.full((2, 4), torch.nan), "used")


def test_second_moments_of_a_stage_in_one_run_and_in_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1200, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    stage = Stage("", model, tuple(prunable_weights(model, "all")))
    batches = [torch.randn(50, 1200, dtype=torch.float64) for _ in range(3)]
    for enough, used in ((math.inf, 3), (0.05, 2)):  # of 1,200 inputs 60
        x = torch.cat(batches[:used])
        found, outputs = second_moments(stage, [Call((batch,), {}) for batch in batches], enough=enough)
        assert torch.equal(torch.cat(outputs), model(x))
        hidden = model[1](model[0](x)).detach()
        for name, inputs in (("0.weight", x), ("2.weight", hidden)):
            expected = (inputs.t() @ inputs / len(inputs))[None]
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)  # float64, another order of sums
