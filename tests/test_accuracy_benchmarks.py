"""Benchmarks of accuracy on a toy: rows by request, what is known is not run again, and the tables made of them."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import accuracy, accuracy_tables, controls, finetune, record


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a model and images, and how to call a benchmark on them."""
    (tmp_path / "toydata.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def load_model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))\n"
        "def load_images(split, limit):\n    torch.manual_seed(len(split))\n"
        "    x = 9 * torch.randn(limit or 200, 3, 2, 2)\n    return x, load_model()(x).argmax(1)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def call(benchmark, *options):
        name = benchmark.__name__.rpartition(".")[2]
        where = ["--path", str(tmp_path), "--model", "toydata:load_model", "--images", "toydata:load_images"]
        monkeypatch.setattr(sys, "argv", [name, *where, *map(str, options)])
        benchmark.main()

    return call


def test_accuracy_rows_of_calibrated_methods(toy, tmp_path, capsys):
    """The whole benchmark on a toy: rows by method and pattern, written one by one, then shown as a table."""
    out = tmp_path / "accuracy-vits14-imagenette-calibrated.csv"
    base = ["--limit", 40, "--calibration", 30, "--out", out, "--cases", "unstructured=0.5", "2:4=0.5"]
    toy(accuracy, *base, "--methods", "admm", "uniform+activation+obs")
    for again in ([], ["--again"]):  # what is known is not run again, unless asked to
        capsys.readouterr()
        toy(accuracy, *base, "--methods", "admm", *again)
        assert ("points lost" in capsys.readouterr().out) is bool(again)
    rows = record.read_rows(out)
    assert sorted((row["method"], row["pattern"]) for row in rows) == sorted(
        (method, pattern) for method in ("admm", "uniform+activation+obs") for pattern in ("2:4", "unstructured")
    )
    for row in rows:
        assert row["repair"] == "obs" and row["calibration_images"] == "30" and float(row["dense_top1"]) == 1
        assert float(row["loss"]) == pytest.approx(1 - float(row["top1"])) and float(row["loss_error"]) >= 0
        assert accuracy.unpack_hits(row["hits"], 40).mean() == pytest.approx(float(row["top1"]))
    toy(accuracy, *base, "--methods", "admm", "uniform", "--seeds", 0, 1)
    rows = record.read_rows(out)
    assert [row["calibration_seed"] for row in rows if row["method"] == "uniform"] == ["0", "0"]
    seeds = {row["calibration_seed"]: row for row in rows if (row["method"], row["pattern"]) == ("admm", "2:4")}
    assert set(seeds) == {"0", "1"} and seeds["0"]["hits"] != seeds["1"]["hits"]
    table = accuracy_tables.calibrated()
    assert list(table.columns) == ["method", "calibration images", "unstructured 50%", "2:4 50%"]
    assert len(table.rows) == 3 and "paired standard error, 40 validation" in table.notes[0]


def test_methods_take_options():
    found = accuracy.config("rmt/soft_threshold=0.5/theta=legacy", 0.4, "unstructured")
    assert (found.method, found.soft_threshold, found.theta, found.permute) == ("rmt", 0.5, "legacy", False)
    assert accuracy.config("edge+admm+obs/permute", 0.5, "4x1").permute == "blocks"
    with pytest.raises(SystemExit, match="unknown option 'theta2' of method"):
        accuracy.config("rmt/theta2=1", 0.4, "unstructured")


def test_images_of_a_seed_are_its_own():
    train = torch.arange(100)
    taken = [set(accuracy.calibration_images(train, 20, seed, scored=20).tolist()) for seed in range(4)]
    assert taken[0] == set(range(20)) and taken[1] == set(range(80, 100))
    assert len(set().union(*taken)) == 80 and not set().union(*taken) & set(range(20, 40))
    with pytest.raises(SystemExit, match="seed 4: 100 training images"):
        accuracy.calibration_images(train, 20, 4, scored=20)


def test_fine_tuned_rows_and_what_is_known_of_them(toy, tmp_path, capsys):
    out = tmp_path / "finetune.csv"
    base = ["--patterns", "unstructured", "--sparsities", 0.7, 0.5, "--calibration", 32, "--train-images", 96,
            "--val-images", 40, "--epochs", 1, "--out", out]  # fmt: skip
    toy(finetune, *base, "--methods", "magnitude", "ser", "--seeds", 0, 1)
    rows = record.read_rows(out)
    asked = [(row["method"], row["asked_sparsity"], row["seed"]) for row in rows]
    assert len(set(asked)) == len(asked) == 8 and {row["steps"] for row in rows} == {""}
    for row in rows:
        found = accuracy.unpack_hits(row["hits"], 40)
        assert found.mean() == pytest.approx(float(row["top1"])) and len(found) == 40
        assert float(row["loss"]) == pytest.approx(1 - float(row["top1"]), abs=1e-6)
        assert row["calibration_images"] == ("32" if row["method"] == "ser" else "0")
    capsys.readouterr()
    toy(finetune, *base, "--methods", "ser", "magnitude", "seb")
    assert "2 of 6 cases to run" in capsys.readouterr().out and len(record.read_rows(out)) == 10


def test_gradual_rows_go_on_from_the_step_before(toy, tmp_path):
    out = tmp_path / "finetune.csv"
    base = ["--patterns", "unstructured", "--calibration", 32, "--train-images", 96, "--val-images", 40, "--epochs", 1]
    toy(
        finetune, *base, "--gradual", "--sparsities", 0.5, 0.2, "--methods", "hybrid", "--no-pruned-score", "--out", out
    )
    rows = [(row["asked_sparsity"], row["steps"], row["calibration_images"], row["pruned_top1"])
            for row in record.read_rows(out)]  # fmt: skip
    assert rows == [("0.2", "", "0", ""), ("0.5", "0.2", "32", "")]


def finetuned_row(method, sparsity, hits, steps="", seed=0, **more):
    """A row of benchmarks.finetune for a dense model that is right on every image."""
    hits = torch.tensor(hits).double()
    return {
        "method": method, "pattern": "unstructured", "asked_sparsity": sparsity, "steps": steps, "seed": seed,
        "calibration_images": 0, "train_images": 90, "val_images": len(hits), "epochs": 1, "lr": 2e-5, "distill": 0.5,
        "pruned_top1": 0.25, "train_cpu_s": 3.0, **accuracy.against(torch.ones(len(hits)), hits),
        "hits": accuracy.pack_hits(hits), **more,
    }  # fmt: skip


def test_tables_of_fine_tuned_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    worse, better = [1, 1, 0, 0] * 10, [1, 1, 0, 1] * 10
    seeds = [finetuned_row("admm", 0.5, better), finetuned_row("admm", 0.5, worse, seed=1)]
    record.write_rows(tmp_path / "finetune-vits14-imagenette.csv", seeds)
    (cells,) = accuracy_tables.finetuned().rows
    errors = [100 * np.std(hits, ddof=1) / 40**0.5 for hits in (better, worse)]
    assert cells[5:] == ["0 1", "40", "100.0", "25.0", "62.5", f"37.5 ± {np.mean(errors):.1f} (25.0 to 50.0)"]
    rows = [
        finetuned_row("magnitude", 0.2, better), finetuned_row("magnitude", 0.5, worse, "0.2"),
        finetuned_row("hybrid", 0.2, better), finetuned_row("hybrid", 0.5, better, "0.2", calibration_images=7),
        finetuned_row("magnitude", 0.5, worse), finetuned_row("seb", 0.5, better),
        {**finetuned_row("wanda", 0.5, worse), "hits": ""},
    ]  # fmt: skip
    record.write_rows(tmp_path / "protocol-vits14-imagenette.csv", rows)
    table = accuracy_tables.same_protocol()
    difference = 100 * np.std(np.array(better) - worse, ddof=1) / 40**0.5
    found = {tuple(cells[:2]): (cells[3], cells[5]) for cells in table.rows}
    lost = {hits: f"{100 - hits:.1f} ± {error:.1f}" for hits, error in zip((75, 50), errors, strict=True)}
    assert found == {
        ("magnitude", "at once"): (lost[50], None), ("hybrid", "at once"): (None, None),
        ("seb", "at once"): (lost[75], f"-25.0 ± {difference:.1f}"), ("wanda", "at once"): (lost[50], None),
        ("magnitude", "from 20%"): (lost[50], None), ("hybrid", "from 20%"): (lost[75], f"-25.0 ± {difference:.1f}"),
    }  # fmt: skip
    assert "methods with images see 7 of them" in table.notes[0]


def test_more_lost_than_another_method(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    common = {"split": "val", "pattern": "unstructured", "asked": 0.5, "calibration_images": 9}
    rights = {"rmt": torch.arange(40) % 4 > 0, "rmt/theta=legacy": torch.arange(40) % 2 > 0}
    rows = [
        {**common, "method": method, "images": count, **accuracy.against(torch.ones(count), right[:count].double()),
         "hits": accuracy.pack_hits(right[:count])}
        for method, right in rights.items() for count in (8, 40)
    ]  # fmt: skip
    record.write_rows(tmp_path / "accuracy-vits14-imagenette-cycles.csv", rows)
    table = accuracy_tables.cycles()
    assert table.columns[-1] == "unstructured 50%, more than rmt"
    assert [cells[2].split()[0] for cells in table.rows] == ["25.0", "50.0"] and "40 validation" in table.notes[0]
    assert [cells[3] and cells[3].split()[0] for cells in table.rows] == [None, "+25.0"]


def test_spectral_against_plain_at_equal_time(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    common = {"layer": "blocks.2.mlp.fc1.weight", "sparsity": 0.7, "dense_ms": 3.0, "spikes": 8, "dtype": "bfloat16",
              "tokens": 520, "threads": 1, "cpu": "a cpu", "calibration_images": 128}  # fmt: skip
    plain = {**common, "form": "4x2", "rank": 0, "ms": 1.0, "loss": 0.3, "plain_loss": None}
    rows = [{**common, "form": "spectral", "rank": rank, "ms": ms, "loss": 0.1, "plain_loss": loss}
            for rank, ms, loss in ((2, 1.5, 0.2), (4, 2.0, 0.05), (6, 3.5, 0.0), (8, 0.5, None))]  # fmt: skip
    record.write_rows(tmp_path / "spectral-vits14-imagenette.csv", [plain, *rows])
    table = accuracy_tables.spectral()
    assert [cells[-1] for cells in table.rows] == ["0.50", "2.00", None, None]
    assert [cells[-2] for cells in table.rows] == ["0.2000", "0.0500", "dense", "none as fast"]
    assert table.rows[0][4] == "2.00"
    assert "geometric mean 1.00, below 1 in 1 of 2" in table.notes[0] and "of 4x2 in the same" in table.notes[0]


def test_negative_controls(toy, tmp_path, capsys):
    out = tmp_path / "controls-vits14-imagenette.csv"
    for _ in range(2):
        toy(controls, "--limit", 40, "--out", out)
    rows = record.read_rows(out)
    names = [row["control"] for row in rows]
    assert len(set(names)) == len(names) and set(controls.CONTROLS) < set(names)
    found = {row["control"]: row for row in rows}
    bulk, half = found["whole bulk removed"], found["half of the bulk removed"]
    assert int(bulk["kept_values"]) < int(half["kept_values"]) < int(half["values"])
    assert float(bulk["stored"]) < float(half["stored"]) <= 1
    beside = found["magnitude, as many numbers as whole bulk removed"]
    assert float(beside["stored"]) == pytest.approx(float(bulk["stored"]), abs=0.01)
    assert [cells[0] for cells in accuracy_tables.controls().rows] == names


def test_paired_errors():
    dense, pruned = torch.tensor([1.0, 1, 1, 0]).double(), torch.tensor([1.0, 0, 1, 1]).double()
    found = accuracy.against(dense, pruned)
    lost = np.array([0, 1, 0, -1])
    assert found["loss"] == lost.mean() and found["top1"] == 0.75
    assert found["loss_error"] == pytest.approx(lost.std(ddof=1) / 2, abs=1e-6)
