"""Stages of real models, and passes that stop at each: what is seen, in which order, and that nothing is left."""

import threading

import pytest
import torch
from torch import nn

from rmtkern.models import prunable_weights
from rmtkern.pruning.stages import find_stages
from rmtkern.pruning.visit import visit_stages
from tests.test_api import MODELS


def waiting_threads():
    """Threads of passes that have not ended."""
    return sum(thread.name == "calibration" for thread in threading.enumerate())


STAGES = {
    "timm vit": ["blocks.0"],
    "timm eva02": ["blocks.0"],
    "timm swin": ["layers.0.blocks.0", "layers.1.downsample.reduction", "layers.1.blocks.0"],
    "hf vit": ["vit.layers.0"],
    "hf clip": ["encoder.layers.0"],
    "torchvision vit": ["encoder.layers.encoder_layer_0"],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_real_models_are_their_blocks(name):
    model = MODELS[name]()
    stages = find_stages(model, prunable_weights(model))
    assert {stage.name for stage in stages} <= set(STAGES[name])
    assert [w.name for stage in stages for w in stage.weights] == [w.name for w in prunable_weights(model)]
    everything = find_stages(model, prunable_weights(model, "all"))
    assert len(everything) > len(stages)  # the embedding and the head are stages of their own


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()


def test_every_batch_waits_and_sees_what_was_changed():
    model = small()
    batches = list(torch.randn(5, 3, 4))
    outputs, order = {}, []
    stages = find_stages(model, prunable_weights(model, "all"))

    def visit(stage, calls):
        order.append(stage.name)
        x = torch.cat([call.args[0] for call in calls])
        expected = torch.cat(batches)
        for layer in model[: int(stage.name)]:
            expected = layer(expected)
        assert torch.equal(x, expected)  # the prefix as it was changed so far
        assert not x.requires_grad
        stage.module.weight.data.mul_(0.5)
        stage.module(*calls[0].args, **calls[0].kwargs)  # a stage may be used while the passes wait

    def run(i):
        outputs[i] = model(batches[i])

    visit_stages(stages, (lambda i=i: run(i) for i in range(5)), visit)
    assert order == ["0", "2", "4"]
    with torch.no_grad():
        assert all(torch.equal(outputs[i], model(batch)) for i, batch in enumerate(batches))
    assert waiting_threads() == 0 and all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("at", ["forward", "visit", "input"])
def test_a_failure_leaves_no_thread_and_no_hook(at):
    model = small()

    class Injected(BaseException):
        """Like an interrupt from the keyboard."""

    def fail(*_):
        raise Injected

    if at == "forward":
        model[1].register_forward_hook(fail)
    runs = [lambda: model(torch.randn(3, 4)), lambda: model(torch.randn(3, 5 if at == "input" else 4))]
    with pytest.raises(RuntimeError if at == "input" else Injected):
        visit_stages(
            find_stages(model, prunable_weights(model, "all")), runs, fail if at == "visit" else lambda *_: None
        )
    assert waiting_threads() == 0 and all(not module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_used_twice_is_visited_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    seen = []
    visit_stages(find_stages(model, prunable_weights(model, "all")), [lambda: model(torch.randn(2, 4))],
                 lambda stage, calls: seen.append(calls[0].args[0].shape))  # fmt: skip
    assert seen == [(2, 4)]


class Either(nn.Module):
    """Uses one of two layers, by its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_batches_that_the_model_treats_differently():
    model = Either()
    stages = find_stages(model, prunable_weights(model, "all"))
    runs = [lambda: model(torch.ones(2, 4)), lambda: model(-torch.ones(2, 4))]
    with pytest.raises(
        ValueError, match=r"every batch to run the layers in one order, but some came to a and others to b"
    ):
        visit_stages(stages, runs, lambda *_: None)
    with pytest.raises(ValueError, match=r"no image reached b.weight; add it to ignore="):
        visit_stages(stages, runs[:1], lambda *_: None)
    assert waiting_threads() == 0
