"""Roles on real models of three libraries, with random weights, and every refusal."""

from collections import Counter

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from rmtkern.errors import PackedModelError
from rmtkern.models import GROUPS, ROLES, block_name, check_values, layer_type, prunable_weights, weights_of_state


def roles(model, targets="all"):
    return {weight.name: weight.role for weight in prunable_weights(model, targets)}


def counts(model, targets="all"):
    return Counter(weight.role for weight in prunable_weights(model, targets))


HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}
FUSED = {"qkv": 2, "attn_out": 2, "mlp_in": 2, "mlp_out": 2}
SEPARATE = {"q": 2, "k": 2, "v": 2, "attn_out": 2, "mlp_in": 2, "mlp_out": 2}
GATED = {**SEPARATE, "mlp_gate": 2}


def timm_model(name, **options):
    return lambda: timm.create_model(name, pretrained=False, **options)


def hf_model(kind, **options):
    cls, config = (getattr(transformers, name) for name in kind)
    return lambda: cls(config(**HF, **options))


SWIN = {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "img_size": 56}
MODELS = {
    "timm vit": (timm_model("vit_tiny_patch16_224", depth=2), FUSED, {"embed": 1, "head": 1}),
    "timm deit": (timm_model("deit_tiny_distilled_patch16_224", depth=2), FUSED, {"embed": 1, "head": 2}),
    "timm dinov2": (timm_model("vit_small_patch14_dinov2", depth=2), FUSED, {"embed": 1}),
    "timm beit": (timm_model("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=2), FUSED,
                  {"embed": 1, "head": 1}),
    "timm eva02 swiglu": (timm_model("eva02_base_patch14_224", depth=2, embed_dim=48, num_heads=2), GATED,
                          {"embed": 1}),
    "timm eva02 packed swiglu": (timm_model("eva02_tiny_patch14_224", depth=2), FUSED, {"embed": 1}),
    "timm swin": (timm_model("swin_tiny_patch4_window7_224", **SWIN), FUSED, {"embed": 1, "linear": 1, "head": 1}),
    "timm swinv2": (timm_model("swinv2_tiny_window8_256", depths=(1, 1), embed_dim=16, num_heads=(1, 2), img_size=64),
                    FUSED, {"embed": 1, "linear": 5, "head": 1}),
    "timm cait": (timm_model("cait_xxs24_224", depth=1, depth_token_only=1),
                  {"qkv": 1, "q": 1, "k": 1, "v": 1, "attn_out": 2, "mlp_in": 2, "mlp_out": 2},
                  {"embed": 1, "linear": 2, "head": 1}),
    "timm convnext": (timm_model("convnext_atto", depths=(1, 1, 1, 1)), {"mlp_in": 4, "mlp_out": 4},
                      {"embed": 1, "conv": 7, "head": 1}),
    "hf vit": (hf_model(("ViTForImageClassification", "ViTConfig")), SEPARATE, {"embed": 1, "head": 1}),
    "hf beit": (hf_model(("BeitForImageClassification", "BeitConfig")), SEPARATE, {"embed": 1, "head": 1}),
    "hf dinov2": (hf_model(("Dinov2ForImageClassification", "Dinov2Config"), mlp_ratio=2), SEPARATE,
                  {"embed": 1, "head": 1}),
    "hf dinov2 swiglu": (hf_model(("Dinov2Model", "Dinov2Config"), use_swiglu_ffn=True),
                         None, {"embed": 1}),
    "hf clip": (hf_model(("CLIPVisionModel", "CLIPVisionConfig")), SEPARATE, {"embed": 1}),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10), FUSED,
                        {"embed": 1, "head": 1}),
    "torchvision swin": (lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4]), FUSED,
                         {"embed": 1, "linear": 1, "head": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_roles_of_real_models(name):
    make, projections, others = MODELS[name]
    model = make()
    found = counts(model)
    if projections is None:  # transformers before version 5 fuses the gate into the first layer of SwiGLU
        projections = GATED if "mlp_gate" in found else SEPARATE
    assert found == {**projections, **others}
    assert counts(model, None) == projections
    for weight in prunable_weights(model, "all"):
        assert dict(model.named_parameters())[weight.name] is weight.parameter
        assert weight.as_matrix().shape == weight.shape
        assert torch.equal(weight.to_parameter(weight.as_matrix()), weight.parameter)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_alone_tells_the_same_roles(name):
    model = MODELS[name][0]()
    known = {weight.name: weight for weight in prunable_weights(model, "all")}
    found = {weight.name: weight for weight in weights_of_state(model.state_dict())}
    assert list(found) == list(known)
    different = {name: (found[name].role, known[name].role) for name in known if found[name].role != known[name].role}
    assert different == {}
    for weight in found.values():
        assert weight.shape == known[weight.name].shape and weight.groups == known[weight.name].groups


def test_a_checkpoint_alone_leaves_out_what_is_no_weight():
    state = {
        "embeddings.word_embeddings.weight": torch.zeros(9, 4),
        "norm.weight": torch.zeros(4),
        "index.weight": torch.zeros(4, 4, dtype=torch.int64),
        "empty.weight": torch.zeros(0, 4),
        "pos_embed": torch.zeros(4, 4),
        f"{'x.' * 501}weight": torch.zeros(4, 4),
        "": torch.zeros(4, 4),
        "forward..weight": torch.zeros(4, 4),
        "weight": torch.zeros(3, 3),
    }
    assert [weight.name for weight in weights_of_state(state)] == ["forward..weight", "weight"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", "encoder.layers.encoder_layer_3"),
        ("encoder.layer.11.attention.attention.query.weight", "encoder.layer.11"),
        ("encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.0"),
        ("layers.1.blocks.0.mlp.fc1.weight", "layers.1.blocks.0"),
        ("patch_embed.proj.weight", ""),
        ("head.weight", ""),
        ("2.weight", ""),
        ("weight", ""),
    ],
)
def test_block_names(name, block):
    assert block_name(name) == block


