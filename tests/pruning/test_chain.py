"""Stages that hand on their outputs: which models are chains, the same calls as when batches wait, nothing held."""

import copy
import threading
import weakref

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning import layerwise, visit
from rmtkern.pruning.chain import find_chain, visit_chain
from rmtkern.pruning.stages import Stage, find_stages
from rmtkern.pruning.visit import visit_stages
from rmtkern.pruning.waiting import visit_waiting
from tests.test_api import HF, IMAGES, MODELS, Injected, state, unchanged


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertModel(config)


CHAINS = {
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", depth=3, img_size=32, embed_dim=32, num_heads=2, num_classes=7
    ),
    "timm eva02": lambda: timm.create_model(
        "eva02_base_patch14_224", depth=3, img_size=32, patch_size=16, embed_dim=48, num_heads=2
    ),
    "hf vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**{**HF, "num_hidden_layers": 3})),
    "hf clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**HF, "num_hidden_layers": 3})),
    "torchvision vit": lambda: torchvision.models.VisionTransformer(32, 16, 3, 2, 16, 32, num_classes=10),
    "hf bert": bert,
}


def batches(name):
    """Calls of a model with batches of different size; of a text model also of different length."""
    if name != "hf bert":
        return [{"args": (part,)} for part in torch.randn(8, 3, 32, 32).split((3, 4, 1))]
    words = [torch.randint(0, 50, (3, n)) for n in (7, 5)]
    return [{"input_ids": one, "attention_mask": (torch.rand(one.shape) < 0.8).int()} for one in words]


def runs_of(model, calls):
    def run(call):
        call = dict(call)
        return model(*call.pop("args", ()), **call)

    return [lambda call=call: run(call) for call in calls]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_gives_the_calls_that_waiting_batches_give(name):
    model = CHAINS[name]().eval()
    stages, calls, seen = find_stages(model, prunable_weights(model)), batches(name), {}
    assert len(stages) == 3

    def visit_into(found, hand_over):
        def visit(stage, calls):
            found[stage.name] = [stage.module(*call.args, **call.kwargs) for call in calls]
            for weight in stage.weights:
                weight.parameter.mul_(0.9)
            outputs = [stage.module(*call.args, **call.kwargs) for call in calls[:2]]
            found[stage.name, "after"] = outputs
            return list(outputs) if hand_over else None

        return visit

    with torch.no_grad():
        chain = find_chain(stages, runs_of(model, calls)[0])
        assert chain is not None and [stage.name for stage in chain.stages] == [stage.name for stage in stages]
        for way in ("waiting", "chain", "outputs"):
            left, found = [], seen.setdefault(way, {})
            model = CHAINS[name]().eval() if way != "waiting" else model
            if way == "waiting":
                dense = copy.deepcopy(model.state_dict())
                visit_waiting(stages, runs_of(model, calls), visit_into(found, False), left.append)
            else:
                model.load_state_dict(dense)
                stages = find_stages(model, prunable_weights(model))
                chain = find_chain(stages, runs_of(model, calls)[0])
                visit_chain(chain, runs_of(model, calls), visit_into(found, way == "outputs"), left.append)
            assert [stage.name for stage in left] == [stage.name for stage in stages]
    for way in ("chain", "outputs"):
        assert seen[way].keys() == seen["waiting"].keys()
        for key, expected in seen["waiting"].items():
            for one, other in zip(seen[way][key], expected, strict=True):
                one, other = (part[0] if isinstance(part, tuple) else part for part in (one, other))
                assert torch.equal(one, other), (way, key)


def test_outputs_that_were_handed_over_are_not_computed_again():
    model = CHAINS["timm vit"]().eval()
    stages, counts = find_stages(model, prunable_weights(model)), []
    for stage in stages:
        stage.module.register_forward_hook(lambda *_: counts.append(1))
    runs = runs_of(model, batches("timm vit"))
    with torch.no_grad():
        chain = find_chain(stages, runs[0])
        counts.clear()
        visit_chain(chain, runs, lambda stage, calls: [calls[0].args[0]], lambda stage: None)
    assert len(counts) == 2 * 2  # of three batches two, in all stages but the last


def test_only_one_call_for_each_batch_is_held():
    model = CHAINS["timm vit"]().eval()
    held, threads = [], threading.active_count()

    def visit(stage, calls):
        assert all(one() is None for one in held)  # the inputs of the stage before, of all batches
        held[:] = [weakref.ref(call.args[0]) for call in calls]
        assert threading.active_count() == threads

    visit_stages(find_stages(model, prunable_weights(model)), runs_of(model, batches("timm vit")), visit)
    assert len(held) == 3


class Blocks(nn.Module):
    """Two blocks of two linears, with something in between."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))
        self.between = between

    def forward(self, x):
        return self.blocks[1](self.between(self.blocks[0](x)))


class Numbered(nn.Module):
    """Blocks that are told things other than tensors."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, number, other=None):
            return self.b(self.a(x)) * number

    def __init__(self, numbers, others=((), ())):
        super().__init__()
        self.blocks, self.numbers, self.others = nn.ModuleList(self.Block() for _ in numbers), numbers, others

    def forward(self, x):
        for block, number, other in zip(self.blocks, self.numbers, self.others, strict=True):
            x = block(x, number, other=other)
        return x


