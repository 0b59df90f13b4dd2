"""shrink_: smaller models of three libraries compute what the masked ones do, load, pack, prune, and fail whole."""

import copy
import json

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from rmtkern import blocks as blocks_module
from rmtkern import shrinking
from rmtkern.api import prune_
from rmtkern.blocks import find_blocks
from rmtkern.cli import main
from rmtkern.errors import PackedModelError
from rmtkern.fewer_heads import FewerHeads
from rmtkern.files import load, save
from rmtkern.loading import load_state_, save_dense
from rmtkern.nn import PackedLinear
from rmtkern.packing import pack_, unpack_
from rmtkern.shrink_plan import BlockPlan, ShrinkPlan
from rmtkern.shrinking import shrink_
from tests.test_files import timer

HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 16,
}
TIMM = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 5}


def timm_vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **{**TIMM, **options})


def dinov2(**options):
    return timm.create_model("vit_small_patch14_dinov2", **{**TIMM, "img_size": 28, **options})


def swiglu():
    return timm.create_model("vit_giant_patch14_dinov2", **{**TIMM, "img_size": 28, "mlp_ratio": 4.0})


def hf(kind, **options):
    model, config = (getattr(transformers, f"{kind}{word}") for word in ("ForImageClassification", "Config"))
    return model(config(**HF, **options))


def torchvision_vit():
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 48, 96, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # it starts at zero, and would hide everything
    return model


BOTH = {"mlp", "heads"}
MODELS = {
    "timm vit": (timm_vit, 32, BOTH),
    "timm dinov2": (dinov2, 28, BOTH),
    "timm dinov2 swiglu": (swiglu, 28, BOTH),
    "transformers vit": (lambda: hf("ViT"), 32, BOTH),
    "transformers dinov2 swiglu": (lambda: hf("Dinov2", use_swiglu_ffn=True), 32, BOTH),
    "torchvision vit": (torchvision_vit, 32, BOTH),
    "timm eva02": (lambda: timm.create_model("eva02_tiny_patch14_224", **{**TIMM, "img_size": 28}), 28, {"mlp"}),
}


def build(name):
    torch.manual_seed(0)
    make, size, kinds = MODELS[name]
    return make().eval(), torch.randn(12, 3, size, size), kinds


def run(model, x):
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def close(a, b):
    # two float32 orders of summation through a few layers: 1e-5 of the output's scale is generous, and far below what
    # one wrong unit changes (above 1e-2)
    return torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_is_the_masked_one(name, calibrated):
    model, x, kinds = build(name)
    dense = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    plan = shrink_(model, mlp=0.5, heads=0.25, calibration=x if calibrated else None, multiple=8)
    assert {block.kind for block in plan.blocks} == kinds and len(plan.blocks) == 2 * len(kinds)
    assert plan.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert plan.parameters[1] < before and not model.training
    assert plan.calibration_images == (12 if calibrated else 0)
    assert all((block.loss is None) != calibrated for block in plan.blocks)
    found = {(block.name, block.kind): block for block in find_blocks(dense)[0]}
    for block in plan.blocks:
        gone = len(block.removed)
        assert gone == 1 if block.kind == "heads" else abs(gone - block.units / 2) <= 8 and gone
        # the dense model with zeros in the columns of what went, and the consumers' new values elsewhere
        spec = found[block.name, block.kind]
        owner = spec.consumer.removesuffix(".weight")
        small, wide = model.get_submodule(owner), dense.get_submodule(owner)
        stays = torch.tensor([unit for unit in range(block.units) if unit not in block.removed])
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, spec.columns(stays)] = small.weight
            wide.bias.copy_(small.bias)
    assert close(run(model, x), run(dense, x))


