"""sweep: rows as prune_ and evaluate give them, none computed twice, a file that is never half written."""

import copy
import csv
import functools
import itertools
import sys

import pytest
import timm
import torch
from torch import nn

import rmtkern
from rmtkern.api import prune_
from rmtkern.environment import cpu_model
from rmtkern.evaluation import evaluate
from rmtkern.packing import pack_
from rmtkern.sweep import ASKED, COLUMNS, Sweep, SweepRow, load_sweeps, sweep

module = sys.modules["rmtkern.sweep"]  # the name may also be the function

X, Y = torch.randn(50, 16), torch.randint(0, 4, (50,))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4)).eval()


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sweep.csv"


@pytest.fixture
def counted(monkeypatch):
    """How often something was pruned."""
    calls = []

    def count(*args, **kwargs):
        calls.append(args[1])
        return prune_(*args, **kwargs)

    monkeypatch.setattr(module, "prune_", count)
    return calls


def test_rows_are_what_prune_and_evaluate_give(path):
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = sweep(model, (X, Y), path, sparsities=(0.3, 0.6), methods=("row", "wanda"), calibration=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(row.method, row.sparsity) for row in found.rows] == [
        ("dense", 0.0), *itertools.product(("row", "wanda"), (0.3, 0.6))
    ]  # fmt: skip
    for row in found.rows:
        pruned = net()
        if row.method != "dense":
            prune_(pruned, row.sparsity, row.method, calibration=X if row.method == "wanda" else None)
        score = evaluate(pruned, (X, Y))
        assert (row.top1, row.top5, row.loss, row.images) == (score.top1, score.top5, score.loss, 50)
        assert row.calibration == ("calibration" if row.method == "wanda" else "")
    assert [float(line["top1"]) for line in lines(path)] == [row.top1 for row in found.rows]
    assert found.computed == 5 and "5 of 5 rows computed now" in str(found) and "wanda" in str(found)
    dense = found.rows[0].top1
    assert found.curves["row"] == [(0.0, dense), (0.3, found.rows[1].top1), (0.6, found.rows[2].top1)]


def test_rows_that_are_there_are_not_computed_again(path, counted):
    options = {"methods": ("row",), "sparsities": (0.3, 0.6)}
    first = sweep(net(), (X, Y), path, **options)
    again = sweep(net(), (X, Y), path, **options)
    assert len(counted) == 2 and again.computed == 0 and again.rows == first.rows
    more = sweep(net(), (X, Y), path, methods=("row", "uniform"), sparsities=(0.6,), patterns=("unstructured", "2x1"))
    assert more.computed == 3 and len(counted) == 5 and len(lines(path)) == 6
    assert set(more.curves) == {"row unstructured", "row 2x1", "uniform unstructured", "uniform 2x1"}


def test_another_model_data_or_calibration_is_another_row(path, counted):
    options = {"methods": ("wanda",), "sparsities": (0.5,), "calibration": X}
    sweep(net(), (X, Y), path, **options)
    other = net()
    other[3].bias.data[0] += 1e-6
    assert sweep(other, (X, Y), path, **options).computed == 2
    assert sweep(net(), (X, Y), path, data="other", **options).computed == 2
    assert sweep(net(), (X, Y), path, calibration_data="other", **options).computed == 1  # dense uses none
    assert len(lines(path)) == 7


def test_a_model_that_merges_tokens_is_another_model(path):
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 4}
    model, data = timm.create_model("vit_tiny_patch16_224", **options), (torch.randn(6, 3, 32, 32), Y[:6])
    once = {"methods": ("row",), "sparsities": (0.5,)}
    assert [sweep(model, data, path, **once).computed for _ in range(2)] == [2, 0]
    rmtkern.merge_tokens_(model, 2)
    found = sweep(model, data, path, **once)
    assert found.computed == 2 and found.rows[0].loss == evaluate(model, data).loss
    rmtkern.unmerge_tokens_(model)
    assert sweep(model, data, path, **once).computed == 0


def test_an_interrupted_sweep_goes_on(path, monkeypatch, counted):
    options = {"methods": ("row",), "sparsities": (0.2, 0.4, 0.6)}
    real, seen = evaluate, []

    def fail(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        sweep(net(), (X, Y), path, **options)
    assert len(lines(path)) == 2 and [entry.name for entry in path.parent.iterdir()] == ["sweep.csv"]
    monkeypatch.setattr(module, "evaluate", real)
    assert sweep(net(), (X, Y), path, **options).computed == 2


def test_a_failing_write_leaves_the_file_as_it_was(path, monkeypatch):
    sweep(net(), (X, Y), path, methods=("row",), sparsities=(0.2,))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        sweep(net(), (X, Y), path, methods=("row",), sparsities=(0.4,))
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["sweep.csv"]


def test_a_file_that_is_no_sweep_is_left_alone(path):
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected a CSV with the columns weights,data,.*; give another file"):
        sweep(net(), (X, Y), path)
    assert path.read_text() == "a,b\n1,2\n"
    path.unlink()
    sweep(net(), (X, Y), path, methods=("row",), sparsities=(0.2,))
    text = path.read_text()
    packed = text.replace(",50,,", ",50,float32,8x16")  # without times
    for damage in (text.replace(",50,", ",many,"), text[: text.rindex(",50") + 2], packed):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"sweep.csv, line \d: not a row of a sweep .*; remove it"):
            sweep(net(), (X, Y), path)


