"""The residual stream: found in models of every library, moved without changing what they compute, where it helps."""

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from rmtkern import api
from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning.mixing import losses_of
from rmtkern.pruning.residual import find_stream, permute_stream_
from rmtkern.pruning.sensitivity import sensitivities
from tests.pruning.test_permute import outputs, randomised
from tests.test_api import HF, IMAGES, MODELS, Injected, state, unchanged

FOUND = {
    **MODELS,
    "timm headless": MODELS["timm eva02"],
    "timm dinov2": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", depth=2, img_size=28, embed_dim=32, num_heads=2, num_classes=5
    ),
    "timm eva02": lambda: timm.create_model(
        "eva02_base_patch14_224", depth=1, img_size=32, patch_size=16, embed_dim=48, num_heads=2, num_classes=5
    ),
}
STREAMS = {
    "timm vit": (32, {"qkv", "mlp_in", "head"}, {"embed", "attn_out", "mlp_out"}),
    "timm dinov2": (32, {"qkv", "mlp_in", "head"}, {"embed", "attn_out", "mlp_out"}),
    "timm eva02": (48, {"q", "k", "v", "mlp_in", "mlp_gate", "head"}, {"embed", "attn_out", "mlp_out"}),
    "hf vit": (32, {"q", "k", "v", "mlp_in", "head"}, {"embed", "attn_out", "mlp_out"}),
    "torchvision vit": (16, {"qkv", "mlp_in", "head"}, {"embed", "attn_out", "mlp_out"}),
    "timm headless": None,
    "hf clip": None,  # returns the stream itself
    "timm swin": None,  # blocks of several widths
    "torchvision swin": None,
}


@pytest.mark.parametrize("name", FOUND)
def test_streams_are_found_and_the_model_computes_the_same(name):
    torch.manual_seed(0)
    model = randomised(FOUND[name]())
    x = IMAGES.double()[..., :28, :28] if "dinov2" in name else IMAGES.double()
    weights, before, expected = prunable_weights(model), state(model), outputs(model, x)
    stream = find_stream(model, x)
    assert unchanged(model, before)
    if STREAMS[name] is None:
        costs = sensitivities(model, weights, x)
        assert stream is None and permute_stream_(model, weights, costs, "4x2", 0.5, x) == costs
        assert unchanged(model, before)
        return
    width, readers, writers = STREAMS[name]
    assert stream.width == width
    assert {one.role for one in stream.readers} == readers and {one.role for one in stream.writers} == writers
    if "eva02" in name:
        assert "cls_token" in stream.vectors and "rope.pos_embed" not in stream.vectors  # which has its size by chance
    with torch.no_grad():
        stream.move_(torch.randperm(width), {**dict(model.named_parameters()), **dict(model.named_buffers())})
    assert not unchanged(model, before)
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-10, atol=1e-10)  # float64, other order of sums
    for pattern in ("4x2", "1x2", "4x1", "2:4", "2:4x4"):
        before = state(model)
        costs = permute_stream_(model, weights, sensitivities(model, weights, x), pattern, 0.5, x)
        torch.testing.assert_close(outputs(model, x), expected, rtol=1e-9, atol=1e-9)
        for cost, again in zip(costs.values(), sensitivities(model, weights, x).values(), strict=True):
            torch.testing.assert_close(cost.rows, again.rows, rtol=1e-4, atol=1e-12)  # sums and inverses, reordered
            torch.testing.assert_close(cost.columns, again.columns, rtol=1e-4, atol=1e-12)


def test_a_head_behind_a_pooler_does_not_read_the_stream():
    model = randomised(transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **TEXT)))
    tokens = {"input_ids": torch.randint(0, 20, (4, 6))}
    stream = find_stream(model, [tokens])
    assert "bert.embeddings.word_embeddings.weight" in stream.vectors
    assert {"bert.pooler.dense.weight"} == {one.name for one in stream.readers if one.role == "linear"}
    assert not any(one.role == "head" for one in stream.readers)