def test_vit_base_has_the_papers_50_matrices():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False)
    assert len(prunable_weights(model, "all")) == 50
    assert len(prunable_weights(model)) == 48


def test_names_of_transformers_before_version_5():
    layer = nn.ModuleDict(
        {
            "attention": nn.ModuleDict(
                {
                    "attention": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")}),
                    "output": nn.ModuleDict({"dense": nn.Linear(8, 8)}),
                }
            ),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(8, 16)}),
            "output": nn.ModuleDict({"dense": nn.Linear(16, 8)}),
        }
    )
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList([layer])}), "pooler": nn.Linear(8, 8)})
    assert list(roles(model).values()) == ["q", "k", "v", "attn_out", "mlp_in", "mlp_out", "linear"]


def test_attention_pooling_and_squeeze_excitation_are_told_apart():
    block = nn.ModuleDict(
        {"se": nn.ModuleDict({"fc1": nn.Conv2d(8, 2, 1)}), "attn": nn.ModuleDict({"q": nn.Linear(8, 8)})}
    )
    model = nn.ModuleDict({"attn_pool": nn.ModuleDict({"kv": nn.Linear(8, 16), "proj": nn.Linear(8, 8)}), "b": block})
    assert roles(model) == {
        "attn_pool.kv.weight": "qkv",
        "attn_pool.proj.weight": "attn_out",
        "b.se.fc1.weight": "conv",
        "b.attn.q.weight": "q",
    }


