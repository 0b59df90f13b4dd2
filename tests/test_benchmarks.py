"""The benchmark harness: cases are what they say, masks fit their pattern, rows are whole and replaced by key."""

import csv
import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import accuracy, cases, contenders, finetune, growth, kernel, memory, record, run, tables, timing
from benchmarks.cases import KernelCase
from rmtkern import comparison, load, peers, save
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import PackedLinear
from rmtkern.testing import random_sparse


def parsed(*options):
    return run.parse_args([*options])


def test_case_names_are_unique():
    for level in run.CASES.values():
        names = [(case.name, one if isinstance(one, str) else one.name) for case in level() for one in case.contenders]
        assert len(set(names)) == len(names)


def test_every_contender_of_every_case_is_a_name_and_fits_the_layer():
    for case in (*cases.kernel_cases(), *cases.growth_cases()):
        n_rows, n_cols = cases.LAYERS[case.layer]
        for name in case.contenders:
            numbers = contenders.parse(name).numbers
            assert n_rows % numbers.get("r", 1) == 0 and n_cols % numbers.get("c", numbers.get("m", 1)) == 0


@pytest.mark.parametrize("name", ["bitmask", "block 4 0.5", "csr 0.5", "nofm 2:4 0.5", "bitmask 1.5"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="expected '<layout>"):
        contenders.parse(name)


@pytest.mark.parametrize(("r", "c"), [(4, 1), (1, 2), (4, 2)])
def test_mini_blocks_are_whole(r, c):
    weight = contenders.random_weight(contenders.parse(f"block {r}x{c} 0.5"), 64, 64)
    kept = (weight != 0).view(64 // r, r, 64 // c, c)
    assert torch.equal(kept.all(3).all(1), kept.any(3).any(1))
    assert 0.4 < 1 - kept.float().mean() < 0.6  # 3 standard deviations of the fewest, 512 blocks, are 0.07


@pytest.mark.parametrize(("name", "shared"), [("nofm 2:4", 1), ("nofm 2:4x4", 4)])
def test_two_of_four_and_who_shares_them(name, shared):
    kept = contenders.random_weight(contenders.parse(name), 64, 64) != 0
    assert (kept.view(64, 16, 4).sum(-1) == 2).all()
    rows = kept.view(64 // shared, shared, 64)
    assert torch.equal(rows.all(1), rows.any(1))
    assert not torch.equal(kept[:32], kept[32:])


def test_an_unstructured_mask_in_a_layout_of_mini_blocks():
    contender = contenders.parse("block 1x2 unstructured 0.5")
    assert contender.pattern == "unstructured" and contenders.parse("block 1x2 0.5").pattern == "1x2"
    weight, packed = contenders.build(contender, 64, 64, torch.bfloat16)
    pairs = (weight != 0).view(64, 32, 2)
    assert not torch.equal(pairs.all(-1), pairs.any(-1)) and packed.label == "block(r=1,c=2)"


def test_spectral_is_factors_and_a_sparse_part():
    contender = contenders.parse("spectral 8+0.9")
    weight, packed = contenders.build(contender, 64, 64, torch.float32)
    assert torch.equal(packed.unpack(), weight)
    _, _, sparse = packed.split()
    assert 0.85 < 1 - sparse.count_nonzero() / sparse.numel() < 0.95  # 7 standard deviations of 4096 entries


def test_lowrank_has_its_rank():
    weight = contenders.random_weight(contenders.parse("lowrank 8"), 48, 32)
    assert torch.linalg.matrix_rank(weight) == 8


def test_a_pattern_that_does_not_divide_the_shape_is_refused():
    with pytest.raises(ValueError, match="not divisible by 4 x 2"):
        contenders.random_weight(contenders.parse("block 4x2 0.5"), 6, 6)


def test_what_the_library_lacks_is_said():
    weight = torch.randn(8, 64)
    with pytest.raises(contenders.Unavailable, match=r"does not take torch\.float64"):
        contenders.pack(contenders.parse("bitmask 0.5"), weight.double())
    with pytest.raises(contenders.Unavailable, match="offers nothing for this weight"):
        contenders.pack(contenders.parse("block 4x1 0.5"), weight)  # dense: no mini-block is gone


def test_kernel_and_growth_rows_have_every_column():
    case = KernelCase("demo.proj", 16, ("bitmask 0.5", "nofm 2:4"), sweep="tokens")
    rows = growth.measure(case, rounds=2)
    assert [row["form"] for row in rows][-2:] == list(case.contenders)
    columns = list(rows[0])
    assert all(list(row) == columns for row in rows)
    assert {*growth.KEYS, *growth.SHOWN, *kernel.SHOWN, "p20_ms", "p80_ms", "cpu", "revision", "date"} <= set(columns)
    for row in rows:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gflops"] == pytest.approx(row["gflops_dense_equivalent"] * (1 - row["sparsity"]))
    assert rows[0]["vs_torch"] == 1 and max(row["vs_strongest"] for row in rows[:3]) == 1


def test_flat_is_judged_within_a_series():
    one = {"sweep": "tokens", "dtype": "float32", "threads": 1, "isa": "x", "clock": "c", "form": "f", "layer": "l"}
    rows = [{**one, "ps_per_kept_product": ps} for ps in (30.0, 10.0, 12.0)]
    other = {**one, "form": "g", "ps_per_kept_product": 99.0}
    assert [row["flat"] for row in growth.mark_flat([*rows, other])] == ["3.0x", "yes", "yes", "yes"]


def test_the_growth_table_is_made_of_the_rows(tmp_path, monkeypatch):
    case = KernelCase("demo.proj", 16, ("bitmask 0.5",), sweep="tokens")
    rows = [row for one in (case, replace(case, tokens=1)) for row in growth.measure(one, rounds=1)]
    record.write_rows(tmp_path / f"growth-{tables.CPU}.csv", growth.mark_flat(rows), growth.KEYS)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.growth()
    assert [(cells[2], round(int(cells[4][:-1]), -1)) for cells in table.rows] == [("16", 50), ("1", 50)]
    assert "yes" in {cells[-1] for cells in table.rows}


def test_rows_are_replaced_by_key(tmp_path):
    path = tmp_path / "r.csv"
    first = [{"form": "a", "activation": None, "ms": 1}, {"form": "b", "activation": None, "ms": 2}]
    record.write_rows(path, first, ("form", "activation"))
    record.write_rows(path, [{"form": "a", "activation": None, "ms": 3}], ("form", "activation"))
    with path.open() as file:
        assert {row["form"]: row["ms"] for row in csv.DictReader(file)} == {"a": "3", "b": "2"}


def test_interleaved_runs_every_call_in_every_round():
    ran = []
    calls = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    times = timing.interleaved(calls, timing.clock_for(1), rounds=2, inner=2)
    assert ran == [*"bbaa", *"aabb", *"bbaa"] or ran == [*"aabb", *"bbaa", *"aabb"]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(peers.PeerMissing, match=r"peer openvino-fp32 needs openvino; .*rmtkern\[bench\]"):
        peers.prepare("openvino-fp32", torch.nn.Identity(), torch.zeros(1, 3, 8, 8), 1)
    with pytest.raises(ValueError, match="unknown peer 'tvm'"):
        peers.prepare("tvm", torch.nn.Identity(), torch.zeros(1, 3, 8, 8), 1)


def test_torch_peers_run_the_same_model():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        exact = model.eval()(images)
        for name, allowed in (("torch-fp32", 0.0), ("torch-bf16", 0.03), ("torch-int8", 0.1)):
            got = peers.prepare(name, model, images, torch.get_num_threads())().float()
            assert (got - exact).abs().max() <= allowed * exact.abs().max()


def test_a_model_output_is_held_to_its_precision():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        allowed = [
            comparison.allowed_error(dtype, model, images, model(images)) for dtype in ("float32", "bfloat16", "int8")
        ]
    assert (
        allowed[0] == 1e-4 < 4 * torch.finfo(torch.bfloat16).eps < allowed[1] < allowed[2] == comparison.INT8_TOLERANCE
    )


def test_options_select_cases():
    chosen = list(run.select(parsed("--level", "kernel", "--only", "T=197 float32 1t bitmask 0.5", "--threads", "1")))
    assert {case.contenders for case in chosen} == {("bitmask 0.5",)} and len(chosen) > 5
    models = list(run.select(parsed("--level", "model", "--batches", "1", "--dtype", "bfloat16")))
    assert models and all(c.batch == 1 and c.contenders[0].dtype == "bfloat16" for c in models)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "model", "--base", "HEAD"], "use it with --level kernel"),
        (["--level", "kernel", "--batches", "1"], "use it with --level model"),
        (["--level", "kernel", "--rounds", "0"], "expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        parsed(*options)
    assert message in capsys.readouterr().err


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
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

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
    table = tables.calibrated()
    assert list(table.columns) == ["method", "calibration images", "unstructured 50%", "2:4 50%"]
    assert len(table.rows) == 3 and "paired standard error, 40 validation" in table.notes[0]


def test_methods_take_options():
    found = accuracy.config("rmt/soft_threshold=0.5/theta=legacy", 0.4, "unstructured")
    assert (found.method, found.soft_threshold, found.theta, found.permute) == ("rmt", 0.5, "legacy", None)
    assert accuracy.config("edge+admm+obs/permute", 0.5, "4x1").permute is True
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


def test_paired_errors():
    dense, pruned = torch.tensor([1.0, 1, 1, 0]).double(), torch.tensor([1.0, 0, 1, 1]).double()
    found = accuracy.against(dense, pruned)
    lost = np.array([0, 1, 0, -1])
    assert found["loss"] == lost.mean() and found["top1"] == 0.75
    assert found["loss_error"] == pytest.approx(lost.std(ddof=1) / 2, abs=1e-6)


def test_a_packed_model_is_measured_from_its_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).eval()
    model[0] = PackedLinear(LAYOUTS["bitmask"].pack(random_sparse(64, 64, 0.8)), torch.randn(64))
    empty = memory._without_weights(model)
    assert all(parameter.is_meta for parameter in empty.parameters()) and type(model[0]) is PackedLinear
    torch.save(empty, tmp_path / "model.pt")  # a packed one would refuse
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", torch.load(tmp_path / "model.pt", weights_only=False))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
