"""count_macs: against published numbers, against PyTorch's own counter, and by hand with zeros and merged tokens."""

import json

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rmtkern
from rmtkern.errors import PackedModelError
from rmtkern.macs import count_macs
from rmtkern.token_merging import merge_tokens_

IMAGE = torch.zeros(1, 3, 224, 224)


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def published(model):
    """(attention, all) as the papers count: linears, attention and the embedding, not the search for similar tokens."""
    report = count_macs(model, IMAGE.to(next(model.parameters()).device))
    return report.of("attention")[0], report.total - report.of("other")[0], report.nonzero - report.of("other")[1]


@pytest.mark.parametrize(
    ("name", "dense", "attention", "merged"),
    [
        ("vit_base_patch16_224", 17.564e9, 0.715e9, 25.39),
        ("vit_large_patch16_224", 61.55e9, None, 49.7),
        ("deit_small_patch16_224", 4.61e9, None, None),
        ("deit_tiny_patch16_224", 1.26e9, None, None),  # printed so; 1.2537 G
    ],
)
def test_published_numbers(name, dense, attention, merged):
    model = on_meta(name)
    of_attention, before, _ = published(model)
    assert before == pytest.approx(dense, rel=6e-3 if merged is None else 1e-3)
    assert attention is None or of_attention == pytest.approx(attention, rel=1e-3)
    merge_tokens_(model, 8)
    after = published(model)[1]
    assert merged is None or round(100 * (1 - after / before), 2 if merged == 25.39 else 1) == merged
    width = model.embed_dim  # the formula of the papers, block by block
    tokens, wanted = 197, 196 * 768 * width + 1000 * width
    for _ in model.blocks:
        gone = min(8, (tokens - 1) // 2)
        wanted += 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * (tokens - gone) * width**2
        tokens -= gone
    assert after == wanted and tokens == {12: 101, 24: 7}[len(model.blocks)]


@pytest.mark.parametrize(
    ("name", "digits", "reduction"),
    [("vit_base_patch16_224", 2, 61.10), ("deit_small_patch16_224", 1, 59.8), ("deit_tiny_patch16_224", 1, 57.5)],
)
def test_published_numbers_with_zeros(name, digits, reduction):
    model = timm.create_model(name).eval()
    _, before, _ = published(model)
    if "tiny" in name:
        rmtkern.prune_(model, method="magnitude", pattern="2:4", targets=("attn", "mlp", "head"))
    else:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.view(-1, 4)[:, :2] = 0
    if "base" in name:
        assert round(100 * (1 - published(model)[2] / before), 2) == 47.63
    merge_tokens_(model, 8)
    _, _, nonzero = published(model)
    assert round(100 * (1 - nonzero / before), digits) == reduction
    if "base" in name:
        assert round(nonzero / 1e9, 3) == 6.833


HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
      "patch_size": 16}  # fmt: skip
MODELS = {
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32),
    "unfused": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), embed_dim=16, num_heads=(1, 2)
    ),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1)),
    "transformers": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32),
    "transposed": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose2d(8, 6, 3, 2, groups=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_that_of_pytorch(name):
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.1)  # torchvision's head starts as zeros
    if name == "unfused":
        for block in model.blocks:
            block.attn.fused_attn = False
    x = torch.randn(3, 3, 32, 32)
    report = count_macs(model, x)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with FlopCounterMode(display=False) as counter:
                model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    assert 2 * report.total == counter.get_total_flops() and report.nonzero == report.total
    attends = name not in ("convnext", "transposed")
    assert (report.of("attention")[0] > 0) == attends and (report.of("other")[0] > 0) == (name == "transposed")


def test_by_hand_with_zeros_and_merged_tokens():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, embed_dim=32, num_heads=2, num_classes=5)
    rmtkern.prune_(model, 0.6)
    merge_tokens_(model, 3)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    report = count_macs(model.train(), torch.randn(4, 3, 64, 64))
    assert model.training and all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    layers = {(layer.name, layer.kind): layer for layer in report.layers}
    for name, kind, tokens in (("0.attn.qkv", "qkv", 17), ("0.attn.proj", "attn_out", 17), ("0.mlp.fc1", "mlp_in", 14),
                               ("1.attn.qkv", "qkv", 14), ("1.mlp.fc2", "mlp_out", 11)):  # fmt: skip
        layer, weight = layers[f"blocks.{name}.weight", kind], model.get_submodule(f"blocks.{name}").weight
        assert (layer.places, layer.macs) == (4 * tokens, 4 * tokens * weight.numel())
        assert layer.nonzero == 4 * tokens * int((weight != 0).sum()) < layer.macs
    for index, tokens in ((0, 17), (1, 14)):
        assert layers[f"blocks.{index}.attn", "attention"].macs == 4 * 2 * tokens**2 * 32
        even, odd = (tokens + 1) // 2, tokens // 2
        assert layers[f"blocks.{index}", "other"].macs == 4 * even * odd * 16  # cosines of keys [T, d]
    assert layers["patch_embed.proj.weight", "embed"].macs == 4 * 16 * 768 * 32
    assert layers["head.weight", "head"].macs == 4 * 5 * 32
    assert report.total == sum(layer.macs for layer in report.layers)
    found = json.loads(report.to_json())
    assert found["total"] == report.total and found["nonzero"] == report.nonzero
    text = str(report)
    for word in ("embed", "qkv", "attention", "other", "head", "without zeros", f"in all {report.total / 1e9:.4f} G"):
        assert word in text


def test_other_ways_to_call_a_model():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    x = torch.randn(1, 3, 32, 32)
    assert count_macs(model, (x,)) == count_macs(model, {"x": x}) == count_macs(model, x)


def test_refusals():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match=r"example: expected a tensor, a tuple of arguments or a dict .*, got list"):
        count_macs(model, [x])
    with pytest.raises(ValueError, match=r"the model cannot run the example: .*; pass what you would call it with"):
        count_macs(model, torch.randn(2, 7))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        count_macs("model", x)
    with pytest.raises(ValueError, match="unknown kind 'conv2d'; valid: qkv"):
        count_macs(model, x).of("conv2d")
    rmtkern.pack_(model, x, timer=lambda calls, budget: {name: 1.0 + (name != "dense/own") for name in calls})
    with pytest.raises(PackedModelError, match=r"unpack_"):
        count_macs(model, x)
