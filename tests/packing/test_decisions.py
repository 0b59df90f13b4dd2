"""Decisions: what is reused, what is measured again, and which files are refused. All timers are injected."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

import rmtkern
from rmtkern.cli import main
from rmtkern.nn import PackedLinear
from rmtkern.ops import linear
from rmtkern.packing import decisions, pack_, unpack_
from rmtkern.packing.decisions import DecisionKey, DecisionLog, Decisions


def linears(*sizes, sparsity=0.9, dtype=torch.float32):
    """A chain of linears with random zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(sizes))).eval()
    for module in model:
        weight = module.weight.data.view(-1)
        weight[torch.randperm(len(weight))[: round(sparsity * len(weight))]] = 0.0
    return model.to(dtype)


class Timer:
    """Makes `cheap` the fastest candidate and notes what it is asked to time."""

    def __init__(self, cheap="bitmask"):
        self.cheap, self.groups, self.whole = cheap, 0, 0

    def __call__(self, calls, budget_ms):
        if "original" in calls:
            self.whole += 1
            return {name: {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}[name] for name in calls}
        if "mlp/kernel" in calls:  # no layer: timed in every call, and left alone here
            return dict.fromkeys(calls, 1.0)
        self.groups += 1
        return {label: 1.0 if label == self.cheap else 2.0 + 0.5 * i for i, label in enumerate(calls)}


X = torch.ones(4, 64)


def measured(**options):
    return pack_(linears(64, 96, 32), X, timer=Timer(), **options).decisions


@pytest.fixture
def record():
    """A file's content, to be damaged."""
    return {"format": "rmtkern decisions", "version": 1, "entries": json.loads(json.dumps(measured().records()))}


def test_a_second_model_is_packed_without_timing_its_layers():
    model, twin = linears(64, 96, 32), linears(64, 96, 32)
    first = pack_(model, [X, X[:2]], timer=Timer())
    assert (first.groups_measured, first.groups_reused, len(first.decisions)) == (2, None, 2)
    again = Timer(cheap="dense/onednn")  # what it would choose, were it asked
    second = pack_(twin, [X, X[:2]], timer=again, decisions=first.decisions)
    assert again.groups == 0 and again.whole == 2  # the whole model is timed on both examples
    assert (second.groups_measured, second.groups_reused, len(second.decisions)) == (0, 2, 0)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.form == b.form == "bitmask" and a.ms == b.ms and a.speedup == b.speedup
        assert "reused" not in a.reason and "times reused from saved decisions" in b.reason
    assert torch.equal(model(X), twin(X))
    assert "times of 2 groups of alike layers reused from saved decisions, 0 measured" in str(second)
    assert "reused" not in str(first)


def test_the_guard_still_decides():
    def slow(calls, budget_ms):
        return {name: {"original": 4.0, "dense": 3.0, "packed": 5.0}[name] for name in calls}

    report = pack_(linears(64, 96, 32), X, timer=slow, decisions=measured(), mlps=False)
    assert report.groups_reused == 2 and report.packed_layers == 0
    assert any("went back to the dense form" in note for note in report.notes)


def test_only_the_new_group_is_timed():
    timer = Timer()
    report = pack_(linears(64, 96, 32, 16), X, timer=timer, decisions=measured())
    assert timer.groups == 1 and (report.groups_measured, report.groups_reused) == (1, 2)
    assert [key.shape for key in report.decisions] == [(16, 32)]


def test_the_report_as_json_holds_what_a_file_holds():
    report = pack_(linears(64, 96, 32), X, timer=Timer(), decisions=Decisions())
    found = json.loads(report.to_json())
    assert (found["groups_measured"], found["groups_reused"]) == (2, 0)
    key = found["decisions"][0]["key"]
    assert key["shape"] == [96, 64] and key["dtype"] == "float32" and key["tokens"] == [4] and key["bias"] is True
    assert key["threads"] == torch.get_num_threads() and key["rmtkern"] == rmtkern.__version__
    assert key["cpu"] and key["isa"] and key["activation"] is None and key["torch"] == torch.__version__
    assert key["sparsity_step"] == 18 and "bitmask" in key["candidates"] and "dense/torch" in key["candidates"]
    assert found["decisions"][0]["ms"]["4"]["bitmask"] == 1.0


