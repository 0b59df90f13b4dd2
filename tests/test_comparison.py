"""compare: engines run the same weights, wrong and missing ones are named, and the verdict says what the times say."""

import importlib.util
import json

import pytest
import torch
from torch import nn

import rmtkern
from rmtkern import comparison, peers
from rmtkern.cli import main
from rmtkern.comparison import Comparison, EngineTime, compare
from rmtkern.errors import PackedModelError
from rmtkern.peers import Peer

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


class Output(dict):
    """What a transformers model returns: a mapping."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, x):
        return Output(logits=self.fc2(self.act(self.fc1(x))))


def net():
    torch.manual_seed(0)
    model = Net().eval()
    rmtkern.prune_(model, 0.75, targets="all", show_progress=False)
    return model


@pytest.fixture
def quick(monkeypatch):
    """Times of interleaved_samples by name, none measured; what it was called with."""
    seen = {}

    def fake(calls, budget_ms, clock, settle=False):
        seen.update(names=list(calls), settle=settle)
        for call in calls.values():
            call()
        return {name: [seen["ms"].get(name, 9.0) * (1 + d) for d in (-0.01, 0.0, 0.01)] for name in calls}

    monkeypatch.setattr(comparison, "interleaved_samples", fake)
    monkeypatch.setattr("rmtkern.packing.device.interleaved_ms", lambda calls, ms: dict.fromkeys(calls, 1.0))
    seen["ms"] = {"torch": 8.0, "dense": 6.0, "packed": 3.0}
    return seen


def test_every_engine_computes_the_model(quick):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare(model, X, ("packed", "dense", "torch-int8"), show_progress=False)
    assert quick["names"] == ["torch", "packed", "dense", "torch-int8"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(row.engine, row.dtype, row.p50_ms) for row in found.rows] == [
        ("packed", "float32", 3.0), ("dense", "float32", 6.0), ("torch", "float32", 8.0),
        ("torch-int8", "int8", 9.0)]  # fmt: skip
    errors = {row.engine: row.error for row in found.rows}
    assert errors["torch"] == 0 and errors["packed"] < 1e-5 and 1e-5 < errors["torch-int8"] < 0.3
    assert found.sparsity == 0.75 and found.example == "8x32" and found.speedup == 2.0
    assert found.rows[0].p20_ms == pytest.approx(3.0 * 0.994) and found.rows[0].p80_ms == pytest.approx(3.0 * 1.006)


def test_bfloat16_on_both_sides(quick):
    found = compare(net(), X, ("packed",), dtype=torch.bfloat16, show_progress=False)
    assert {row.dtype for row in found.rows} == {"bfloat16"}
    assert all(0 < row.error < 0.03 for row in found.rows)


def test_a_model_packed_before_is_taken_as_it_is(quick, monkeypatch):
    model, packed = net(), net()
    rmtkern.pack_(packed, X, show_progress=False)
    monkeypatch.setattr(comparison, "pack_", None)
    assert compare(model, X, ("packed",), packed=packed, show_progress=False).row("packed") is not None


def test_what_does_not_run_is_named(quick, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))

    def refuses(model, example, threads):
        raise RuntimeError("no such\noperator")

    monkeypatch.setitem(peers.PEERS, "compile-fp32", Peer("float32", (), refuses))
    wrong = Peer("float32", (), lambda model, example, threads: lambda: model(example) * 1.01)
    monkeypatch.setitem(peers.PEERS, "onnxruntime-fp32", wrong)
    found = compare(net(), X, show_progress=False)
    assert [row.engine for row in found.rows] == ["packed", "dense", "torch"]
    assert "openvino" in found.skipped["openvino"] and "pip install" in found.skipped["openvino"]
    assert found.skipped["torch-compile"] == "it cannot run this model (RuntimeError: no such operator)"
    assert found.skipped["onnxruntime"] == "its output differs by 0.01, allowed in float32 are 0.0001"
    text = str(found)
    assert all(f"skipped: {engine}: " in text for engine in found.skipped)


def made(dtype="float32", spread=0.01, **ms):
    rows = []
    for name, t in ms.items():
        kind = "int8" if "int8" in name else dtype
        rows.append(EngineTime(name.replace("_", "-"), kind, t * (1 - spread), t, t * (1 + spread), 0.1))
    return Comparison(tuple(sorted(rows, key=lambda row: row.p50_ms)), {}, dtype, "8x32", 1, "wall time", 0.5)


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        ({"torch": 8.0, "packed": 4.0, "openvino": 6.0},
         ["Take the packed model: it is 1.50 times as fast as the fastest dense engine in float32 here (openvino, 6 "
          "ms).",
          "Against PyTorch as it is: 2.00 times as fast."]),
        ({"torch": 8.0, "packed": 4.0, "openvino": 3.0},
         ["Do not pack: the fastest dense engine in float32 here (openvino, 3 ms) is 1.33 times as fast as the packed "
          "model (4 ms).", "Against PyTorch as it is: 2.00 times as fast."]),
        ({"torch": 4.0, "packed": 4.05},
         ["Packing makes no difference: 0.99 times as fast as the fastest dense engine in float32 here (torch, 4 ms), "
          "within the noise."]),
        ({"torch": 8.0, "packed": 4.0, "openvino_int8": 2.0},
         ["Take the packed model: it is 2.00 times as fast as the fastest dense engine in float32 here (torch, 8 ms).",
          "openvino-int8 in int8 is 2.00 times as fast as the packed model in float32; its outputs differ by 0.1, "
          "measure its accuracy."]),
        ({"torch": 8.0}, ["No verdict on packing: the packed model was not timed."]),
        ({"packed": 8.0}, ["No verdict on packing: no dense engine in float32 was timed."]),
    ],
)  # fmt: skip
def test_the_verdict_says_what_the_times_say(ms, said):
    assert made(**ms).verdict == said


def test_a_wide_spread_is_said():
    lines = made(spread=0.3, torch=5.0, packed=4.0).verdict
    assert "The two spread so much that a repetition may say otherwise; time them again." in lines


def test_json_and_notebook():
    found = made(torch=8.0, packed=4.0)
    record = json.loads(found.to_json())
    assert record["speedup"] == 2.0 and record["strongest"] == "torch" and record["verdict"] == found.verdict
    assert "Take the packed model" in found._repr_html_()


def test_errors():
    packed = net()
    rmtkern.pack_(packed, X, timer=lambda calls, ms: dict.fromkeys(calls, 1.0), show_progress=False)
    for error, message, arguments in (
        (TypeError, "model: expected an nn.Module, got int", (3, X)),
        (TypeError, r"example: expected a tensor .* torch.int64 \(token ids\), got torch.float64", (net(), X.double())),
        (TypeError, "engines: expected a sequence of names, got the string 'packed'", (net(), X, "packed")),
        (ValueError, "unknown engine 'tvm'; valid: torch, dense, packed", (net(), X, ["tvm"])),
        (ValueError, "the model is in train mode; call model.eval", (net().train(), X)),
        (ValueError, "fc1.weight is not float32; compare the float32 model", (net().bfloat16(), X)),
    ):
        with pytest.raises(error, match=message):
            compare(*arguments)
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or torch.bfloat16, got torch.float16"):
        compare(net(), X, dtype=torch.float16)
    if rmtkern.packing.is_packed(packed):
        with pytest.raises(PackedModelError, match="the model is packed; pass the one before pack_"):
            compare(packed, X)


def test_a_real_run_times_every_engine():
    found = compare(net(), X, ("dense", "packed"), budget_ms=20, show_progress=False)
    assert {row.engine for row in found.rows} == {"torch", "dense", "packed"} and found.skipped == {}
    assert all(0 < row.p20_ms <= row.p50_ms <= row.p80_ms for row in found.rows)


class Text(nn.Module):
    """Called with token ids, as a text model of transformers is."""

    def __init__(self):
        super().__init__()
        self.words, self.net = nn.Embedding(50, 32), Net()

    def forward(self, input_ids):
        return self.net(self.words(input_ids))


def text():
    torch.manual_seed(0)
    model = Text().eval()
    rmtkern.prune_(model, 0.75, targets="all", show_progress=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_model_is_called_with_token_ids(quick, dtype):
    ids = torch.randint(50, (2, 9))
    found = compare(text(), ids, ("packed", "dense", "onnxruntime", "openvino"), dtype=dtype, show_progress=False)
    ran = {row.engine for row in found.rows}
    assert {"torch", "packed", "dense"} <= ran and found.example == "2x9"
    for engine in {"onnxruntime", "openvino"} - ran:
        assert "needs" in found.skipped[engine]


@pytest.mark.slow
def test_compiled_models_are_timed_too():
    found = compare(net(), X, ("torch-compile",), budget_ms=20, show_progress=False)
    assert found.row("torch-compile").error < 1e-4, found.skipped


@pytest.fixture
def work(tmp_path, monkeypatch):
    import sys

    (tmp_path / "comparetoys.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    pretrained_cfg = {'input_size': (3, 8, 8)}\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = nn.Linear(192, 64), nn.Linear(64, 64)\n"
        "    def forward(self, x):\n        return self.b(self.a(x.flatten(1)))\n"
        "def net():\n    torch.manual_seed(0)\n    return Net()\n"
        "class Config:\n    max_position_embeddings = 7\n"
        "class Text(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.words, self.mlp, self.config = nn.Embedding(50, 32), nn.Linear(32, 64), Config()\n"
        "    def forward(self, ids):\n        return self.mlp(self.words(ids))\n"
        "def text():\n    torch.manual_seed(0)\n    return Text()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("comparetoys", None)


def test_bench_compares(work, quick, capsys):
    argv = ["bench", "comparetoys:net", "--targets", "all", "--batch", "2", "--compare"]
    assert main([*argv, "packed,dense", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["compared"]
    assert [row["engine"] for row in found["rows"]] == ["packed", "dense", "torch"] and found["example"] == "2x3x8x8"
    quick["ms"]["packed"] = 7.0
    assert main([*argv, "packed,dense"]) == 1
    out, err = capsys.readouterr()
    assert "Do not pack: the fastest dense engine in float32 here (dense, 6 ms) is 1.17 times" in out
    assert "the packed model is slower than the strongest dense form" in err
    assert main([*argv, "packed,tvm"]) == 2 and "unknown engine 'tvm'" in capsys.readouterr().err


def test_bench_times_a_text_model_on_token_ids(work, quick, capsys):
    argv = ["bench", "comparetoys:text", "--targets", "all", "--batch", "3", "--compare", "packed,dense", "--json"]
    assert main(argv) == 0
    (found,) = json.loads(capsys.readouterr().out)["compared"]
    assert found["example"] == "3x7" and "packed" in [row["engine"] for row in found["rows"]]