def clock(calls, budget_ms):
    """Sparse forms and the packed model are twice as fast as dense ones."""
    for call in calls.values():
        call()
    return {name: 2.0 if name == "original" or name.startswith("dense") else 1.0 for name in calls}


PACK = {"methods": ("row",), "sparsities": (0.3, 0.9), "example": X[:8], "timer": clock}


@pytest.mark.parametrize("pack", ["float32", "bfloat16"])
def test_points_are_packed_and_timed(path, pack):
    model = net()
    found = sweep(model, (X, Y), path, pack=pack, **PACK)
    assert not rmtkern.packing.is_packed(model) and model[0].weight.dtype == torch.float32
    for row in found.rows:
        pruned = net()
        if row.method != "dense":
            prune_(pruned, row.sparsity, row.method)
        assert row.top1 == evaluate(pruned, (X, Y)).top1
        times = pack_(pruned, X[:8], dtype=getattr(torch, pack), timer=clock).end_to_end[0]
        assert row.packed_top1 == evaluate(pruned, (X, Y)).top1
        assert (row.original_ms, row.dense_ms, row.packed_ms) == (times.original_ms, times.dense_ms, times.packed_ms)
        assert row.speedup == times.speedup
        assert (row.pack, row.example, row.threads, row.cpu) == (pack, "8x16", torch.get_num_threads(), cpu_model())
    assert found.rows[2].speedup == 2.0 and found.computed == 3
    cells = lines(path)[2]
    assert float(cells["packed_ms"]) == found.rows[2].packed_ms and cells["pack"] == pack
    assert found.speed_curves["row"] == [(row.speedup, row.packed_top1) for row in found.rows]
    for word in ("packed top-1 %", "speed-up", f"packed in {pack}, input 8x16, "):
        assert word in str(found)


def test_measured_for_real_on_a_tiny_vit(path, monkeypatch):
    options = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2, "num_classes": 4}
    model, x = timm.create_model("vit_tiny_patch16_224", **options), torch.randn(6, 3, 32, 32)
    monkeypatch.setattr(rmtkern.speed, "pack_", functools.partial(pack_, budget_ms=5))
    found = sweep(model, (x, Y[:6]), path, methods=("row",), sparsities=(0.9,), pack="float32", example=x)
    assert model.training and all(row.speedup > 0 and row.packed_top1 == row.top1 for row in found.rows)


def test_packing_can_be_added_and_is_measured_once(path, counted):
    scored = []

    def count(*args, **options):
        scored.append(1)
        return evaluate(*args, **options)

    plain = {"methods": ("row",), "sparsities": (0.3, 0.9)}
    first = sweep(net(), (X, Y), path, **plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "evaluate", count)
        packed = sweep(net(), (X, Y), path, pack="float32", **PACK)
        assert packed.computed == 3 and len(counted) == 4 and len(scored) == 3  # only what is packed is scored again
        again = sweep(net(), (X, Y), path, pack="float32", **PACK)
        assert again.computed == 0 and again.rows == packed.rows and len(lines(path)) == 3
        assert sweep(net(), (X, Y), path, **plain).rows == first.rows  # without what was not asked for
        assert first.speed_curves == {} and "speed-up" not in str(first)
        for other in ({"pack": "bfloat16"}, {"pack": "float32", "example": X[:4]}):
            assert sweep(net(), (X, Y), path, **{**PACK, **other}).computed == 3
        patch.setattr(module, "cpu_model", lambda: "another")
        assert sweep(net(), (X, Y), path, pack="float32", **PACK).computed == 3
    assert len(scored) == 12 and len(lines(path)) == 12


def test_an_older_file_is_gone_on_from(path, counted):
    found = sweep(net(), (X, Y), path, methods=("row",), sparsities=(0.3,))
    rows = [{name: line[name] for name in ASKED} for line in lines(path)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ASKED)
        writer.writeheader()
        writer.writerows(rows)
    again = sweep(net(), (X, Y), path, methods=("row",), sparsities=(0.3,))
    assert again.computed == 0 and again.rows == found.rows and list(lines(path)[0]) == ASKED
    more = sweep(net(), (X, Y), path, pack="float32", **PACK)
    assert more.computed == 3 and list(lines(path)[0]) == COLUMNS and more.rows[0].top1 == found.rows[0].top1