def test_images_choose_better_than_norms():
    torch.manual_seed(0)
    model = timm_vit(embed_dim=64).eval()
    x, new = torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    y = run(model, new)
    errors = []
    for calibration in (x, None):
        small = copy.deepcopy(model)
        shrink_(small, 0.4, 0.25, calibration)
        errors.append(float((run(small, new) - y).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_units_that_do_nothing_go_first_and_cost_nothing():
    model, _, _ = build("timm vit")
    x = torch.randn(128, 3, 32, 32)  # more tokens than hidden features, or others could be spared for nothing too
    dead = {}
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.mlp.fc1.weight *= 20  # far from linear, so that no unit is a combination of others
            dead[i] = torch.randperm(192)[:64].sort().values
            block.mlp.fc1.weight[dead[i]] = 0  # constant: what it adds belongs into the bias
            block.attn.proj.weight[:, 12:24] = 0  # head 1 is not read
    y = run(model, x)
    plan = shrink_(model, mlp=1 / 3, heads=0.25, calibration=x)
    for block in plan.blocks:
        i = int(block.name.split(".")[1])
        assert list(block.removed) == (dead[i].tolist() if block.kind == "mlp" else [1])
        assert block.loss < 1e-5  # what damping (1 % of the mean) leaves of a constant
    assert torch.allclose(run(model, x), y, rtol=0, atol=3e-2 * float(y.abs().max()))


def test_shapes_attributes_and_training():
    model, x, _ = build("timm vit")
    shrink_(model, mlp=0.3, heads=0.5)
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    assert (attn.num_heads, attn.attn_dim, attn.head_dim) == (2, 24, 12)
    assert (attn.qkv.out_features, tuple(attn.qkv.weight.shape), attn.proj.in_features) == (72, (72, 48), 24)
    assert mlp.fc1.out_features == mlp.fc2.in_features == 144  # 192 - 58, up to a multiple of 16
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_parameters_keep_what_they_are():
    model, _, _ = build("timm vit")
    model.blocks[0].mlp.fc1.requires_grad_(False)
    model = model.to(torch.bfloat16)
    shrink_(model, mlp=0.5)
    assert not model.blocks[0].mlp.fc1.weight.requires_grad and model.blocks[0].mlp.fc2.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["timm vit", "timm dinov2 swiglu", "transformers vit", "torchvision vit"])
def test_it_composes_with_patterns_packing_and_files(name, tmp_path):
    model, x, _ = build(name)
    fresh = copy.deepcopy(model)
    plan = shrink_(model, 0.25, 0.25, calibration=x)
    again = ShrinkPlan.from_json(plan.to_json())
    assert again == plan and str(again) == str(plan)
    pruned = prune_(model, 0.5, "row", "4x1")
    pruned.verify(model)
    y = run(model, x)

    save_dense(model, tmp_path / "dense.safetensors", pruned.to_json(), plan.to_json())
    loaded = copy.deepcopy(fresh)
    load_state_(loaded, tmp_path / "dense.safetensors", name)
    assert torch.equal(run(loaded, x), y)
    load_state_(loaded, tmp_path / "dense.safetensors", name)  # into a model that is as small already
    pruned.verify(loaded)

    pack_(model, x, timer=timer(["block", "bitmask", "kernel"]))
    packed = run(model, x)
    assert close(packed, y) and any(isinstance(module, PackedLinear) for module in model.modules())
    save(model, tmp_path / "packed.safetensors", pruned, plan)
    for target in (copy.deepcopy(fresh), loaded):
        assert torch.equal(run(load(tmp_path / "packed.safetensors", target), x), packed)
    unpack_(model)
    assert close(run(model, x), y)


def test_a_packed_file_loads_into_a_model_on_the_meta_device(tmp_path):
    model, x, _ = build("timm vit")
    plan = shrink_(model, 0.25, 0.25)
    pack_(model, x, timer=timer(["block", "bitmask", "kernel"]))
    save(model, tmp_path / "m.safetensors", None, plan)
    with torch.device("meta"):
        empty = timm_vit().eval()
    assert torch.equal(run(load(tmp_path / "m.safetensors", empty), x), run(model, x))


def test_files_of_another_model_change_nothing(tmp_path):
    model, x, _ = build("timm vit")
    other = timm_vit(embed_dim=96).eval()
    plan = shrink_(model, 0.25, 0.25)
    save_dense(model, tmp_path / "dense.safetensors", None, plan.to_json())
    pack_(model, x, timer=timer(["block", "bitmask", "kernel"]))
    save(model, tmp_path / "packed.safetensors", None, plan)
    before = state(other)
    message = (
        r"blocks.0.mlp \(mlp\): expected 192 units to remove 48 of, got 384 units; give the architecture as it was"
    )
    for call in (
        lambda m: load_state_(m, tmp_path / "dense.safetensors", "other"),
        lambda m: load(tmp_path / "packed.safetensors", m),
        plan.apply_,
    ):
        with pytest.raises(ValueError, match=message):
            call(other)
        assert unchanged(other, before)
    # the same blocks and another head: cut, refused, and taken back
    more = timm_vit(num_classes=7).eval()
    before = state(more)
    for file, call in (("dense", lambda p: load_state_(more, p, "more")), ("packed", lambda p: load(p, more))):
        with pytest.raises(ValueError, match=r"(head is|head.weight)"):
            call(tmp_path / f"{file}.safetensors")
        assert unchanged(more, before) and more.blocks[0].attn.num_heads == 4


class Unreadable(nn.Module):
    """An MLP whose middle is of a fixed width, and an attention that takes two inputs."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.norm, self.mlp.fc2 = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.ffn = nn.Sequential()
        self.ffn.fc1, self.ffn.act, self.ffn.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x + self.mlp(x) + self.ffn(x))


def test_what_cannot_be_understood_stays_whole_with_a_reason():
    model = Unreadable().eval()
    plan = shrink_(model, 0.5)
    assert [block.name for block in plan.blocks] == ["ffn"] and model.ffn.fc1.out_features == 16
    assert "trying a smaller copy failed (RuntimeError: " in plan.left["mlp (mlp)"]
    assert model.mlp.fc1.out_features == 32 and "left whole: mlp (mlp): trying a smaller copy" in str(plan)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=16, num_heads=(1, 2), img_size=56
    ).eval()
    plan = shrink_(swin, mlp=0.5, heads=0.5)
    assert [block.kind for block in plan.blocks] == ["mlp", "mlp"] and len(plan.left) == 2
    eva = timm.create_model("eva02_tiny_patch14_224", **{**TIMM, "img_size": 28})  # qkv takes its biases from elsewhere
    assert len(find_blocks(eva, ["heads"])[1]) == 2


class Other(nn.Module):
    """Looks like a gated MLP, and its output is no function of the product alone."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden.softmax(-1))


def test_a_block_that_mixes_its_units_is_not_cut():
    model = nn.ModuleDict({"mlp": Other()})
    found, left = find_blocks(model)
    assert found == [] and left == {"mlp (mlp)": "a smaller copy computed something else"}
    with pytest.raises(
        ValueError, match=r"nothing to remove from 0 blocks.*mlp .mlp.: a smaller copy computed something"
    ):
        shrink_(model, 0.5)


def test_rows_by_unit_are_recognised():
    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, 4)).permute(2, 0, 3, 1, 4) if x.ndim == 2 else (
                self.qkv(x).unflatten(-1, (self.num_heads, 3, 4)).permute(3, 0, 2, 1, 4)
            )  # fmt: skip
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"attn": Interleaved()}))
    ((block,), left) = find_blocks(model)
    assert block.by_unit and left == {} and (block.units, block.size) == (4, 4)
    assert block.rows(torch.tensor([1]), 48).tolist() == list(range(12, 24))