def tied():
    model = Blocks()
    model.blocks[1][0].weight = model.blocks[0][0].weight
    return model


class Again(Blocks):
    def forward(self, x):
        return self.blocks[0](super().forward(x))


class Skipping(Blocks):
    """Starts at another block, by its input."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else self.blocks[1](x)


@pytest.mark.parametrize("model, chained", [
    (Blocks, True),
    (lambda: Blocks(lambda x: x + 1), False),
    (lambda: Blocks(lambda x: x[:, :]), False),
    (tied, False),
    (Again, False),
    (lambda: Numbered((2, 2), (None, None)), True),
    (lambda: Numbered((2, 2), ([1, "a"], [1, "a"])), True),
    (lambda: Numbered((2, 3), (None, None)), False),
    (lambda: Numbered((2, 2), (None, 1)), False),
    (lambda: Numbered((2, 2), ([1], [1, 2])), False),
    (lambda: Numbered((1, True), (None, None)), False),
])  # fmt: skip
def test_what_is_a_chain(model, chained):
    model = model()
    stages, x = find_stages(model, prunable_weights(model, "all")), torch.randn(3, 4)
    with torch.no_grad():
        assert (find_chain(stages, lambda: model(x)) is not None) == chained
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_a_stage_inside_another_is_no_chain():
    model = Blocks()
    first, last = find_stages(model, prunable_weights(model, "all"))
    block, inner = Stage("blocks.0", first.module, first.weights[:1]), Stage("0", first.module[2], first.weights[1:])
    with torch.no_grad():
        assert find_chain([first, last], lambda: model(torch.randn(2, 4))) is not None
        assert find_chain([block, inner], lambda: model(torch.randn(2, 4))) is None


def test_tensors_that_every_stage_is_given_are_those_of_each_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = Numbered((1, 1)).blocks

        def forward(self, x):
            scale = x.sum(1, keepdim=True)
            for block in self.blocks:
                x = block(x, scale)
            return x

    model, parts, seen = Model(), torch.randn(7, 4).split((3, 4)), []
    visit_stages(find_stages(model, prunable_weights(model, "all")), [lambda part=part: model(part) for part in parts],
                 lambda stage, calls: seen.append([call.args[1] for call in calls]))  # fmt: skip
    for found in seen:
        assert all(torch.equal(one, part.sum(1, keepdim=True)) for one, part in zip(found, parts, strict=True))
    assert len(seen) == 2


def test_a_batch_that_starts_elsewhere_is_refused():
    model, parts = Skipping(), [torch.ones(2, 4), -torch.ones(2, 4)]
    with pytest.raises(ValueError, match=r"some came to blocks.0 and others to blocks.1; give batches that the model"):
        visit_stages(find_stages(model, prunable_weights(model, "all")),
                     [lambda part=part: model(part) for part in parts], lambda *_: None)  # fmt: skip
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("at", ["visit", "leave", "stage"])
def test_a_failure_leaves_no_hook(at):
    model = Blocks()

    def fail(*_):
        raise Injected

    def visit(stage, calls):
        if at == "stage":
            stage.module.register_forward_hook(fail)
        if at == "visit":
            raise Injected

    with pytest.raises(Injected):
        visit_stages(find_stages(model, prunable_weights(model, "all")), [lambda: model(torch.randn(2, 4))] * 2, visit,
                     fail if at == "leave" else lambda stage: None)  # fmt: skip
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["timm vit", "torchvision vit"])
@pytest.mark.parametrize("method", ["auto", "cast"])
def test_the_plan_is_the_same_when_every_batch_waits(name, method, monkeypatch):
    dense = CHAINS[name]()
    plans, models = [], []
    for chained in (True, False):
        if not chained:
            monkeypatch.setattr(visit, "find_chain", lambda stages, run: None)
        models.append(copy.deepcopy(dense))
        plans.append(prune_(models[-1], 0.5, method, "2:4" if method == "cast" else "4x1", calibration=IMAGES))
        plans[-1].verify(models[-1])
    assert [layer.mask_hash for layer in plans[0].layers] == [layer.mask_hash for layer in plans[1].layers]
    assert unchanged(models[0], state(models[1]))


@pytest.mark.parametrize("name", ["timm vit", "timm swin"])  # a chain, and one that waits
@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_while_stages_are_left_changes_nothing(name, at, monkeypatch):
    model = (MODELS | CHAINS)[name]().train()
    before, left = state(model), []
    real = layerwise.Pruned.of

    def fail(mask, matrix=None):
        left.append(matrix is not None)
        if sum(left) == 4 * at:
            raise Injected
        return real(mask, matrix)

    monkeypatch.setattr(layerwise.Pruned, "of", fail)
    with pytest.raises(Injected):
        prune_(model, 0.5, "admm", calibration=IMAGES)
    assert unchanged(model, before) and all(module.training for module in model.modules())