def test_an_interrupted_packing_goes_on(path, monkeypatch):
    real, seen = rmtkern.speed.pack_, []

    def fail(*args, **options):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(rmtkern.speed, "pack_", fail)
    with pytest.raises(KeyboardInterrupt):
        sweep(net(), (X, Y), path, pack="float32", **PACK)
    assert len(lines(path)) == 1 and [entry.name for entry in path.parent.iterdir()] == ["sweep.csv"]
    assert sweep(net(), (X, Y), path, pack="float32", **PACK).computed == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pack": "int8", "example": X}, ValueError, "pack: expected float32 or bfloat16 or None, got 'int8'"),
        ({"pack": "float32"}, TypeError, r"example: expected a tensor of images \[B, ...\] .*, got NoneType"),
    ],
)
def test_bad_packing_is_refused_before_anything_is_computed(path, counted, options, error, message):
    with pytest.raises(error, match=message):
        sweep(net(), (X, Y), path, **options)
    assert not counted and not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("row", "magic")}, "unknown method 'magic'"),
        ({"methods": ("row", "wanda")}, "needs images; pass calibration="),
        ({"sparsities": (0.5, 1.5)}, r"sparsity: expected a fraction in \[0, 1\), got 1.5"),
        ({"patterns": ("unstructured", "2:4"), "sparsities": (0.4,)}, "pattern '2:4' takes only sparsity 0.5"),
        ({"methods": ()}, "expected at least one method, one pattern and one sparsity"),
        ({"targets": "conv"}, "target 'conv' matches no weight"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(path, counted, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(net(), (X, Y), path, **options)
    assert not counted and not path.exists()


def made(method, sparsity, *, data="images", calibration="", pack="", ms=1.0, weights="w"):
    packed = (pack, "8x16", 1, "cpu", 3.0, 2.0, ms, 0.5) if pack else ("", "", None, "", None, None, None, None)
    pattern = "" if method == "dense" else "unstructured"
    return SweepRow(weights, data, calibration, method, pattern, sparsity, 0.9 - sparsity, 1.0, 0.1, 9, *packed)


def test_a_file_comes_back_by_model_images_and_packing(path):
    rows = [
        made("dense", 0.0, pack="float32", ms=2.0), made("row", 0.6, pack="float32"), made("row", 0.3, pack="float32"),
        made("dense", 0.0, data="other"), made("row", 0.3, data="other"), made("seb", 0.3),
    ]  # fmt: skip
    module._write(path, rows)
    scored, packed, other = load_sweeps(path)
    assert [(row.method, row.sparsity, row.pack) for row in scored.rows] == [
        ("dense", 0.0, ""), ("row", 0.3, ""), ("row", 0.6, ""), ("seb", 0.3, "")]  # fmt: skip
    assert [row.packed_ms for row in packed.rows] == [2.0, 1.0, 1.0] and packed.rows[0].pack == "float32"
    assert packed.latency_curves == {"row": [(0.0, 2.0), (0.3, 1.0), (0.6, 1.0)]} and scored.latency_curves == {}
    assert [row.data for row in other.rows] == ["other", "other"] and other.computed == 0


def test_what_sweep_wrote_is_what_is_read(path):
    found = sweep(net(), (X, Y), path, sparsities=(0.6, 0.3), methods=("row",), show_progress=False)
    (loaded,) = load_sweeps(path)
    assert set(loaded.rows) == set(found.rows) and loaded.curves == found.curves


def test_curves_rise_in_sparsity_and_tell_calibrations_apart():
    rows = [made("dense", 0.0), made("row", 0.6), made("wanda", 0.3, calibration="a"),
            made("wanda", 0.3, calibration="b"), made("row", 0.3)]  # fmt: skip
    curves = Sweep(tuple(rows), 0).curves
    assert list(curves) == ["row", "wanda (a)", "wanda (b)"]
    assert [x for x, _ in curves["row"]] == [0.0, 0.3, 0.6]


def test_files_that_are_no_sweep(path):
    with pytest.raises(ValueError, match=r"sweep.csv: no such file; give the CSV that rmtkern sweep wrote"):
        load_sweeps(path)
    module._write(path, [made("row", 0.3)])
    with pytest.raises(ValueError, match=r"sweep.csv: no row of the dense model w on images; sweep it again"):
        load_sweeps(path)
    module._write(path, [made("dense", 0.0), made("row", float("nan"))])
    with pytest.raises(ValueError, match=r"line 3: not a row of a sweep \(NaN or an infinite number\); remove it"):
        load_sweeps(path)