def test_ignored_blocks_stay_whole():
    model, x, _ = build("timm vit")
    plan = shrink_(model, 0.5, 0.5, x, ignore=("blocks.0.*",))
    assert {block.name.split(".")[1] for block in plan.blocks} == {"1"}
    assert plan.left["blocks.0.mlp (mlp)"] == "ignore= names a weight of it"
    assert model.blocks[0].attn.num_heads == 4 and model.blocks[1].attn.num_heads == 2


@pytest.mark.parametrize("where", ["cut", "compare", "choose", "model"])
def test_failures_leave_the_model_as_it_was(where, monkeypatch):
    model, x, _ = build("torchvision vit")
    before, modules = state(model), {name: id(module) for name, module in model.named_modules()}
    modes = [module.training for module in model.train().modules()]
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise OSError("injected")
        return original(*args, **kwargs)

    if where == "cut":
        found = find_blocks(model)  # which makes some, too
        original = blocks_module.FewerHeads
        monkeypatch.setattr(shrinking, "find_blocks", lambda *_: found)
        monkeypatch.setattr(blocks_module, "FewerHeads", fail)
    elif where == "compare":
        original, calls = shrinking._compare, [1]
        monkeypatch.setattr(shrinking, "_compare", fail)
    elif where == "choose":
        original = shrinking.remove_units
        monkeypatch.setattr(shrinking, "remove_units", fail)
    else:
        x = [x[:4], torch.randn(2, 3, 5, 5)]
    with pytest.raises((OSError, ValueError), match=r"injected|Wrong image"):
        shrink_(model, 0.5, 0.25, x)
    assert unchanged(model, before) and [module.training for module in model.modules()] == modes
    assert {name: id(module) for name, module in model.named_modules()} == modules


