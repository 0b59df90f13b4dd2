"""sweep: rows as prune_ and evaluate give them, none computed twice, a file that is never half written."""

import copy
import csv
import itertools
import sys

import pytest
import torch
from torch import nn

from rmtkern.api import prune_
from rmtkern.evaluation import evaluate
from rmtkern.sweep import sweep

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
    for damage in (text.replace(",50\n", ",many\n"), text[:-8]):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"sweep.csv, line \d: not a row of a sweep .*; remove it"):
            sweep(net(), (X, Y), path)


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