@pytest.mark.parametrize("elsewhere", ["threads", "isa", "backend", "cpu", "rmtkern", "torch"])
def test_times_from_elsewhere_are_not_used(elsewhere, monkeypatch):
    known = measured()
    threads = torch.get_num_threads()
    try:
        if elsewhere == "threads":
            torch.set_num_threads(threads + 1)
        elif elsewhere == "isa":
            monkeypatch.setenv("RMTKERN_ISA", "portable")
        elif elsewhere == "backend":
            monkeypatch.setenv("RMTKERN_BACKEND", "reference")
        elif elsewhere == "cpu":
            monkeypatch.setattr(decisions, "cpu_model", lambda: "another CPU")
        elif elsewhere == "rmtkern":
            monkeypatch.setattr(rmtkern, "__version__", "99")
        else:
            monkeypatch.setattr(torch, "__version__", "99")
        timer = Timer()
        report = pack_(linears(64, 96, 32), X, timer=timer, decisions=known)
    finally:
        torch.set_num_threads(threads)
    assert timer.groups == 2 and (report.groups_measured, report.groups_reused) == (2, 0)
    assert len(known.merge(report.decisions)) == 4 and len(known) == 2


@pytest.mark.parametrize("other", ["dtype", "bias", "activation", "tokens", "sparsity", "shape", "candidates"])
def test_times_of_another_layer_are_not_used(other):
    known = pack_(linears(64, 96), X, timer=Timer()).decisions
    model, x, options = linears(64, 96), X, {}
    if other == "dtype":
        options = {"dtype": torch.bfloat16}
    elif other == "bias":
        model[0].bias = None
    elif other == "activation":
        model.append(nn.ReLU().eval())
    elif other == "tokens":
        x = X[:3]
    elif other == "sparsity":
        model = linears(64, 96, sparsity=0.8)
    elif other == "shape":
        model = linears(64, 95)
    else:
        options = {"layouts": ["dense"]}
    timer = Timer()
    report = pack_(model, x, timer=timer, decisions=known, **options)
    assert timer.groups == 1 and report.groups_reused == 0 and set(report.decisions).isdisjoint(known)


def test_similar_sparsity_and_the_order_of_layouts_do_not_matter():
    known = pack_(linears(64, 96, sparsity=0.91), X, timer=Timer(), layouts=["bitmask", "nofm"]).decisions
    timer = Timer()
    pack_(linears(64, 96, sparsity=0.94), X, timer=timer, layouts=["nofm", "bitmask"], decisions=known)
    assert timer.groups == 0


def test_a_label_that_no_longer_exists_is_measured_again(record, tmp_path):
    for entry in record["entries"]:
        entry["key"]["candidates"].append("gone(r=3)")
        entry["ms"]["4"]["gone(r=3)"] = 0.001
    (tmp_path / "d.json").write_text(json.dumps(record))
    timer = Timer()
    report = pack_(linears(64, 96, 32), X, timer=timer, decisions=tmp_path / "d.json")
    assert timer.groups == 2 and report.groups_reused == 0
    assert {layer.form for layer in report.layers} == {"bitmask"}


def test_times_that_lack_a_candidate_are_measured_again():
    partial = {key: {4: {"dense/torch": 1.0}} for key in measured()}  # as if the others had been inaccurate
    timer = Timer()
    report = pack_(linears(64, 96, 32), X, timer=timer, decisions=Decisions(partial))
    assert timer.groups == 2 and set(report.decisions) == set(partial)


