"""The benchmark harness: cases are what they say, masks fit their pattern, rows are whole and replaced by key."""

import csv
import importlib.util
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    accuracy,
    attention,
    cases,
    contenders,
    footprint,
    growth,
    kernel,
    memory,
    mlp,
    normed,
    pruning,
    record,
    run,
    spectral,
    tables,
    timing,
)
from benchmarks.cases import AttentionCase, KernelCase
from rmtkern import comparison, load, peers, prune_, save
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import PackedLinear
from rmtkern.pruning.times import LayerTimes, PatternTimes
from rmtkern.testing import random_sparse


def parsed(*options):
    return run.parse_args([*options])


def test_case_names_are_unique():
    for level in run.CASES.values():
        names = [(case.name, one if isinstance(one, str) else one.name) for case in level() for one in case.contenders]
        assert len(set(names)) == len(names)


def test_every_contender_of_every_case_is_a_name_and_fits_the_layer():
    for case in (*cases.kernel_cases(), *cases.normed_cases(), *cases.growth_cases()):
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


def test_mlp_rows_and_their_table(tmp_path, monkeypatch):
    said = []
    case = KernelCase("demo.mlp", 16, ("bitmask 0.5", "nofm 2:4", "block 4x2 0.5"), activation="gelu")
    rows = mlp.measure(case, rounds=2, say=said.append)
    assert [row["form"] for row in rows] == ["bitmask 0.5", "nofm 2:4"] and "block 4x2 0.5" in said[0]
    assert {*mlp.KEYS, *mlp.SHOWN, "p20_ms", "p80_ms", "cpu", "revision", "date"} <= set(rows[0])
    for row in rows:
        assert row["vs_separate"] == pytest.approx(row["separate_ms"] / row["p50_ms"])
        assert (row["K"], row["hidden"], row["N"]) == (256, 1024, 256) and row["max_rel_err"] < 1e-5
    record.write_rows(tmp_path / f"mlp-{tables.CPU}.csv", rows, mlp.KEYS)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert tables.mlps().rows[0][1:5] == ["256 -> 1024 -> 256", "16", "float32", "bitmask 0.5"]


def test_normed_rows_and_their_table(tmp_path, monkeypatch):
    said = []
    case = KernelCase("demo.fc1", 16, ("bitmask 0.5", "nofm 2:4", "block 4x2 0.5"), activation="gelu")
    rows = [row for threads in (1, 2) for row in normed.measure(replace(case, threads=threads), 2, said.append)]
    assert [row["form"] for row in rows] == ["bitmask 0.5", "nofm 2:4"] * 2 and "block 4x2 0.5" in said[0]
    assert {*normed.KEYS, *normed.SHOWN, "p20_ms", "p80_ms", "cpu", "revision", "date"} <= set(rows[0])
    for row in rows:
        assert (row["K"], row["N"]) == (256, 1024) and row["max_rel_err"] < 1e-5
        for kind in ("separate", "dense"):
            assert row[f"vs_{kind}"] == pytest.approx(row[f"{kind}_ms"] / row["p50_ms"])
        assert row["separate_by"].endswith(f"norm, {row['form']}") and "norm, dense " in row["dense_by"]
    record.write_rows(tmp_path / f"normed-{tables.CPU}.csv", rows, normed.KEYS)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    table = tables.normed_linears()
    assert list(table.columns) == ["layer", "K", "N", "dtype", "form", "T=16, 1t", "T=16, 2t"]
    shown = [f"{row['vs_separate']:.2f} / {row['vs_dense']:.2f}" for row in rows]
    assert [tuple(cells) for cells in table.rows] == [
        ("demo.fc1", "256", "1024", "float32", form, shown[i], shown[i + 2])
        for i, form in enumerate(("bitmask 0.5", "nofm 2:4"))
    ]


