"""time_patterns: names, shapes and measured times of a model's linears, by an injected timer and for real."""

import pytest
import torch
from torch import nn

from rmtkern.models import prunable_weights
from rmtkern.pattern_timing import time_patterns
from tests.test_api import IMAGES, MODELS


def timer(calls, budget_ms):
    """Runs every call once; dense forms take 4 ms, sparse ones the rest of their sparsity in ms, block half of it."""
    for call in calls.values():
        call()

    def cost(label):
        if "dense/" in label:
            return 4.0
        return (1 - float(label.split(" ")[1])) * (0.5 if "block" in label else 1.0)

    return {label: cost(label) for label in calls}


@pytest.mark.parametrize("name", ["timm vit", "hf vit", "torchvision vit", "timm swin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_that_is_pruned_by_default_has_times(name, dtype):
    model = MODELS[name]().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    times = time_patterns(
        model, IMAGES, ("unstructured", "2:4", "4x2"), sparsities=(0.5, 0.7), dtype=dtype, timer=timer
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == [type(module) for module in MODELS[name]().modules()]
    for weight in prunable_weights(model):
        layer = times.of(weight.name)
        assert layer.shape == weight.shape and layer.dense_ms == 4.0 * (layer.dense_ms // 4)
        assert set(layer.ms["unstructured"]) <= {0.5, 0.7} and 0.7 in layer.ms["unstructured"]  # what saves memory
        assert set(layer.ms.get("2:4", [0.5])) == {0.5}
    assert times.dtype == str(dtype).removeprefix("torch.") and times.threads == torch.get_num_threads() and times.cpu


def test_kinds_differ_by_what_changes_their_time():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 7)).eval()
    times = time_patterns(model, torch.randn(5, 64), ["4x1"], sparsities=[0.9], timer=timer)
    assert [layer.names for layer in times.layers] == [("0.weight",), ("2.weight", "3.weight"), ("4.weight",)]
    assert times.layers[2].ms == {}  # 7 outputs are not divisible by 4
    assert times.layers[0].ms["4x1"][0.9] == pytest.approx(0.05)


def test_a_real_measurement():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    times = time_patterns(model, torch.randn(4, 64), sparsities=[0.9], budget_ms=5)
    assert all(0 < layer.at(pattern, 0.9) < 1e3 for layer in times.layers for pattern in ("unstructured", "4x2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["3-4"]}, "unknown pattern '3-4'"),
        ({"patterns": []}, "patterns and dtypes: expected at least one of each"),
        ({"sparsities": [1.0]}, "sparsities: expected 0 <= sparsity < 1, got 1.0"),
        ({"dtype": torch.float16}, r"dtypes: expected torch.float32 or torch.bfloat16, got torch\.float16"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        time_patterns(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8), **options)