def test_a_model_that_reads_what_was_cut_elsewhere_is_refused_and_restored():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential()
            self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.mlp(x)) * self.mlp.fc1.weight.square().sum()

    model = Reads().eval()
    before = state(model)
    with pytest.raises(
        ValueError, match=r"output differs by .* something else reads what was cut, so name it in ignore"
    ):
        shrink_(model, 0.5, calibration=torch.randn(40, 16))
    assert unchanged(model, before) and model.mlp.fc1.out_features == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "mlp and heads are both 0, so nothing would go"),
        ({"mlp": 1.0}, ValueError, r"mlp: expected a share in \[0, 1\), got 1.0"),
        ({"heads": -0.5}, ValueError, r"heads: expected a share in \[0, 1\), got -0.5"),
        ({"mlp": "half"}, TypeError, "mlp: expected a number, got str"),
        ({"mlp": True}, TypeError, "mlp: expected a number, got bool"),
        ({"mlp": 0.5, "multiple": 0}, ValueError, "multiple: expected an integer of at least 1, got 0"),
        (
            {"mlp": 0.01},
            ValueError,
            "nothing to remove from 2 blocks; ask for more .hidden features stay in multiples of",
        ),
        ({"heads": 0.1}, ValueError, "nothing to remove from 2 blocks"),
        ({"mlp": 0.5, "calibration": []}, ValueError, "calibration: expected at least one image, got none"),
        (
            {"mlp": 0.5, "calibration": 5},
            TypeError,
            "calibration: expected a tensor or an iterable of batches, got int",
        ),
        ({"mlp": 0.5, "calibration": torch.full((2, 3, 32, 32), float("nan"))}, ValueError, "have NaN or Inf"),
        ({"mlp": 0.5, "ignore": "nothing.*"}, ValueError, "ignore='nothing.*' matches no weight"),
    ],
)
def test_nonsense_is_refused(options, error, message):
    model, _, _ = build("timm vit")
    before = state(model)
    with pytest.raises(error, match=message):
        shrink_(model, **options)
    assert unchanged(model, before)


def test_models_that_cannot_be_shrunk_are_refused():
    model, _, _ = build("timm vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.weight has NaN or Inf entries"):
        shrink_(model, 0.5)
    with torch.device("meta"):
        empty = timm_vit()
    with pytest.raises(ValueError, match="is a meta tensor without values"):
        shrink_(empty, 0.5)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        shrink_(3, 0.5)
    with pytest.raises(ValueError, match=r"wrap it in nn.Sequential"):
        shrink_(nn.MultiheadAttention(16, 4, batch_first=True), heads=0.5)
    packed = nn.ModuleDict({"mlp": Other()}).eval()
    packed["mlp"].fc1 = PackedLinear.__new__(PackedLinear)
    nn.Module.__init__(packed["mlp"].fc1)
    with pytest.raises(PackedModelError, match="is packed"):
        shrink_(packed, 0.5)
    tied = Unreadable().eval()
    tied.mlp.fc2.weight = tied.ffn.fc2.weight
    assert find_blocks(tied)[1]["mlp (mlp)"] == "mlp.fc2.weight is tied"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"blocks": 3}', '{"mlp": 0, "heads": 0, "blocks": [{"name": "a"}], "parameters": [1, 2]}'],
)
def test_a_damaged_plan_is_refused(text):
    with pytest.raises(ValueError, match="not the JSON of a ShrinkPlan"):
        ShrinkPlan.from_json(text)