def test_attention_rows_and_their_table(tmp_path, monkeypatch):
    case = AttentionCase(2, 32, 2, 300, "bfloat16")
    rows = attention.measure(case, rounds=2) + attention.measure(replace(case, batch=1, contenders=("bias",)), rounds=1)
    assert [(row["form"], row["batch"]) for row in rows] == [("no mask", 2), ("bias", 2), ("bias", 1)]
    assert {*attention.KEYS, *attention.SHOWN, "p20_ms", "p80_ms", "cpu", "revision", "date"} <= set(rows[0])
    for row in rows:
        assert row["vs_torch"] == pytest.approx(row["torch_ms"] / row["p50_ms"])
        assert row["torch_by"].startswith("torch") and row["torch_by"].endswith(row["form"])
        assert row["gflops"] == pytest.approx(4e-6 * row["batch"] * 2 * 300**2 * 32 / row["p50_ms"])
    record.write_rows(tmp_path / f"attention-{tables.CPU}.csv", rows, attention.KEYS)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    table = tables.attentions()
    assert list(table.columns)[5:] == ["no mask, 1t", "bias, 1t"]
    first, second, third = (f"{row['vs_torch']:.2f}" for row in rows)
    assert [tuple(cells)[2:] for cells in table.rows] == [
        ("2", "300", "bfloat16", first, second),
        ("1", "300", "bfloat16", None, third),
    ]


@pytest.mark.parametrize(
    ("level", "kernel", "case"),
    [
        (mlp, "mlp", KernelCase("demo.mlp", 16, ("bitmask 0.5",), activation="gelu")),
        (normed, "normed_linear", KernelCase("demo.qkv", 16, ("bitmask 0.5",))),
        (attention, "attention", AttentionCase(1, 8, 1, 16)),
    ],
)
def test_a_fused_kernel_that_is_wrong_has_no_rows(level, kernel, case, monkeypatch):
    right = getattr(level, kernel)
    monkeypatch.setattr(level, kernel, lambda *args, **options: right(*args, **options) * 1.001)
    with pytest.raises(RuntimeError, match=r"times the error that is allowed"):
        level.measure(case, rounds=1)
    monkeypatch.setattr(level, "reason_against", lambda *args: "no such luck")
    said = []
    assert level.measure(case, 1, said.append) == [] and all("no such luck" in line for line in said)


def test_flat_is_judged_within_a_series():
    one = {"sweep": "tokens", "dtype": "float32", "threads": 1, "isa": "x", "clock": "c", "form": "f", "layer": "l"}
    rows = [{**one, "ps_per_kept_product": ps} for ps in (30.0, 10.0, 12.0)]
    other = {**one, "form": "g", "ps_per_kept_product": 99.0}
    assert [row["flat"] for row in growth.mark_flat([*rows, other])] == ["3.0x", "yes", "yes", "yes"]