TEXT = {key: value for key, value in HF.items() if key not in ("image_size", "patch_size")}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x):
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm(x))))


class Net(nn.Module):
    """Hidden units that read channels of four kinds; `mixed`: the kinds lie apart, else side by side."""

    def __init__(self, mixed, width=32):
        super().__init__()
        self.patch_embed, self.head = nn.Linear(16, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        kinds = torch.arange(width) % 4 if mixed else torch.arange(width) // (width // 4)
        for block in self.blocks:
            for unit in range(64):
                block.mlp.fc1.weight.data[unit, kinds != unit % 4] *= 0.02

    def forward(self, x):
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_model_that_float64_breaks_keeps_its_order(caplog):
    class Narrow(Net):
        def forward(self, x):
            return super().forward(x.float())

    model, x = Narrow(mixed=True).eval(), torch.randn(64, 16)
    before = state(model)
    assert find_stream(model, x) is None and unchanged(model, before)
    assert "the residual stream stays as it is: a float64 copy of the model does not run" in caplog.text


def pair_loss(model, costs):
    return sum(losses_of(costs[one.name].of(one.as_matrix()), "1x2")[one.parameter.numel() // 4]
               for one in prunable_weights(model, "*fc1*"))  # fmt: skip


def test_pairs_of_inputs_lose_less_and_what_helps_nothing_stays():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    model = Net(mixed=True).eval()
    weights = prunable_weights(model, "*fc1*")
    costs = sensitivities(model, weights, x)
    before = pair_loss(model, costs)
    costs = permute_stream_(model, weights, costs, "1x2", 0.5, x)
    assert pair_loss(model, costs) < 0.7 * before
    again = state(model)
    permute_stream_(model, weights, costs, "1x2", 0.5, x)  # as good as it gets, or better
    assert pair_loss(model, sensitivities(model, weights, x)) <= 1.01 * pair_loss(model, costs)
    model.load_state_dict(again)
    worst = copy.deepcopy(model)
    assert permute_stream_(worst, weights, costs, "unstructured", 0.5, x) == costs and unchanged(worst, again)
    model = Net(mixed=False).eval()
    weights = prunable_weights(model)
    costs = {name: type(one)(torch.ones_like(one.rows), torch.ones_like(one.columns))
             for name, one in sensitivities(model, weights, x).items()}  # fmt: skip
    for weight in weights:
        weight.parameter.data.fill_(1.0)  # all orders lose the same
    before = state(model)
    assert permute_stream_(model, weights, costs, "1x2", 0.5, x) == costs and unchanged(model, before)


def test_prune_moves_the_stream_and_can_be_told_not_to(monkeypatch):
    torch.manual_seed(0)
    dense, x = Net(mixed=True).eval(), torch.randn(256, 16)
    lost = {}
    for permute in (False, "blocks", True):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, "sensitivity", "1x2", calibration=x, permute=permute)
        plan.verify(model)
        assert plan.config.permute == permute and plan.sparsity == 0.5
        assert (not torch.equal(model.patch_embed.bias, dense.patch_embed.bias)) == (permute is True)
        lost[permute] = float((model(x) - dense(x)).detach().square().mean())
    assert lost[True] < 0.8 * min(lost["blocks"], lost[False])
    before = state(dense)
    with pytest.raises(ValueError, match="permute: expected True, False, 'blocks' or None, got 'rows'"):
        prune_(dense, 0.5, pattern="1x2", calibration=x, permute="rows")

    def fail(*args, **kwargs):
        assert not unchanged(dense, before)  # it is permuted by now
        raise Injected

    monkeypatch.setattr(api, "make_masks", fail)
    with pytest.raises(Injected):
        prune_(dense, 0.5, pattern="1x2", calibration=x, permute=True)
    assert unchanged(dense, before)