def test_accuracy_is_checked_though_the_times_are_known(monkeypatch):
    known, model = measured(), linears(64, 96, 32)

    def wrong(x, w, bias=None, **options):
        return linear(x, w, bias, **options) + (1e-3 if w.layout == "bitmask" else 0.0)

    monkeypatch.setattr("rmtkern.packing.layers.linear", wrong)
    timer = Timer()
    report = pack_(model, X, timer=timer, decisions=known)
    assert timer.groups == 0 and report.groups_reused == 2 and report.packed_layers == 0
    assert all("bitmask misses the accuracy rule by a factor" in layer.reason for layer in report.layers)
    assert all("bitmask" not in layer.ms[4] for layer in report.layers)


def test_a_file_is_made_then_used_then_completed(tmp_path):
    path = tmp_path / "d.json"
    pack_(linears(64, 96, 32), X, timer=Timer(), decisions=path)
    assert Decisions.load(path) == measured() and [p.name for p in tmp_path.iterdir()] == ["d.json"]
    written = path.read_bytes()
    timer = Timer()
    assert pack_(linears(64, 96, 32), X, timer=timer, decisions=str(path)).groups_reused == 2
    assert timer.groups == 0 and path.read_bytes() == written
    pack_(linears(64, 96, 32, 16), X, timer=Timer(), decisions=path)
    assert len(Decisions.load(path)) == 3


def test_a_file_keeps_what_another_process_added_meanwhile(tmp_path):
    path = tmp_path / "d.json"

    class Interrupted(Timer):
        def __call__(self, calls, budget_ms):
            if not path.exists():
                pack_(linears(16, 8), torch.ones(4, 16), timer=Timer(), decisions=path)
            return super().__call__(calls, budget_ms)

    pack_(linears(64, 96, 32), X, timer=Interrupted(), decisions=path)
    assert {key.shape for key in Decisions.load(path)} == {(8, 16), (96, 64), (32, 96)}


def test_unpack_is_as_before():
    model, dense = linears(64, 96, 32), linears(64, 96, 32)
    pack_(model, X, timer=Timer(), decisions=measured())
    twin = copy.deepcopy(model)
    assert sum(isinstance(module, PackedLinear) for module in model) == 2
    for packed in (model, twin):
        assert unpack_(packed) == 2
        assert all(torch.equal(value, dense.state_dict()[name]) for name, value in packed.state_dict().items())


def test_times_that_no_file_can_hold_are_used_but_not_kept():
    def timer(calls, budget_ms):
        found = Timer()(calls, budget_ms)
        return {name: math.inf if name == "dense/onednn" else ms for name, ms in found.items()}

    report = pack_(linears(64, 96, 32), X, timer=timer)
    assert report.packed_layers == 2 and report.groups_measured == 2 and len(report.decisions) == 0