def test_the_growth_table_is_made_of_the_rows(tmp_path, monkeypatch):
    case = KernelCase("demo.proj", 16, ("bitmask 0.5",), sweep="tokens")
    rows = [row for one in (case, replace(case, tokens=1)) for row in growth.measure(one, rounds=1)]
    record.write_rows(tmp_path / f"growth-{tables.CPU}.csv", growth.mark_flat(rows), growth.KEYS)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
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
    (chosen,) = run.select(parsed("--level", "attention", "--only", "12x64 B=1 T=197 bfloat16 2t bias"))
    assert (chosen.heads, chosen.threads, chosen.contenders) == (12, 2, ("bias",))
    assert len(list(run.select(parsed("--level", "normed", "--dtype", "float32", "--threads", "1")))) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "model", "--base", "HEAD"], "use it with --level kernel"),
        (["--level", "kernel", "--batches", "1"], "use it with --level model"),
        (["--level", "kernel", "--rounds", "0"], "expected at least 1, got 0"),
        ([], "say which on the CPU: kernel, mlp, normed, attention, model, growth"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        parsed(*options)
    assert message in capsys.readouterr().err


def test_accuracy_rows_of_several_patterns_and_of_measured_times(tmp_path, monkeypatch, capsys):
    (tmp_path / "toyblocks.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def load_model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 4))\n"
        "def load_images(split, limit):\n    x = torch.randn(limit, 3, 2, 2)\n"
        "    return x, load_model()(x).argmax(1)\n"
    )
    layers = [
        LayerTimes((f"{index}.weight",), shape, 1.0, {name: {0.3: 0.9, 0.9: 0.3} for name in ("unstructured", "4x2")})
        for index, shape in ((1, (32, 12)), (3, (32, 32)), (4, (4, 32)))
    ]
    PatternTimes(tuple(layers), "float32").save(tmp_path / "times.json")
    out = tmp_path / "rows.csv"
    argv = ["accuracy", "--path", str(tmp_path), "--model", "toyblocks:load_model", "--images", "toyblocks:load_images",
            "--limit", "40", "--calibration", "30", "--out", str(out), "--times", str(tmp_path / "times.json"),
            "--dtype", "float32", "--batch", "2", "--pack", "--methods", "sensitivity", "sensitivity/residual",
            "--cases", "unstructured=0.5", "unstructured+4x2=0.5", "unstructured+4x2=1.6x"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(accuracy, "packed_copy", lambda *args, **options: (None, [SimpleNamespace(speedup=1.25)]))
    with pytest.raises(ValueError, match="permute: pattern 'unstructured' has no mini-blocks"):
        accuracy.main()  # which has nothing to move
    argv.remove("sensitivity/residual")
    accuracy.main()
    rows = {(row["pattern"], row["asked"]): row for row in record.read_rows(out)}
    assert list(rows) == [("unstructured", "0.5"), ("unstructured+4x2", "0.5"), ("unstructured+4x2", "1.6x")]
    assert float(rows["unstructured+4x2", "1.6x"]["linear_speedup"]) >= 1.6
    for row in rows.values():
        assert float(row["packed_speedup"]) == 1.25 and float(row["kl"]) >= 0 and row["dtype"] == "float32"


def test_spectral_against_plain_patterns(tmp_path, monkeypatch, capsys):
    """Weights that are a few spikes plus sparse entries: factors and a sparse rest lose less in the same time."""
    (tmp_path / "toyspikes.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def load_model():\n"
        "    torch.manual_seed(0)\n    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Linear(64, 64))\n"
        "    for one in model[1:]:\n"
        "        spikes = torch.randn(64, 2) @ torch.randn(2, one.in_features)\n"
        "        rest = torch.randn(one.weight.shape) * (torch.rand(one.weight.shape) < 0.15)\n"
        "        one.weight.data = spikes / 8 + rest / 8 + 0.002 * torch.randn(one.weight.shape)\n"
        "    return model\n"
        "def load_images(split, limit):\n    return torch.randn(limit, 3, 4, 4), torch.zeros(limit).long()\n"
    )
    out = tmp_path / "rows.csv"
    argv = ["spectral", "--path", str(tmp_path), "--model", "toyspikes:load_model", "--images", "toyspikes:load_images",
            "--layers", "*.weight", "--calibration", "256", "--tokens", "5", "--dtype", "float32", "--out", str(out),
            "--patterns", "unstructured", "2:4", "--sparsities", "0.5", "0.8", "--spikes", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def timer(calls, budget_ms):
        """10 ms times the share that is not zero; factors take 2 ms."""
        for call in calls.values():
            call()

        def cost(name):
            form, *_, last = ("dense 0" if "dense" in name else name.split("|")[0]).split(" ")
            return 10 * (1 - float(last)) + (2.0 if form == "spectral" else 0.0)

        return {name: cost(name) for name in calls}

    spectral.main(timer)
    rows = record.read_rows(out)
    assert {row["form"] for row in rows} == {"unstructured", "2:4", "spectral"} and len(rows) == 2 * 5
    for row in rows:
        assert (row["plain_loss"] == "") == (row["form"] != "spectral") and 0 < float(row["loss"]) < 1
        if row["form"] == "spectral":
            assert float(row["loss"]) < 0.5 * float(row["plain_loss"])
    said = capsys.readouterr().out
    assert "geometric mean" in said
    spectral.main(lambda calls, budget_ms: pytest.fail("measured again"))
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1] and record.read_rows(out) == rows
    record.write_rows(out, rows[:-1])  # an interrupted run: one layer is not whole
    measured = []
    spectral.main(lambda calls, budget_ms: measured.append(1) or timer(calls, budget_ms))
    assert len(measured) == 1 and len(record.read_rows(out)) == len(rows)
    points = [(2.0, 0.4), (4.0, 0.1), (3.0, 0.5)]  # the last is slower and loses more than the first
    assert spectral.equal_time(points, 10.0, 3.0) == pytest.approx(0.2)
    assert spectral.equal_time(points, 10.0, 8.0) == pytest.approx(0.1)
    assert spectral.equal_time(points, 10.0, 1.0) is None and spectral.equal_time(points, 10.0, 10.0) == 0


def test_calibrated_pruning_by_a_named_method(monkeypatch):
    monkeypatch.setattr(pruning, "CASES", {"calibrated": ("vit_tiny_patch16_224", "auto")})
    threads = torch.get_num_threads()
    row = pruning.measure("calibrated", threads, images=2, depth=1, by="obs")
    assert (row["method"], row["images"], row["sparsity"]) == ("obs", 2, 0.5) and float(row["extra_mib"]) > 0


def test_methods_patterns_and_goals_are_read():
    plain = accuracy.config("sensitivity/permute", 0.5, "4x2")
    assert (plain.method, plain.sparsity, plain.pattern, plain.permute) == ("sensitivity", 0.5, "4x2", "blocks")
    mixed = accuracy.config("sensitivity+obs+obs/residual", "1.4x", "unstructured+4x2")
    assert (mixed.score, mixed.linear_speedup, mixed.permute) == ("obs", 1.4, True)
    assert mixed.pattern == ("unstructured", "4x2") and accuracy.config("row", 0.3, "unstructured").permute is False


def test_divergence_and_predicted_times():
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    p, q = dense.double().softmax(1).numpy(), np.full((2, 2), 0.5)
    each = (p * np.log(p / q)).sum(1)
    found = accuracy.divergence(dense, torch.zeros(2, 2))
    assert found["kl"] == pytest.approx(each.mean(), abs=1e-6)
    assert found["kl_error"] == pytest.approx(each.std(ddof=1) / 2**0.5, abs=1e-6)
    model = torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.Linear(10, 8))
    plan = prune_(model, 0.5, "uniform", targets="all")
    times = [LayerTimes((f"{i}.weight",), s, 1.0, {"unstructured": {0.4: 0.8, 0.6: 0.6}})
             for i, s in enumerate(((10, 8), (8, 10)))]  # fmt: skip
    assert accuracy.linear_speedup(plan, PatternTimes(tuple(times))) == pytest.approx(1 / 0.7)
    with pytest.raises(SystemExit, match=r"no times of 1\.weight"):
        accuracy.linear_speedup(plan, PatternTimes(tuple(times[:1])))


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


def test_the_peak_of_a_call_is_beyond_what_was_held():
    held = torch.ones(2**22)
    result, extra = memory.peak_beyond(lambda: float(torch.ones(2**24).sum() + held.sum()))
    assert result == 2**24 + 2**22 and 60 < extra < 80  # 64 MiB; the 16 of before are not in it
    assert memory.peak_beyond(lambda: None)[1] < 8
    assert memory.weights_mib(torch.nn.Linear(512, 512, bias=False)) == 1


def test_the_memory_of_every_call_is_measured(tmp_path):
    options = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    rows = {}
    for call in footprint.CALLS:
        if call != "pack_":
            rows[call] = footprint.measure(call, "vit_tiny_patch16_224", tmp_path, options)
    assert set(footprint.BOUNDS) == set(footprint.CALLS) and (tmp_path / footprint.FILE).exists()
    assert len({row["unit_mib"] for call, row in rows.items() if call != "load"}) == 1  # of the dense weights
    assert rows["load"]["unit"] == "file" and 0 < rows["load"]["unit_mib"] < rows["save"]["unit_mib"]
    with pytest.raises(RuntimeError, match="no_such_model"):
        footprint.run("load", "no_such_model", tmp_path)  # in a process of its own


def test_the_committed_memory_is_within_what_is_promised():
    rows = record.read_rows(record.RESULTS / f"footprint-{tables.CPU}.csv")
    assert {(row["call"], row["model"]) for row in rows} == set(itertools.product(footprint.CALLS, footprint.MODELS))
    for row in rows:
        assert float(row["extra"]) <= footprint.BOUNDS[row["call"]], row
