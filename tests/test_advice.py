"""advise: sums of measured times, by an injected timer; real models; what it refuses."""

import json

import pytest
import timm
import torch
from torch import nn

from rmtkern.advice import Advice, advise


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2, self.odd = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 7)

    def forward(self, x):
        return self.odd(self.fc2(self.act(self.fc1(x))))


def timer(calls, budget_ms):
    """Runs every call once; dense forms take 4 ms (oneDNN 3 ms), sparse ones 1 ms, block 2 ms; the model 20 ms."""
    for call in calls.values():
        call()
    if "original" in calls:
        return {"original": 20.0}
    cost = {"dense/torch": 4.0, "dense/onednn": 3.0}
    return {label: cost.get(label, 4.0 if "dense/" in label else 2.0 if "block" in label else 1.0) for label in calls}


def test_the_sum_of_what_was_measured():
    advice = advise(
        Toy().eval(), torch.randn(5, 64), patterns=["unstructured", "2:4", "4x1"], sparsities=[0.5],
        dtypes=[torch.float32], timer=timer,
    )  # fmt: skip
    rows = {row.pattern: row for row in advice.rows}
    # the rest is 20 - 3 * 4 = 8 ms; dense at its best 8 + 3 * 3 = 17; unstructured 8 + 3 * 1
    assert rows["unstructured"].ms == pytest.approx(11) and rows["unstructured"].layers == 3
    assert rows["unstructured"].speedup == pytest.approx(17 / 11)
    assert rows["unstructured"].speedup_now == pytest.approx(20 / 11)
    # 7 rows are not divisible by 4: that layer stays dense; the others are also held by bitmask and 2x1
    assert rows["4x1"].ms == pytest.approx(8 + 3 + 2 * 1) and rows["4x1"].layers == 2
    assert "4x1 does not divide 7x64: such layers stay dense" in advice.notes
    assert rows["2:4"].sparsity == 0.5
    assert advice.best(0.5).pattern in ("unstructured", "2:4") and advice.best(0.3) is None


def test_a_layer_that_gains_nothing_stays_dense():
    def slow(calls, budget_ms):
        return {label: 3.0 if "dense/" in label or label == "original" else 9.0 for label in calls}

    advice = advise(Toy().eval(), torch.randn(5, 64), patterns=["unstructured"], dtypes=[torch.float32], timer=slow)
    assert all(row.layers == 0 and row.speedup == 1.0 for row in advice.rows)


def test_a_real_model_in_both_dtypes_is_left_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=3).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advice = advise(model, torch.randn(2, 3, 64, 64), sparsities=[0.9], budget_ms=5)
    assert isinstance(advice, Advice) and len(advice.rows) == 16
    assert {row.dtype for row in advice.rows} == {"float32", "bfloat16"}
    assert all(row.ms > 0 and row.speedup >= 1 for row in advice.rows)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "ms on" in str(advice) and "fastest at 90%" in str(advice)
    assert json.loads(advice.to_json())["rows"][0]["pattern"] == "unstructured"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patterns": ["3-4"]}, ValueError, "unknown pattern '3-4'"),
        ({"patterns": []}, ValueError, "patterns and dtypes: expected at least one of each"),
        ({"sparsities": [1.0]}, ValueError, "sparsities: expected 0 <= sparsity < 1, got 1.0"),
        (
            {"dtypes": [torch.float16]},
            ValueError,
            "dtypes: expected torch.float32 or torch.bfloat16, got",
        ),
    ],
)
def test_what_it_refuses(options, error, message):
    with pytest.raises(error, match=message):
        advise(Toy().eval(), torch.randn(2, 64), **options)


def test_wrong_models_and_examples():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        advise("vit", torch.randn(2, 64))
    with pytest.raises(TypeError, match="example: expected a tensor"):
        advise(Toy(), [1])
    with pytest.raises(ValueError, match=r"model: expected float32 parameters, got torch\.bfloat16"):
        advise(Toy().bfloat16(), torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"example: the model cannot run it: .*; pass what you would call"):
        advise(Toy().eval(), torch.randn(2, 63))
    with pytest.raises(ValueError, match=r"model: expected parameters on the cpu, got meta; call model\.cpu"):
        advise(nn.Linear(4, 4).to("meta"), torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"model: ReLU has no nn\.Linear that could be packed"):
        advise(nn.ReLU(), torch.randn(2, 64))