def test_a_plan_is_checked():
    for removed in ((4,), (-1,), (1, 0), (1, 1), (0, 1, 2, 3)):
        with pytest.raises(ValueError, match="expected ascending units below 4, not all, got"):
            BlockPlan("a", "mlp", 4, removed)
    with pytest.raises(TypeError, match="expected a name, 'mlp' or 'heads', and integers"):
        BlockPlan("a", "conv", 4, ())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fewer_heads_behaves_as_multihead_attention(batch_first, bias):
    torch.manual_seed(1)
    source = nn.MultiheadAttention(24, 4, batch_first=batch_first, bias=bias).double().eval()
    if bias:
        nn.init.normal_(source.in_proj_bias)
        nn.init.normal_(source.out_proj.bias)
    whole = FewerHeads(source, torch.arange(4))
    x, y, z = (torch.randn(2, 2, 24, dtype=torch.float64) for _ in range(3))
    boolean = torch.tensor([[False, True], [False, False]])
    floats = torch.randn(2, 2, dtype=torch.float64)
    for inputs in ((x, x, x), (x, y, z), (x[0], x[0], x[0])):
        masks = [None, boolean, floats]
        for mask in masks:
            for padding in (None, boolean if inputs[0].ndim == 3 else boolean[0]):
                for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
                    given = {"attn_mask": mask, "key_padding_mask": padding, **options}
                    wanted, found = source(*inputs, **given), whole(*inputs, **given)
                    torch.testing.assert_close(found[0], wanted[0])
                    assert (found[1] is None) == (wanted[1] is None)
                    if found[1] is not None:
                        torch.testing.assert_close(found[1], wanted[1])
    with pytest.raises(ValueError, match=r"attn_mask: expected .Tq, Tk., got one for each head"):
        whole(x, x, x, attn_mask=torch.zeros(8, 2, 2))
    with pytest.raises(ValueError, match="with one in_proj_weight, no bias_k"):
        FewerHeads(nn.MultiheadAttention(24, 4, add_bias_kv=True), torch.arange(2))


def test_it_stands_in_pytorchs_own_encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    model = nn.Sequential(layer)
    plan = shrink_(model, heads=0.25, calibration=x)
    assert [block.name for block in plan.blocks] == ["0.self_attn"] and isinstance(layer.self_attn, FewerHeads)
    assert run(model, x).shape == (2, 5, 32)


def small_demo():
    torch.manual_seed(0)
    return timm_vit()


def test_command_line(tmp_path, capsys, monkeypatch):
    spec = "tests.test_shrinking:small_demo"
    file = tmp_path / "small.safetensors"
    assert main(["shrink", spec, "--mlp", "0.5", "--heads", "0.25", "-o", str(file)]) == 0
    assert "blocks.1.attn" in capsys.readouterr().out
    assert main(["shrink", spec, "--mlp", "0.5", "-o", str(tmp_path / "again.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["mlp"] == 0.5
    fine = ["shrink", spec, "--mlp", "0.3", "--multiple", "1", "-o", str(tmp_path / "fine.safetensors"), "--json"]
    assert main(fine) == 0
    blocks = json.loads(capsys.readouterr().out)["plan"]["blocks"]
    assert all(len(block["removed"]) == round(0.3 * block["units"]) for block in blocks)
    pruned = tmp_path / "pruned.safetensors"
    arguments = ["prune", spec, "--checkpoint", str(file), "--sparsity", "0.5", "-o", str(pruned)]
    assert main(arguments) == 0
    model = small_demo()
    load_state_(model, pruned, spec)
    assert model.blocks[0].mlp.fc1.out_features == 96 and model.blocks[0].attn.num_heads == 3
    capsys.readouterr()
    assert main(["shrink", spec, "--checkpoint", str(file), "--mlp", "0.5", "-o", str(pruned)]) == 2
    assert "it was made smaller already" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / "model.safetensors")  # what travels is found in a folder too
    assert main(["shrink", spec, "--checkpoint", str(tmp_path / "folder"), "-o", str(pruned)]) == 2
    assert "it was made smaller already" in capsys.readouterr().err
    assert main(["shrink", spec, "-o", str(pruned)]) == 2
    assert "mlp and heads are both 0" in capsys.readouterr().err