class Lora(nn.Module):
    """A linear and its low-rank update, under the names that PEFT gives them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

    weight = property(lambda self: self.base_layer.weight)

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


def with_lora():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=64, num_heads=2)
    block = model.blocks[0]
    block.attn.qkv, block.mlp.fc1 = Lora(block.attn.qkv), Lora(block.mlp.fc1)
    return model.eval()


def test_lora_wrappers_have_the_role_of_what_they_wrap_and_adapters_none():
    roles = {weight.name.removeprefix("blocks.0."): weight.role for weight in prunable_weights(with_lora(), "all")}
    assert roles["attn.qkv.base_layer.weight"] == "qkv" and roles["mlp.fc1.base_layer.weight"] == "mlp_in"
    assert {role for name, role in roles.items() if "lora" in name} == {"linear"}  # which is pruned on request only
    assert roles["attn.proj.weight"] == "attn_out" and roles["mlp.fc2.weight"] == "mlp_out"


def test_plain_sequential_leaves_the_last_weight_alone():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    assert set(roles(model).values()) == {"linear"}
    assert list(roles(model, None)) == ["0.weight", "2.weight"]
    assert list(roles(nn.Linear(4, 4), None)) == ["weight"]
    assert list(roles(model, "linear")) == ["0.weight", "2.weight", "3.weight"]


def test_square_mlp_layers_go_by_order():
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))})
    assert list(roles(model).values()) == ["mlp_in", "mlp_out"]


def test_multihead_attention_with_separate_projections():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert roles(model) == {
        "q_proj_weight": "q",
        "k_proj_weight": "k",
        "v_proj_weight": "v",
        "out_proj.weight": "attn_out",
    }
    fused = {weight.name: weight for weight in prunable_weights(nn.MultiheadAttention(8, 2))}
    assert list(fused) == ["in_proj_weight", "out_proj.weight"]
    assert fused["in_proj_weight"].shape == (24, 8)


def test_fused_projections_split_by_rows():
    model = nn.ModuleDict(
        {"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "kv": nn.Linear(8, 16), "q": nn.Linear(8, 8)})}
    )
    qkv, kv, q = prunable_weights(model)
    assert qkv.split() == {f"{qkv.name}[{part}]": slice(8 * i, 8 * i + 8) for i, part in enumerate("qkv")}
    assert list(kv.split()) == [f"{kv.name}[k]", f"{kv.name}[v]"]
    assert q.split() == q.blocks() == {q.name: slice(0, 8)}


def test_convolutions_unfold_and_groups_are_blocks():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, (3, 1), groups=2), nn.Conv2d(8, 8, 3, groups=8))
    plain, grouped, depthwise = prunable_weights(model, "all")
    assert (plain.shape, grouped.shape, depthwise.shape) == ((8, 36), (8, 12), (8, 9))
    assert not plain.depthwise and not grouped.depthwise and depthwise.depthwise
    assert grouped.blocks() == {"1.weight[group 0]": slice(0, 4), "1.weight[group 1]": slice(4, 8)}
    assert list(depthwise.blocks()) == ["2.weight"]
    assert torch.equal(plain.as_matrix()[2], model[0].weight[2].flatten())
    model.to(memory_format=torch.channels_last)  # not contiguous: the matrix must not follow memory order
    assert torch.equal(plain.as_matrix()[2], model[0].weight[2].flatten())


def test_a_subclass_of_conv1d_is_one():  # fully_shard changes a module's class to a subclass of another name
    model = nn.Sequential(type("FSDPConv1D", (transformers.pytorch_utils.Conv1D,), {})(16, 8))
    (weight,) = prunable_weights(model, "all")
    assert (weight.kind, weight.shape) == ("transposed", (16, 8))


def test_transposed_linear_of_transformers():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": transformers.pytorch_utils.Conv1D(16, 8)})})
    (weight,) = prunable_weights(model)
    assert (weight.role, weight.shape, weight.kind) == ("mlp_in", (16, 8), "transposed")
    assert torch.equal(weight.as_matrix(), model["mlp"]["c_fc"].weight.t())
    assert torch.equal(weight.to_parameter(weight.as_matrix()), model["mlp"]["c_fc"].weight)


def test_tied_weights_are_listed_once():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(8, 8)}), "fc1_copy": nn.Linear(8, 8)})
    model["fc1_copy"].weight = model["mlp"]["fc1"].weight
    (weight,) = prunable_weights(model, "all")
    assert (weight.name, weight.tied) == ("mlp.fc1.weight", ("fc1_copy.weight",))
    assert list(roles(model, "fc1_copy")) == ["mlp.fc1.weight"]


def test_targets_and_ignore_take_roles_groups_and_globs():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert list(roles(model, "head")) == ["head.weight"]
    assert list(roles(model, ["blocks.0.*", "embed"])) == [
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ]  # fmt: skip
    assert set(roles(model, "mlp").values()) == {"mlp_in", "mlp_out"}
    assert list(roles(model, "blocks.1.mlp.fc1")) == ["blocks.1.mlp.fc1.weight"]
    left = prunable_weights(model, None, ignore=("attn", "blocks.1.*"))
    assert [weight.name for weight in left] == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    assert len(prunable_weights(model, None, ignore="mlp_gate")) == 8  # a role this model lacks is no mistake


def test_groups_hold_every_role_once():
    assert sorted(role for roles in GROUPS.values() for role in roles) == sorted(ROLES)
    assert [layer_type(role) for role in ("qkv", "mlp_gate", "head")] == ["attn", "mlp", "other"]


def test_refusals():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(
        ValueError, match=r"target 'blocks\.9\.\*' matches no weight; this model has the roles embed, qkv"
    ):
        prunable_weights(model, "blocks.9.*")
    with pytest.raises(ValueError, match="target 'mlp_gate' matches no weight"):
        prunable_weights(model, ("mlp", "mlp_gate"))
    with pytest.raises(ValueError, match="ignore='hed' matches no weight"):
        prunable_weights(model, None, "hed")
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got Tensor"):
        prunable_weights(torch.zeros(2, 2))
    assert prunable_weights(nn.Sequential(nn.ReLU())) == []


def test_packed_models_are_refused():
    packed = nn.ModuleDict({"fc1": type("PackedLinear", (nn.Module,), {})()})
    with pytest.raises(PackedModelError, match=r"fc1 is packed.*call rmtkern.unpack_\(model\) first"):
        prunable_weights(packed)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_parametrised_weights_are_refused(wrap):
    with pytest.raises(ValueError, match=r"0.weight is not a plain parameter"):
        prunable_weights(nn.Sequential(wrap(nn.Linear(4, 4))))


def test_values_are_checked_by_name():
    def linear(**options):
        return prunable_weights(nn.Sequential(nn.Linear(4, 4, **options)), "all")

    check_values(linear())
    with pytest.raises(ValueError, match=r"0.weight is a meta tensor"):
        check_values(linear(device="meta"))
    broken = linear()
    broken[0].parameter.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"0.weight has NaN or Inf entries"):
        check_values(broken)
    with pytest.raises(ValueError, match=r"0.weight has dtype torch.complex64; expected float32"):
        check_values(linear(dtype=torch.complex64))
