"""The benchmark harness: cases are what they say, masks fit their pattern, rows are whole and replaced by key."""

import csv
import importlib.util
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, contenders, growth, kernel, memory, record, run, tables, timing
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
