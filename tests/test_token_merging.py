"""merge_tokens_: against a NumPy reference in float64, taken back bit for bit, and beside every other verb."""

import copy
import io
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import rmtkern
from rmtkern.demo.model import DemoViT
from rmtkern.errors import PackedModelError
from rmtkern.token_merging import bipartite_merge, merge_tokens_, merging_of, unmerge_tokens_

F64 = torch.float64
DEPTH, HEADS, WIDTH = 3, 2, 32
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def vit(name="vit_tiny_patch16_224", seed=0, **options):
    """17 tokens (16 patches, a class token) and weights large enough that tokens differ."""
    torch.manual_seed(seed)
    sizes = {"img_size": 64, "depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 5}
    model = timm.create_model(name, **{**sizes, **options}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- the reference: NumPy, float64, one image and one token at a time -------------------------------------------------


def merge_reference(x, size, keys, r, protected):
    """One image: x [T, D], size [T], keys [T, d] -> what is left, and where each token went."""
    count = len(x)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    pairs = []
    for a in range(0, count, 2):
        if a < protected:
            continue
        b = max((b for b in range(1, count, 2) if b >= protected), key=lambda b: unit[a] @ unit[b])
        pairs.append((unit[a] @ unit[b], a, b))
    pairs.sort(key=lambda pair: -pair[0])
    into = {a: b for _, a, b in pairs[:r]}
    order = list(range(protected))
    order += [a for a in range(0, count, 2) if a >= protected and a not in into]
    order += [b for b in range(1, count, 2) if b >= protected]
    parts = {token: [token, *(a for a, b in into.items() if b == token)] for token in order}
    sizes = np.array([size[parts[token]].sum() for token in order])
    values = np.stack([(size[parts[token], None] * x[parts[token]]).sum(0) for token in order]) / sizes[:, None]
    place = np.array([order.index(into.get(token, token)) for token in range(count)])
    return values, sizes, place


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def vit_reference(model, images, r, pool="token"):
    """Logits [B, 5] and the number of tokens after each block."""
    w = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    logits, counts = [], []
    for image in images.double().numpy():
        patches = image.reshape(3, 4, 16, 4, 16).transpose(1, 3, 0, 2, 4).reshape(16, -1)
        x = patches @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
        x = np.concatenate([w["cls_token"][0], x]) + w["pos_embed"][0]
        size, counts = np.ones(len(x)), []
        for index in range(DEPTH):
            b = {name.removeprefix(f"blocks.{index}."): value for name, value in w.items()}
            y = layer_norm(x, b["norm1.weight"], b["norm1.bias"]) @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
            q, k, v = y.reshape(len(x), 3, HEADS, -1).transpose(1, 2, 0, 3)  # [H, T, d]
            scores = q @ k.transpose(0, 2, 1) / math.sqrt(WIDTH // HEADS) + np.log(size)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            y = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), -1)
            x = x + y @ b["attn.proj.weight"].T + b["attn.proj.bias"]
            gone = min(r, (len(x) - 1) // 2)
            if gone:
                x, size, _ = merge_reference(x, size, k.mean(0), gone, 1)
            y = layer_norm(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
            x = x + gelu(y) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
            counts.append(len(x))
        if pool == "token":
            x = layer_norm(x, w["norm.weight"], w["norm.bias"])[0]
        else:  # over what the tokens stand for
            x = (size[1:, None] * x[1:]).sum(0) / size[1:].sum()
            x = layer_norm(x, w["fc_norm.weight"], w["fc_norm.bias"])
        logits.append(x @ w["head.weight"].T + w["head.bias"])
    return np.stack(logits), counts


@pytest.mark.parametrize(("tokens", "protected", "r"), [(17, 1, 3), (17, 1, 8), (16, 0, 8), (6, 3, 1), (18, 2, 5),
                                                        (21, 5, 8), (5, 2, 1), (2, 0, 1)])  # fmt: skip
@pytest.mark.parametrize("sized", [False, True])
def test_one_merge_is_the_reference(tokens, protected, r, sized):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(4, tokens, 7, dtype=F64, generator=generator)
    keys = torch.randn(4, tokens, 5, dtype=F64, generator=generator)
    size = torch.randint(1, 6, (4, tokens), generator=generator).double() if sized else None
    y, after, place = bipartite_merge(x, size, keys, r, protected)
    assert y.shape == (4, tokens - r, 7)
    for i in range(4):
        ones = np.ones(tokens) if size is None else size[i].numpy()
        values, sizes, places = merge_reference(x[i].numpy(), ones, keys[i].numpy(), r, protected)
        np.testing.assert_allclose(y[i].numpy(), values, rtol=1e-12, atol=1e-13)
        assert (after[i].numpy() == sizes).all() and (place[i].numpy() == places).all()
        assert sizes.sum() == ones.sum() and (place[i][:protected] == torch.arange(protected)).all()


@pytest.mark.parametrize("r", [1, 3, 100])
def test_a_model_is_the_reference(r):
    model = vit().double()
    wanted, counts = vit_reference(model, X, r)
    made = merge_tokens_(model, r)
    assert (made.r, made.protected, made.restore) == (r, 1, False) and merging_of(model) == made
    assert made.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert str(made) == f"3 blocks merge {r} tokens each, not the first 1"
    np.testing.assert_allclose(run(model, X.double()).numpy(), wanted, rtol=1e-10, atol=1e-10)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    assert run(model, X.double()).shape == (3, 5) and seen == counts
    assert counts == {1: [16, 15, 14], 3: [14, 11, 8], 100: [9, 5, 3]}[r]
    assert model.forward_features(X.double()).shape[1] == counts[-1]


def test_float32_and_bfloat16_lie_near_float64():
    model = vit()
    wanted, _ = vit_reference(model, X, 3)
    merge_tokens_(model, 3)
    np.testing.assert_allclose(run(model).numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert run(model.bfloat16(), X.bfloat16()).dtype == torch.bfloat16


def test_nothing_merged_is_the_same_bits_and_so_is_taking_back():
    model = vit()
    before, values = run(model), state(model)
    kinds = [type(module) for module in model.modules()]
    merge_tokens_(model, 0)
    assert torch.equal(run(model), before)
    with pytest.raises(ValueError, match=r"the model merges tokens already; call rmtkern.unmerge_tokens_"):
        merge_tokens_(model, 2)
    assert unmerge_tokens_(model) == DEPTH
    merge_tokens_(model, 4)
    assert not torch.equal(run(model), before) and list(model.state_dict()) == list(values)
    assert unmerge_tokens_(model) == DEPTH and unmerge_tokens_(model) == 0 and merging_of(model) is None
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(run(model), before) and all(torch.equal(v, values[n]) for n, v in model.state_dict().items())


def test_a_mean_over_tokens_counts_what_they_stand_for():
    model = vit("vit_tiny_patch16_224", global_pool="avg").double()
    wanted, _ = vit_reference(model, X, 3, pool="avg")
    assert merge_tokens_(model, 3).restore
    np.testing.assert_allclose(run(model, X.double()).numpy(), wanted, rtol=1e-10, atol=1e-10)
    assert model.forward_features(X.double()).shape[1] == 17


def test_restoring_changes_no_class_token():
    model, other = vit(), vit()
    merge_tokens_(model, 3)
    assert "then back in every place" in str(merge_tokens_(other, 3, restore=True))
    assert torch.allclose(run(model), run(other), rtol=1e-5, atol=1e-6)
    features = other.forward_features(X)
    assert features.shape[1] == 17 and len({tuple(row) for row in features[0].tolist()}) == 17 - 9


@pytest.mark.parametrize(
    ("name", "options", "protected"),
    [
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5),
        ("vit_base_patch16_clip_224", {}, 1),
        ("deit3_small_patch16_224", {"init_values": 0.5}, 1),
        ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "attn_layer": "attn"}, 1),
        ("vit_base_patch16_siglip_224", {}, 0),
    ],
)
def test_further_models_of_timm(name, options, protected):
    size = options.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    model = vit(name, **options)
    before = run(model, x)
    assert merge_tokens_(model, 0).protected == protected
    assert torch.allclose(run(model, x), before, rtol=1e-5, atol=1e-6)
    unmerge_tokens_(model)
    merge_tokens_(model, 3)
    seen = []
    model.blocks[-1].mlp.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    assert run(model, x).shape == before.shape and seen == [16 + protected - 9]


HF = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH,
      "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6, "num_labels": 5}  # fmt: skip


def transformers_vit(source):
    """The same model as transformers has it."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF)).eval()
    given, values = source.state_dict(), {}
    for name, old in (("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed")):
        values[f"vit.{name}"] = given[old]
    pairs = [("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"), ("vit.layernorm", "norm"),
             ("classifier", "head")]  # fmt: skip
    for i in range(DEPTH):
        for new, old in (("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj"),
                         ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # fmt: skip
            pairs.append((f"vit.layers.{i}.{new}", f"blocks.{i}.{old}"))
        for key in ("weight", "bias"):
            parts = given[f"blocks.{i}.attn.qkv.{key}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                values[f"vit.layers.{i}.attention.{letter}_proj.{key}"] = part
    values |= {f"{new}.{key}": given[f"{old}.{key}"] for new, old in pairs for key in ("weight", "bias")}
    model.load_state_dict(values)
    return model


def test_a_model_of_transformers_is_the_reference():
    source = vit()
    wanted, counts = vit_reference(source, X, 3)
    model = transformers_vit(source).double()
    before = run(model, X.double()).logits
    assert torch.allclose(before, run(source.double(), X.double()))
    with pytest.raises(ValueError, match="protected: the model does not say"):
        merge_tokens_(model, 3)
    assert merge_tokens_(model, 3, protected=1).blocks == ("vit.layers.0", "vit.layers.1", "vit.layers.2")
    seen = []
    model.vit.layers[-1].mlp.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    with torch.no_grad():
        found = model(X.double(), output_hidden_states=True, output_attentions=True)
    assert [tuple(part.shape[1:]) for part in found.hidden_states] == [(t, WIDTH) for t in (17, 14, 11, 17)]
    assert not found.attentions  # and not the keys
    np.testing.assert_allclose(found.logits.numpy(), wanted, rtol=1e-10, atol=1e-10)
    assert seen == counts[-1:]
    assert unmerge_tokens_(model) == DEPTH and torch.equal(run(model, X.double()).logits, before)


def test_a_model_of_transformers_is_packed():
    model = transformers_vit(vit())
    rmtkern.prune_(model, 0.7)
    merge_tokens_(model, 3, protected=1)
    wanted = run(model).logits
    report = rmtkern.pack_(model, X, timer=cheap)
    assert report.packed_layers == 6 * DEPTH and sum(site.used for site in report.attention) == DEPTH
    assert torch.allclose(run(model).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_demo_model():
    torch.manual_seed(0)
    model, x = DemoViT(32, 2, 2).eval(), torch.rand(4, 1, 28, 28)
    with pytest.raises(ValueError, match=r"protected: the model does not say .* pass protected=1 for a class token"):
        merge_tokens_(model, 4)
    before = run(model, x)
    made = merge_tokens_(model, 4, protected=0)
    assert made.restore and not torch.allclose(run(model, x), before)


def test_gradients_are_those_of_the_weighted_means():
    x = torch.randn(2, 9, 3, dtype=F64, requires_grad=True)
    keys, size = torch.randn(2, 9, 4, dtype=F64), torch.rand(2, 9, dtype=F64) + 0.5
    assert torch.autograd.gradcheck(lambda x: bipartite_merge(x, size, keys, 3, 1)[0], x)
    model = vit(drop_path_rate=0.5, attn_drop_rate=0.1, proj_drop_rate=0.1).train()
    merge_tokens_(model, 3)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (model.blocks[2].attn.qkv.weight.grad != 0).any() and (model.patch_embed.proj.weight.grad != 0).any()


def test_gradients_with_checkpointing_are_the_same():
    model = vit().train()
    merge_tokens_(model, 3)
    model(X).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(X).square().sum().backward()
    assert all(torch.equal(p.grad, other) for p, other in zip(model.parameters(), wanted, strict=True))


def test_copies_and_pickles():
    model = vit()
    merge_tokens_(model, 3)
    wanted = run(model)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(run(other), wanted) and merging_of(other) == merging_of(model)
        assert unmerge_tokens_(other) == DEPTH
    assert merging_of(model) is not None and torch.equal(run(copied), run(vit()))


def test_pruning_before_and_after_is_the_same():
    one, other = vit(), vit()
    plan = rmtkern.prune_(one, 0.5)
    merge_tokens_(one, 3)
    merge_tokens_(other, 3)
    assert rmtkern.prune_(other, 0.5).to_json() == plan.to_json()
    assert torch.equal(run(one), run(other))
    plan.verify(unmerged := copy.deepcopy(one))
    unmerge_tokens_(unmerged)
    plan.verify(unmerged)


def test_calibrated_pruning_sees_the_tokens_that_are_left():
    images = torch.randn(24, 3, 64, 64)
    for method in ("wanda", "obs"):
        plain, model = vit(), vit()
        merge_tokens_(model, 4)
        plans = [rmtkern.prune_(one, 0.5, method, calibration=images) for one in (plain, model)]
        plans[1].verify(model)
        assert not torch.equal(plain.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
    permuted, before = vit(), vit()
    merge_tokens_(permuted, 4)
    merge_tokens_(before, 4)
    rmtkern.prune_(permuted, 0.0, "sensitivity", "4x1", calibration=images, permute=True)
    assert not torch.equal(permuted.blocks[2].mlp.fc1.weight, before.blocks[2].mlp.fc1.weight)
    assert torch.allclose(run(permuted), run(before), rtol=1e-4, atol=1e-4)


def test_shrinking():
    images = torch.randn(24, 3, 64, 64)
    model, other = vit(), vit()
    merge_tokens_(model, 4)
    before = state(model)
    for calibration in (images, None):
        with pytest.raises(ValueError, match=r"by the keys of all of its heads; call rmtkern.unmerge_tokens_\(model\)"):
            rmtkern.shrink_(model, heads=0.5, calibration=calibration)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made = rmtkern.shrink_(model, mlp=0.25, calibration=images)
    assert len(made.blocks) == DEPTH and not made.left and run(model).shape == (3, 5)
    rmtkern.shrink_(other, mlp=0.25, heads=0.5)
    merge_tokens_(other, 4)
    assert other.blocks[0].attn.num_heads == 1 and run(other).shape == (3, 5)


@pytest.mark.parametrize("targets", [("attn_out",), ("attn", "mlp")])
def test_batches_that_wait_for_each_other_do_not_mix_their_tokens(targets):
    model = vit()
    merge_tokens_(model, 4)
    images = torch.randn(70, 3, 64, 64)  # three batches
    once = copy.deepcopy(model)
    rmtkern.prune_(model, 0.5, "obs", targets=targets, calibration=images)
    rmtkern.prune_(once, 0.5, "obs", targets=targets, calibration=[images])
    for (name, value), other in zip(model.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(value == 0, other == 0), name
        # the least squares stop at 1e-3 of the energy of the outputs, each sum in another order
        assert torch.allclose(value, other, rtol=1e-2, atol=3e-3), name


def test_fine_tuning_keeps_the_zeros_and_learns():
    model = vit()
    plan = rmtkern.prune_(model, 0.6)
    merge_tokens_(model, 3)
    x, y = torch.randn(40, 3, 64, 64), torch.randint(0, 5, (40,))
    before = rmtkern.evaluate(model, (x, y)).loss
    config = rmtkern.FinetuneConfig(epochs=4, batch_size=20, lr=1e-3, holdout=0.0)
    rmtkern.finetune_(model, plan, (x, y), config=config, show_progress=False)
    assert rmtkern.evaluate(model, (x, y)).loss < before and merging_of(model) is not None
    plan.verify(model)


def cheap(calls, budget_ms):
    """Sparse forms and the packed model win, without time."""
    for call in calls.values():
        call()
    return {name: 1.0 if name in ("packed", "bitmask") or name.endswith("/kernel") else 2.0 for name in calls}


def test_packing_after_saving_and_loading(tmp_path):
    model = vit()
    plan = rmtkern.prune_(model, 0.7)
    merge_tokens_(model, 3)
    wanted = run(model)
    report = rmtkern.pack_(model, X, timer=cheap)
    tokens = [layer.tokens for layer in report.layers if layer.name.endswith(("qkv", "fc1"))]
    assert tokens == [(3 * t,) for t in (17, 14, 14, 11, 11, 8)]  # attention before, MLP after each merge
    assert all(layer.packed for layer in report.layers if "blocks" in layer.name)
    assert [site.used for site in report.attention] == [True] * DEPTH
    assert torch.allclose(run(model), wanted, rtol=1e-4, atol=1e-4)
    for verb in (lambda: merge_tokens_(model, 2), lambda: unmerge_tokens_(model)):
        with pytest.raises(PackedModelError, match=r"packed for the tokens that it has now; call rmtkern.unpack_"):
            verb()
    path = tmp_path / "packed.safetensors"
    rmtkern.save(model, path, plan)
    with torch.device("meta"):
        empty = vit()
    merged = vit(seed=1)
    merge_tokens_(merged, 3)
    for fresh in (vit(seed=1), merged, empty):
        assert torch.equal(run(rmtkern.load(path, fresh)), run(model))
        assert merging_of(fresh) == merging_of(model)
    rmtkern.unpack_(model)
    assert torch.equal(run(model), wanted) and unmerge_tokens_(model) == DEPTH


def test_a_file_and_a_model_that_merge_differently(tmp_path):
    path = tmp_path / "packed.safetensors"
    model = vit()
    rmtkern.prune_(model, 0.7)
    rmtkern.pack_(model, X, timer=cheap)
    rmtkern.save(model, path)
    other = vit()
    merge_tokens_(other, 2)
    with pytest.raises(ValueError, match=r"the model merges 2 tokens .* and the one in the file merges none; call"):
        rmtkern.load(path, other)
    rmtkern.unpack_(model)
    merge_tokens_(model, 3)
    rmtkern.pack_(model, X, timer=cheap)
    rmtkern.save(model, path)
    with pytest.raises(ValueError, match=r"the model merges 2 tokens .* the one in the file 3 .*; call rmtkern."):
        rmtkern.load(path, other)
    assert merging_of(other).r == 2
    another = vit(embed_dim=48)
    before = state(another)
    with pytest.raises(ValueError, match="give the model that was packed"):
        rmtkern.load(path, another)
    assert merging_of(another) is None and all(torch.equal(v, before[n]) for n, v in another.state_dict().items())


def test_packing_first_is_refused_before_anything_changes():
    model = vit()
    rmtkern.prune_(model, 0.7)
    rmtkern.pack_(model, X, timer=cheap)
    before = run(model)
    with pytest.raises(PackedModelError, match=r"call rmtkern.unpack_"):
        merge_tokens_(model, 3)
    assert torch.equal(run(model), before) and merging_of(model) is None


def test_dynamo_traces_it_whole():
    model = vit()
    merge_tokens_(model, 3)
    wanted = run(model)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(X), wanted, rtol=1e-5, atol=1e-5)


class Reordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(block, nn.Identity()) for block in vit().blocks])

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32), "has no blocks of norm1, attn, norm2"),
        (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**HF)), "has no blocks of norm1"),
        (lambda: vit("beit_base_patch16_224"), r"blocks.0 \(Block\) cannot merge tokens: "),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=16, num_heads=(1, 2)),
         r"layers.0.blocks.0 \(SwinTransformerBlock\) cannot merge tokens: "),
        (lambda: vit("cait_xxs24_224"), r"cannot merge tokens: its attention has|cannot merge tokens: "),
        (lambda: vit(block_fn=timm.models.vision_transformer.ResPostBlock), "it computes something else than"),
        (Reordered, "do not follow each other in one list"),
    ],
)  # fmt: skip
def test_models_that_it_does_not_know_are_refused(make, message):
    model = make().eval()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        merge_tokens_(model, 2, protected=0)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("r", "options", "error", "message"),
    [
        (-1, {}, ValueError, "r: expected at least 0, got -1"),
        (True, {}, TypeError, "r: expected an integer, got bool"),
        (2.0, {}, TypeError, "r: expected an integer, got float"),
        (2, {"protected": -1}, ValueError, "protected: expected at least 0, got -1"),
        (2, {"protected": "one"}, TypeError, "protected: expected an integer, got str"),
    ],
)
def test_nonsense_is_refused(r, options, error, message):
    model = vit()
    with pytest.raises(error, match=message):
        merge_tokens_(model, r, **options)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        merge_tokens_("model", 2)
    assert merging_of(model) is None


def test_sizes_are_never_lost_silently():
    model = vit()
    merge_tokens_(model, 2)
    with pytest.raises(ValueError, match="is not the output of the block before it, so the sizes of its tokens"):
        model.blocks[1](torch.randn(1, 17, WIDTH))
    with pytest.raises(ValueError, match=r"takes no mask; call rmtkern.unmerge_tokens_"):
        model(X, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="takes no mask"):
        model(X, is_causal=True)