def test_save_and_load_give_the_same_and_the_later_entry_wins(tmp_path):
    known = measured()
    known.save(tmp_path / "d.json")
    assert Decisions.load(tmp_path / "d.json") == known and repr(known) == "Decisions(2 entries)"
    key = next(iter(known))
    other = Decisions({key: {4: {"bitmask": 7.0}}})
    assert known.merge(other)[key] == {4: {"bitmask": 7.0}} and other.merge(known)[key] == known[key]
    assert known[key][4]["bitmask"] == 1.0
    with pytest.raises(TypeError, match=r"other: expected Decisions, got dict; Decisions.load reads a file"):
        known.merge({})
    with pytest.raises(TypeError, match=r"entries: expected keys of type DecisionKey, got 'a'"):
        Decisions({"a": {}})


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    measured().save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(decisions.json, "dump", full)
    model = linears(64, 96, 32, 16)
    with pytest.raises(OSError, match="disk full"):
        pack_(model, X, timer=Timer(), decisions=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d.json"]
    assert not any(isinstance(module, PackedLinear) for module in model)  # nothing is changed on failure


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected complete JSON, got an error in it"),
        (b'{"format": "rmtkern decisions", "version": 1, "entr', r"expected complete JSON, got an error in it"),
        (b"\xff\xfe\x00", r"expected UTF-8 text, got other bytes"),
        (b"[" * 200_000, r"it is nested too deeply"),
        (b'{"a": ' * 200_000, r"it is nested too deeply"),
        (b"[]", r"expected a JSON object with format 'rmtkern decisions', got \[\]"),
        (b'{"format": "other"}', r"expected a JSON object with format 'rmtkern decisions', got \{'format': 'other'\}"),
        (b'{"format": "rmtkern decisions", "version": 2}', r"expected format version 1, got 2"),
        (b'{"format": "rmtkern decisions", "version": true}', r"expected format version 1, got True"),
        (b'{"format": "rmtkern decisions", "version": 1}', r"entries: expected a list, got None"),
        (b'{"format": "rmtkern decisions", "version": 1, "entries": [3]}', r"entry 0: expected an object with key and"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content, message):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    model = linears(64, 96)
    with pytest.raises(ValueError, match=rf"d.json: not a file of decisions: .*{message}.*; pass a file that pack_ or"):
        pack_(model, X, timer=Timer(), decisions=path)
    assert path.read_bytes() == content and isinstance(model[0], nn.Linear)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cpu", 3, r"cpu: expected a non-empty string, got 3"),
        ("isa", "", r"isa: expected a non-empty string, got ''"),
        ("threads", True, r"threads: expected an int, got True"),
        ("threads", 0, r"threads: expected at least 1, got 0"),
        ("rmtkern", None, r"rmtkern: expected a non-empty string, got None"),
        ("torch", [], r"torch: expected a non-empty string, got \[\]"),
        ("shape", [96], r"shape: expected \[N, K\], got \(96,\)"),
        ("shape", "96x64", r"shape: expected a non-empty list, got '96x64'"),
        ("shape", [96, 64.0], r"shape: expected an int, got 64.0"),
        ("dtype", {}, r"dtype: expected a non-empty string, got \{\}"),
        ("bias", 1, r"bias: expected a bool, got 1"),
        ("activation", ["gelu"], r"activation: expected a non-empty string, got \['gelu'\]"),
        ("tokens", [], r"tokens: expected a non-empty list, got \[\]"),
        ("tokens", [4, 4], r"tokens: expected ascending counts, got \(4, 4\)"),
        ("tokens", [-4], r"tokens: expected at least 1, got -4"),
        ("tokens", [5], r"ms: expected times for the token counts 5, got \{'4': "),
        ("sparsity_step", -1, r"sparsity_step: expected at least 0, got -1"),
        ("candidates", [["bitmask"]], r"candidates: expected a non-empty string, got \['bitmask'\]"),
        ("candidates", ["bitmask"], r"ms at 4 tokens: expected times of bitmask, got \{'dense/torch': "),
        ("extra", 1, r"key: expected an object with cpu, isa, threads, .*, candidates, got"),
    ],
)
def test_wrong_keys(tmp_path, record, field, value, message):
    record["entries"][1]["key"][field] = value
    (tmp_path / "d.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"d.json: not a file of decisions: entry 1: {message}"):
        Decisions.load(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", r"expected a finite time above 0 ms, got nan"),
        ("Infinity", r"expected a finite time above 0 ms, got inf"),
        ("1e999", r"expected a finite time above 0 ms, got inf"),
        ("1" + "0" * 400, r"expected a finite time above 0 ms, got 1000"),
        ("-1.5", r"expected a finite time above 0 ms, got -1.5"),
        ("0", r"expected a finite time above 0 ms, got 0"),
        ('"1.0"', r"expected a time in ms, got '1.0'"),
        ("true", r"expected a time in ms, got True"),
        ("null", r"expected a time in ms, got None"),
        ("[1.0]", r"expected a time in ms, got \[1.0\]"),
    ],
)
def test_wrong_times(tmp_path, record, value, message):
    record["entries"][0]["ms"]["4"]["bitmask"] = "HERE"
    (tmp_path / "d.json").write_text(json.dumps(record).replace('"HERE"', value))
    with pytest.raises(ValueError, match=rf"entry 0: ms at 4 tokens: {message}"):
        Decisions.load(tmp_path / "d.json")


def test_wrong_entries(tmp_path, record):
    def load(entries):
        (tmp_path / "d.json").write_text(json.dumps({**record, "entries": entries}))
        return Decisions.load(tmp_path / "d.json")

    first, second = record["entries"]
    assert load([]) == Decisions() and load([second, first]) == measured()
    with pytest.raises(ValueError, match=r"entry 2: expected each key once, got one a second time"):
        load([first, second, first])
    with pytest.raises(ValueError, match=r"entry 0: ms: expected times for the token counts 4, got 3"):
        load([{**first, "ms": 3}])
    with pytest.raises(ValueError, match=r"entry 0: ms at 4 tokens: expected times of .*, got \{\}"):
        load([{**first, "ms": {"4": {}}}])
    with pytest.raises(ValueError, match=r"ms: expected times for the token counts \[4\], got \{5: "):
        Decisions({next(iter(measured())): {5: {"bitmask": 1.0}}})


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone.json: no such file of decisions; pass a file that pack_ or"):
        Decisions.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"no such file of decisions"):
        pack_(linears(64, 96), X, timer=Timer(), decisions=tmp_path)
    with pytest.raises(ValueError, match=r"decisions: .*no/d.json is in no folder that exists; create .*no first"):
        pack_(linears(64, 96), X, timer=Timer(), decisions=tmp_path / "no" / "d.json")
    with pytest.raises(TypeError, match=r"decisions: expected Decisions, a path or None, got dict"):
        pack_(linears(64, 96), X, timer=Timer(), decisions={})
    measured().save(tmp_path / "d.json")
    monkeypatch.setattr(decisions, "MAX_NBYTES", 100)
    with pytest.raises(ValueError, match=r"expected at most 100 bytes, got more; pass a file"):
        Decisions.load(tmp_path / "d.json")


def test_the_instruction_set_of_a_key(monkeypatch):
    def isa():
        return (
            DecisionLog(None)
            .key(torch.ones(2, 3), bias=False, activation=None, tokens=(1,), sparsity_step=0, candidates=("bitmask",))
            .isa
        )

    assert isa() == decisions.cpu.isas()[0]
    monkeypatch.setenv("RMTKERN_ISA", "portable")
    assert isa() == "portable"
    monkeypatch.setenv("RMTKERN_BACKEND", "reference")
    assert isa() == "reference"
    monkeypatch.setenv("RMTKERN_BACKEND", "cpu")
    monkeypatch.setattr(decisions.cpu, "isas", list)
    assert isa() == "none"


def test_a_key_sorts_its_candidates():
    here = {"cpu": "c", "isa": "i", "threads": 1, "rmtkern": "0", "torch": "2", "shape": (2, 3), "dtype": "float32"}
    what = {"bias": False, "activation": None, "tokens": (1, 2), "sparsity_step": 3}
    a = DecisionKey(**here, **what, candidates=("b", "a"))
    assert a == DecisionKey(**here, **what, candidates=["a", "b", "a"]) and hash(a) is not None


def test_bench_writes_and_reads_decisions(tmp_path, capsys, monkeypatch):
    (tmp_path / "decided.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)[:, :64])\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return Net(torch.nn.Linear(64, 32))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "d.json"
    argv = ["bench", "decided:net", "--keep-zeros", "--batch", "2", "--json", "--decisions", str(path)]
    for reused in (0, 1):
        main(argv)
        found = json.loads(capsys.readouterr().out)
        assert (found["groups_reused"], found["groups_measured"]) == (reused, 1 - reused)
    assert len(Decisions.load(path)) == 1
    path.write_text("{")
    assert main(argv) == 2
    assert "not a file of decisions: expected complete JSON" in capsys.readouterr().err
