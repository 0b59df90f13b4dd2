"""Every command of the command line: its output, its JSON, its exit codes, and errors of one line."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import rmtkern
from rmtkern import cli
from rmtkern.cli import main
from rmtkern.cli.inputs import model_of
from rmtkern.evaluation import folder_batches, preprocessing_of
from rmtkern.loading import load_model, load_plan
from rmtkern.pruning.plan import PrunePlan
from rmtkern.pruning.presets import AUTO_CALIBRATED
from rmtkern.pruning.times import PatternTimes
from rmtkern.storage import read_metadata
from rmtkern.token_merging import merging_of
from tests.pruning.test_mixing import times_of

TOYS = """
import torch
from torch import nn


class Toy(nn.Module):
    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.fc1, self.act, self.fc2 = nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head((x + self.fc2(self.act(self.fc1(x)))).mean(1))


def toy():
    torch.manual_seed(3)
    return Toy()


def broken():
    raise KeyError("no\\nsuch key")


def wants(depth):
    return Toy()
"""
FC = ["--targets", "*fc1*", "*fc2*"]
X = "x.safetensors"


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder with clitoys.py and an image folder of three classes."""
    (tmp_path / "clitoys.py").write_text(TOYS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("clitoys", None)


@pytest.fixture
def images(work):
    pil = pytest.importorskip("PIL.Image")
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        (work / "images" / name).mkdir(parents=True)
        for index in range(2):
            pil.new("RGB", (10, 10), colour).save(work / "images" / name / f"{index}.png")
    return work / "images"


def fails(capsys, argv, code, message):
    """Run, expect a code and one line on stderr that holds the message; nothing on stdout."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith(f"rmtkern {argv[0]}: ") and message in err, err


def test_analyze_text(work, capsys):
    assert main(["analyze", "clitoys:toy"]) == 0
    out = capsys.readouterr().out
    for name in ("patch_embed.weight", "fc1.weight", "fc2.weight", "head.weight", "sigma_plus"):
        assert name in out


def test_analyze_formats(work, capsys):
    assert main(["analyze", "clitoys:toy", "--json"]) == 0
    fits = strict_json(capsys.readouterr().out)
    assert list(fits) == ["patch_embed.weight", "fc1.weight", "fc2.weight", "head.weight"]
    assert main(["analyze", "clitoys:toy", "--format", "csv", *FC]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["fc1.weight", "fc2.weight"]
    assert float(rows[0]["sigma_plus"]) == pytest.approx(fits["fc1.weight"]["sigma_plus"])
    assert main(["analyze", "clitoys:toy", "--format", "markdown"]) == 0
    assert capsys.readouterr().out.startswith("| name |")


def test_analyze_to_a_file(work, capsys):
    assert main(["analyze", "clitoys:toy", "--json", "-o", "fits.json"]) == 0
    assert capsys.readouterr().out == ""
    assert "fc1.weight" in strict_json((work / "fits.json").read_text())


def test_analyze_legacy_differs(work, capsys):
    values = []
    for extra in ([], ["--legacy"]):
        assert main(["analyze", "clitoys:toy", "--json", *extra]) == 0
        values.append(strict_json(capsys.readouterr().out)["fc1.weight"]["sigma2"])
    assert values[0] != values[1]


def test_prune_writes_dense_weights_under_their_own_keys(work, capsys):
    assert main(["prune", "clitoys:toy", "--sparsity", "0.7", *FC, "-o", "pruned.safetensors"]) == 0
    assert "wrote pruned.safetensors" in capsys.readouterr().out
    state = load_file(work / "pruned.safetensors")
    import clitoys

    fresh = clitoys.toy()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.head.weight, clitoys.toy().head.weight)
    zeros = sum(int((state[f"{name}.weight"] == 0).sum()) for name in ("fc1", "fc2"))
    assert zeros == round(0.7 * 2 * 32 * 96)


def test_prune_to_an_accuracy(work, images, capsys):
    argv = ["prune", "clitoys:toy", "--max-drop", "0.1", "--images", str(images), *FC, "-o", "pruned.safetensors"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "found for a drop of at most 10 points" in out and "on 6 images" in out
    assert main([*argv, "--json"]) == 0
    plan = strict_json(capsys.readouterr().out)["plan"]
    state = load_file(work / "pruned.safetensors")
    zeros = sum(int((state[f"{name}.weight"] == 0).sum()) for name in ("fc1", "fc2"))
    assert zeros == round(plan["config"]["sparsity"] * 2 * 32 * 96) and len(plan["target"]["trials"]) >= 7


def test_prune_to_an_accuracy_refuses_half_a_request(work, images, capsys):
    start = ["prune", "clitoys:toy", "-o", "x.safetensors"]
    both = "--max-drop finds the sparsity: give it --images FOLDER, and no --sparsity"
    fails(capsys, [*start, "--max-drop", "0.1"], 2, both)
    fails(capsys, [*start, "--max-drop", "0.1", "--images", str(images), "--sparsity", "0.5"], 2, both)
    fails(capsys, [*start, "--images", str(images)], 2, "--images are for --max-drop")
    fails(capsys, [*start, "--max-drop", "-1", "--images", str(images)], 2, "max_drop: expected a fraction in [0, 1)")
    assert not (work / "x.safetensors").exists()


def test_prune_json_evaluates_and_carries_the_plan(work, images, capsys):
    argv = [
        "prune",
        "clitoys:toy",
        "--method",
        "magnitude",
        "--evaluate",
        "images",
        "-o",
        "p.safetensors",
        "--json",
        *FC,
    ]
    assert main(argv) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["output"] == "p.safetensors"
    assert found["before"]["count"] == found["after"]["count"] == 6
    from rmtkern.loading import load_model

    stored = PrunePlan.from_json(read_metadata("p.safetensors")["rmtkern"])
    assert json.loads(stored.to_json()) == found["plan"]
    model = load_model("clitoys:toy", checkpoint="p.safetensors")
    stored.verify(model)
    assert main(["analyze", "clitoys:toy", "--checkpoint", "p.safetensors", "--json"]) == 0


def test_prune_with_calibration(work, images, capsys):
    argv = ["prune", "clitoys:toy", "--calibration", "images", "--calibration-images", "4", "-o", "p.safetensors", *FC]
    assert main([*argv, "--json"]) == 0
    plan = strict_json(capsys.readouterr().out)["plan"]
    assert plan["config"]["method"] == AUTO_CALIBRATED and plan["calibration_images"] == 4


def test_prune_takes_a_method_apart(work, images, capsys):
    argv = ["prune", "clitoys:toy", "--calibration", "images", "--calibration-images", "4", "-o", "p.safetensors", *FC]
    parts = ["--budget", "uniform", "--score", "activation", "--repair", "obs", "--no-permute", "--pattern", "2x1"]
    assert main([*argv, *parts, "--json"]) == 0
    config = strict_json(capsys.readouterr().out)["plan"]["config"]
    assert [config["budget"], config["score"]] == ["uniform", "activation"]
    assert [config["repair"], config["permute"]] == ["obs", False]
    cast = ["--method", "cast", "--pattern", "2:4", "--prior", "row", "--alpha", "0.2", "--permute"]
    assert main([*argv, *cast, "--json"]) == 0
    config = strict_json(capsys.readouterr().out)["plan"]["config"]
    assert [config[name] for name in ("score", "prior", "alpha", "permute")] == ["cast", "row", 0.2, True]


def test_prune_makes_factors_of_spikes(work, images, capsys):
    argv = ["prune", "clitoys:toy", "--calibration", "images", "--calibration-images", "4", "-o", "p.safetensors", *FC]
    assert main([*argv, "--pattern", "spectral", "--spikes", "0.5", "--method", "obs", "--json"]) == 0
    plan = strict_json(capsys.readouterr().out)["plan"]
    assert [plan["config"][name] for name in ("pattern", "spikes")] == ["spectral", 0.5]
    ranks = {layer["name"]: layer["params"]["rank"] for layer in plan["layers"] if layer["params"]}
    written = load_file(work / "p.safetensors")
    assert {key for key in written if "factor" in key} == {
        name.replace("weight", factor) for name in ranks for factor in ("factor_a", "factor_b")
    }
    PrunePlan.from_json(json.dumps(plan)).verify(load_model("clitoys:toy", checkpoint="p.safetensors"))
    fails(capsys, [*argv, "--spikes", "0.5"], 2, "spikes: goes with pattern 'spectral'")


def test_prune_in_cycles_takes_their_options(work, capsys):
    argv = ["prune", "clitoys:toy", "--method", "rmt", "--sparsity", "0.3", "-o", "p.safetensors", *FC]
    weights = []
    for more in ([], ["--theta", "legacy"], ["--soft-threshold", "20"]):
        assert main([*argv, *more, "--json"]) == 0
        config = strict_json(capsys.readouterr().out)["plan"]["config"]
        assert config["theta"] == ("legacy" if "--theta" in more else "haar")
        assert config["soft_threshold"] == (20 if "--soft-threshold" in more else 0)
        weights.append(load_file(work / "p.safetensors")["fc1.weight"])
    assert weights[2].abs().sum() < weights[0].abs().sum() and not torch.equal(weights[1], weights[0])
    seb = ["--method", "seb", "--sparsity", "0.1", "--haar", "0.5", "--alpha-regime", "--seed", "3", "--json"]
    assert main([*argv, *seb]) == 0
    config = strict_json(capsys.readouterr().out)["plan"]["config"]
    assert [config[name] for name in ("haar", "alpha_regime", "seed")] == [0.5, True, 3]
    dense, after = load_model("clitoys:toy").state_dict(), load_file(work / "p.safetensors")
    kept = after["fc1.weight"] != 0
    assert not torch.equal(after["fc1.weight"][kept], dense["fc1.weight"][kept])  # its singular vectors have changed
    assert main([*argv, "--soft-threshold", "1", "--legacy", "--json"]) == 0
    assert strict_json(capsys.readouterr().out)["plan"]["config"]["legacy"] is True
    assert main([*argv, "--soft-threshold", "-1"]) == 2
    assert "soft_threshold: expected a finite number >= 0" in capsys.readouterr().err


def test_sweep_writes_a_csv_and_a_picture_and_goes_on(work, images, capsys):
    pytest.importorskip("matplotlib")
    argv = ["sweep", "clitoys:toy", "--images", str(images), "--sparsities", "0.3", "0.6", "--calibration", str(images),
            "--calibration-images", "4", *FC, "-o", "sweep.csv"]  # fmt: skip
    assert main([*argv, "--methods", "row", "wanda", "--picture", "sweep.png"]) == 0
    out = capsys.readouterr().out
    assert "5 of 5 rows computed now" in out and "wrote sweep.csv and sweep.png" in out
    assert (work / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((work / "sweep.csv").open(newline="")))
    assert {row["data"] for row in rows} == {f"{images} (*fc1* *fc2*)"}
    assert [row["calibration"] for row in rows] == ["", "", "", f"{images}[4]", f"{images}[4]"]
    assert main([*argv, "--methods", "row", "uniform", "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["computed"] == 2 and len(found["rows"]) == 5 and found["rows"][0]["method"] == "dense"


def test_sweep_packs_and_times(work, images, capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def cheap(calls, budget_ms):
        for call in calls.values():
            call()
        return {name: 2.0 if name == "original" or name.startswith("dense") else 1.0 for name in calls}

    monkeypatch.setattr("rmtkern.packing.device.interleaved_ms", cheap)
    argv = ["sweep", "clitoys:toy", "--images", str(images), "--sparsities", "0.9", "--methods", "row", *FC, "-o",
            "sweep.csv", "--batch", "2"]  # fmt: skip
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--pack", "bfloat16", "--picture", "a.png", "--speed-picture", "b.png"]) == 0
    out = capsys.readouterr().out
    assert "packed in bfloat16, input 2x3x8x8, " in out and "wrote sweep.csv and a.png and b.png" in out
    assert (work / "b.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--pack", "bfloat16", "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["computed"] == 0 and [row["speedup"] for row in found["rows"]] == [pytest.approx(1), 2.0]
    assert all(0 <= row["packed_top1"] <= 1 for row in found["rows"])
    fails(capsys, [*argv, "--speed-picture", "b.png"], 2, "--speed-picture needs speeds: give --pack float32 or")
    fails(capsys, [*argv, "--pack", "float32", "--batch", "0"], 2, "--batch must be at least 1, got 0")
    fails(capsys, [*argv, "--pack", "float32", "--speed-picture", "no/b.png"], 2, "no: no such folder to write b.png")


def test_sweep_errors(work, images, capsys):
    argv = ["sweep", "clitoys:toy", "--images", str(images)]
    fails(capsys, [*argv, "-o", "no/sweep.csv"], 2, "no: no such folder to write sweep.csv into")
    fails(capsys, [*argv, "-o", "s.csv", "--picture", "no/p.png"], 2, "no: no such folder to write p.png into")
    fails(capsys, [*argv, "-o", "s.csv", "--methods", "wanda"], 2, "needs images; pass calibration=")
    assert not (work / "s.csv").exists()


CERTIFY = ["certify", "clitoys:toy", "--images"]


@pytest.fixture
def pruned(work, images, capsys):
    """pruned.safetensors, plan.json as prune --json prints it, and what certify says of them in Python."""
    argv = ["prune", "clitoys:toy", "--method", "magnitude", "--json", *FC, "-o", "pruned.safetensors"]
    assert main(argv) == 0
    (work / "plan.json").write_text(capsys.readouterr().out)
    import clitoys

    model, dense = (clitoys.toy().eval() for _ in range(2))
    model.load_state_dict(load_file("pruned.safetensors"))
    seen = list(folder_batches(images, preprocessing_of(dense)))
    return lambda **options: rmtkern.certify(model, dense, seen, **options)


def test_certify_says_what_the_function_says(pruned, images, capsys):
    argv = [*CERTIFY, str(images), "--pruned", "pruned.safetensors"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for words in ("end to end, osc", "proof for these images", "fc1.weight", "fc2.weight", "6 images, 3 classes"):
        assert words in out
    assert main([*argv, "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found == json.loads(pruned().to_json())
    assert found["measured"]["accuracy"] is not None and [step["name"] for step in found["steps"]] == [
        "fc1.weight", "fc2.weight"
    ]  # fmt: skip


def test_certify_options(pruned, images, capsys):
    argv = [*CERTIFY, str(images), "--pruned", "pruned.safetensors", "--json"]
    assert main([*argv, "--l2", "0.1", "--l1", "0.01", "--restore", "--local", "--dtype", "float64"]) == 0
    wanted = pruned(l2=0.1, l1=0.01, restore=True, local=True, dtype=torch.float64)
    assert strict_json(capsys.readouterr().out) == json.loads(wanted.to_json())
    assert main([*argv, "--limit", "3", "--batch", "2", "--no-labels"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["images"] == 3 and found["measured"]["accuracy"] is None


@pytest.mark.parametrize("plan", ["plan.json", "pruned.safetensors"])
def test_certify_repeats_a_plan(pruned, images, capsys, plan):
    assert main([*CERTIFY, str(images), "--plan", plan, "--json"]) == 0
    assert strict_json(capsys.readouterr().out) == json.loads(pruned().to_json())


def test_certify_refuses_what_is_no_pair(pruned, work, images, capsys):
    argv = [*CERTIFY, str(images)]
    fails(capsys, [*argv, "--plan", "gone.json"], 2, "gone.json: no such file; expected the JSON of a plan")
    (work / "bad.json").write_text("[1]")
    fails(capsys, [*argv, "--plan", "bad.json"], 2, "bad.json: not the JSON of a PrunePlan")
    other = ["certify", "demo", "--images", str(images), "--limit", "1"]
    fails(capsys, [*other, "--plan", "plan.json"], 2, "the plan cannot be repeated on this model (the zeros of fc1")
    fails(capsys, [*other, "--pruned", "pruned.safetensors"], 2, "pruned.safetensors: does not fit demo")
    state = load_file("pruned.safetensors")
    save_file({**state, "fc1.weight": torch.ones_like(state["fc1.weight"])}, "full.safetensors",
              read_metadata("pruned.safetensors"))  # fmt: skip
    fails(capsys, [*argv, "--pruned", "full.safetensors"], 2, "the zeros of fc1.weight (1 of 2 weights) differ")
    same = [*argv, "--checkpoint", "pruned.safetensors", "--pruned", "pruned.safetensors"]
    fails(capsys, same, 2, "the two models have the same weights")
    name = ["certify", "vit_tiny_patch16_224", "--random-weights", "--images", str(images)]
    fails(capsys, [*name, "--pruned", "pruned.safetensors"], 2, "--random-weights draws other weights")


def test_certify_refuses_no_images(pruned, work, capsys):
    (work / "empty" / "a").mkdir(parents=True)
    end = ["--pruned", "pruned.safetensors"]
    fails(capsys, [*CERTIFY, "empty", *end], 2, "empty: found no image")
    fails(capsys, [*CERTIFY, "none", *end], 2, "none: no such folder; expected one with a sub-folder of images")
    fails(capsys, [*CERTIFY, "images", *end, "--limit", "0"], 2, "--limit must be at least 1, got 0")
    fails(capsys, [*CERTIFY, "images", *end, "--batch", "0"], 2, "batch_size: expected an integer of at least 1")
    for words in ([], [*end, "--plan", "plan.json"]):
        with pytest.raises(SystemExit):
            main([*CERTIFY, "images", *words])
        assert "--pruned" in capsys.readouterr().err


def test_prune_chooses_among_patterns_by_times(work, images, capsys):
    end = ["--calibration", str(images), "--calibration-images", "4", *FC, "-o", "p.safetensors"]
    argv = ["prune", "clitoys:toy", "--times", "times.json", "--pattern", "unstructured", "1x2", "4x2", *end]
    times_of(load_model("clitoys:toy"), ("*fc1*", "*fc2*")).save("times.json")
    assert main([*argv, "--sparsity", "0.5"]) == 0
    assert "chosen: " in capsys.readouterr().out
    assert load_plan("p.safetensors").sparsity == pytest.approx(0.5, abs=0.01)
    assert main([*argv, "--linear-speedup", "1.4"]) == 0
    assert load_plan("p.safetensors").linear_speedup >= 1.4
    Path("times.json").unlink()
    assert main([*argv, "--linear-speedup", "1", "--batch", "1"]) == 0  # what is fast here is not known
    assert set(PatternTimes.load("times.json").of("fc1.weight").ms) == {"unstructured", "1x2", "4x2"}
    capsys.readouterr()
    alone = ["prune", "clitoys:toy", "--times", "times.json", *end]
    fails(capsys, alone, 2, "--times are for choosing among several patterns: give --pattern two or more")
    fails(capsys, ["bench", "clitoys:toy", "--pattern", "4x1", "4x2"], 2, "one --pattern at a time: prune with several")
    fails(capsys, [*argv, "--speedup", "1.5"], 2, "--speedup takes one --pattern; with several, use --linear-speedup")
    both = ["--linear-speedup", "1.5", "--sparsity", "0.5"]
    fails(capsys, [*argv, *both], 2, "--linear-speedup finds the sparsity: give it no --sparsity, --max-drop or")


def test_prune_n_of_m(work, capsys):
    assert main(["prune", "clitoys:toy", "--pattern", "2:4", "-o", "p.safetensors", *FC]) == 0
    weight = load_file("p.safetensors")["fc1.weight"]
    assert ((weight.view(96, -1, 4) != 0).sum(-1) == 2).all()


def test_bench_prunes_and_reports(work, capsys):
    code = main(["bench", "clitoys:toy", "--sparsity", "0.9", "--batch", "2", "1", "--json", *FC])
    out, err = capsys.readouterr()
    found = strict_json(out)
    assert [layer["name"] for layer in found["layers"]] == ["fc1", "fc2", "head"]
    assert found["layers"][0]["sparsity"] == pytest.approx(0.9, abs=0.2)
    assert len(found["end_to_end"]) == 2 and found["environment"]["cpu"]
    slower = [min(t["original_ms"], t["dense_ms"]) / t["packed_ms"] < 0.97 for t in found["end_to_end"]]
    assert code == int(any(slower)) and ("slower" in err) == any(slower)


def test_advise(work, capsys):
    words = ["advise", "clitoys:toy", "--batch", "2", "--sparsity", "0.9", "--pattern", "unstructured", "2:4"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "pattern" in out and "2:4" in out and "thread(s)" in out
    assert main([*words, "--json"]) == 0
    record = strict_json(capsys.readouterr().out)
    assert [(row["dtype"], row["pattern"], row["sparsity"]) for row in record["rows"]] == [
        (dtype, *what) for dtype in ("float32", "bfloat16") for what in (("unstructured", 0.9), ("2:4", 0.5))
    ]
    fails(capsys, ["advise", "clitoys:toy", "--batch", "0"], 2, "--batch must be at least 1, got 0")
    fails(capsys, ["advise", "clitoys:toy", "--pattern", "x"], 2, "unknown pattern 'x'")


def test_bench_writes_the_packed_model(work, capsys, monkeypatch):
    def cheap(calls, budget_ms):
        for call in calls.values():
            call()
        return {name: 1.0 if name in ("packed", "bitmask") else 2.0 for name in calls}

    monkeypatch.setattr("rmtkern.packing.device.interleaved_ms", cheap)
    assert main(["bench", "clitoys:toy", "--sparsity", "0.8", *FC, "-o", "packed.safetensors"]) == 0
    capsys.readouterr()
    import clitoys

    model = rmtkern.load("packed.safetensors", clitoys.toy())
    assert (model.fc1.weight.layout, model.fc2.weight.layout) == ("bitmask", "bitmask")
    assert rmtkern.load_plan("packed.safetensors").sparsity == pytest.approx(0.8, abs=1e-3)
    fails(capsys, ["bench", "clitoys:toy", "-o", "no/packed.safetensors"], 2, "no: no such folder to write packed")
    argv = ["analyze", "clitoys:toy", "--checkpoint", "packed.safetensors"]
    fails(capsys, argv, 2, "packed.safetensors: it holds a packed model, and dense weights are needed; give the file")


def test_bench_that_packs_nothing_prints_what_it_measured(work, capsys, monkeypatch):
    def dense(calls, budget_ms):
        for call in calls.values():
            call()
        return {name: 1.0 if name in ("dense/torch", "original") else 2.0 for name in calls}

    monkeypatch.setattr("rmtkern.packing.device.interleaved_ms", dense)
    argv = ["bench", "clitoys:toy", *FC, "--json", "-o", "packed.safetensors"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert not any(layer["packed"] for layer in strict_json(out)["layers"])
    assert err.startswith("rmtkern bench: nothing gained, so every layer stays dense and packed.safetensors was not")
    assert not (work / "packed.safetensors").exists()
    assert main([*argv, "--dtype", "bfloat16"]) == 0  # which is a packed model, if only by its dtype
    import clitoys

    served = rmtkern.load("packed.safetensors", clitoys.toy())
    assert served.fc1.weight.dtype == torch.bfloat16 and served(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_bench_takes_the_zeros_of_a_checkpoint(work, capsys):
    assert main(["prune", "clitoys:toy", "--sparsity", "0.75", "-o", "p.safetensors", *FC]) == 0
    capsys.readouterr()
    main(["bench", "clitoys:toy", "--checkpoint", "p.safetensors", "--keep-zeros", "--batch", "1"])
    out = capsys.readouterr().out
    assert "strongest dense" in out and "cpu " in out
    main(["bench", "clitoys:toy", "--keep-zeros", "--batch", "1", "--json"])
    assert all(layer["sparsity"] < 0.01 for layer in strict_json(capsys.readouterr().out)["layers"])


def test_bench_fails_if_the_packed_model_is_slower(work, capsys, monkeypatch):
    report = SimpleNamespace(
        end_to_end=[SimpleNamespace(speedup=1.3), SimpleNamespace(speedup=0.9)], to_json=lambda: "{}"
    )
    monkeypatch.setattr("rmtkern.cli.bench.pack_", lambda model, examples, **options: report)
    assert main(["bench", "clitoys:toy", "--json", *FC]) == 1
    out, err = capsys.readouterr()
    assert strict_json(out) and err == "rmtkern bench: the packed model is slower than the strongest dense form\n"


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "bitmask", "nofm", "reference", "cpu ", "how to get it"):
        assert word in out
    assert main(["info", "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["versions"]["torch"] and found["environment"]["cpu"]
    assert {row["layout"] for row in found["available"]} >= {"bitmask", "nofm", "dense"}
    for name, version in found["versions"].items():
        assert (name in found["missing"]) == (version is None)


def test_demo_passes_its_options_on(tmp_path, capsys, monkeypatch):
    from rmtkern.demo import run

    asked = []

    def fake(output, say, *, effort):
        asked.append((output, effort))
        say("words")
        return {"ok": 1}

    monkeypatch.setattr(run, "run_demo", fake)
    assert main(["demo", "--json", "-o", str(tmp_path), "--images", "12", "--quick"]) == 0
    assert strict_json(capsys.readouterr().out) == {"ok": 1}
    assert asked[0][0] == tmp_path and asked[0][1].images == 12 and asked[0][1].pack_ms == run.QUICK.pack_ms
    assert main(["demo"]) == 0
    assert "words" in capsys.readouterr().out and asked[1][1] == run.FULL


def test_threads(work, capsys):
    before = torch.get_num_threads()
    try:
        most = os.cpu_count()
        assert main(["info", "--threads", str(most), "--json"]) == 0
        assert strict_json(capsys.readouterr().out)["environment"]["threads"] == most
        for wrong in (0, most + 1, 10**9):
            fails(capsys, ["info", "--threads", str(wrong)], 2, f"--threads must be 1 to {most}, the CPUs here, got ")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["analyze", "no_such_net"], 2, "no timm model of that name"),
        (["analyze", "clitoys:nothing"], 2, "expected an importable module:function"),
        (["analyze", "clitoys:broken"], 1, "no\\nsuch key"),
        (["analyze", "clitoys:toy", "--checkpoint", "gone.safetensors"], 2, "gone.safetensors: no such file"),
        (["analyze", "clitoys:toy", "--targets", "zzz"], 2, "zzz"),
        (
            ["prune", "clitoys:toy", "--sparsity", "1.0", "-o", X],
            2,
            "sparsity: expected a fraction in [0, 1), got 1.0",
        ),
        (["prune", "clitoys:toy", "--method", "magic", "-o", X], 2, "unknown method 'magic'"),
        (["prune", "clitoys:toy", "--pattern", "3:1", "-o", X], 2, "3:1"),
        (["prune", "clitoys:toy", "-o", "no/such/x"], 2, "no such folder to write x into; create it first"),
        (["prune", "clitoys:toy", "-o", "."], 2, ".: is a folder; give the name of a file to write"),
        (["prune", "clitoys:toy", "-o", "x.pt"], 2, "x.pt: expected a name that ends in .safetensors"),
        (["prune", "clitoys:toy", "--method", "wanda", "--evaluate", "none", "-o", X], 2, "method 'wanda' with score"),
        (["analyze", "clitoys:toy", "-o", "."], 2, "is a folder; give the name of a file to write"),
        (["analyze", "clitoys:toy", "-o", X], 2, "is the name of a checkpoint, and no tensors are written here"),
        (["report", "clitoys.py", "-o", X], 2, "expected a name that ends in .html or .htm"),
        (
            ["sweep", "clitoys:toy", "--images", "none", "-o", "s.csv", "--picture", "x"],
            2,
            "ends in .png or .pdf or .svg",
        ),
        (
            ["bench", "clitoys:toy", "-o", "clitoys.py"],
            2,
            "clitoys.py: is a file; give a name that ends in .safetensors",
        ),
        (
            ["bench", "clitoys:toy", "--keep-zeros", "--sparsity", "0.5"],
            2,
            "--keep-zeros takes the zeros of the checkp",
        ),
        (["analyze", "clitoys:TOYS"], 2, "clitoys:TOYS: expected an importable module:function"),
        (["analyze", "clitoys:Toy.forward"], 2, "that returns a model, such as mymodel:model"),
        (["analyze", ":toy"], 2, ":toy: expected an importable module:function that returns a model, such as mymodel:"),
        (["analyze", "torch:add"], 2, "torch:add: "),
        (["analyze", "clitoys:wants"], 2, "returns a model when it is called with no argument (missing a required arg"),
        (["shrink", "clitoys:toy", "--mlp", "0.5", "-o", X], 2, "found no MLP or attention in Toy that parts can be"),
        (
            ["prune", "clitoys:toy", "--evaluate", "none", "-o", X],
            2,
            "none: no such folder; expected one with a sub-",
        ),
        (["prune", "clitoys:toy", "--calibration", "none", "-o", X], 2, "none: no such folder"),
        (["bench", "clitoys:toy", "--batch", "0"], 2, "--batch must be at least 1, got [0]"),
        (["demo", "--images", "0", "-o", "out"], 2, "images: expected 1 to 10000 test images, got 0"),
    ],
)
def test_errors(work, capsys, argv, code, message):
    fails(capsys, argv, code, message)
    assert not (work / X).exists() and not (work / "out").exists()


def test_a_checkpoint_of_another_model(work, capsys):
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    argv = ["analyze", "clitoys:toy", "--checkpoint", "other.safetensors"]
    fails(capsys, argv, 2, "does not fit clitoys:toy: 8 missing (patch_embed.weight, ")


def test_debug_shows_the_traceback(work, capsys):
    assert main(["analyze", "clitoys:broken", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_torch_file_with_more_than_tensors_is_refused_without_advice_to_run_it(work, capsys):
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    assert main(["analyze", "clitoys:toy", "--checkpoint", "module.pt"]) == 2
    err = capsys.readouterr().err
    assert "as torch.save(model.state_dict(), path) writes (Unsupported global: GLOBAL torch.nn.modules.linear" in err
    assert "weights_only" not in err and len(err) < 300


def test_no_images_are_no_request(work, images, capsys):
    argv = ["finetune", "clitoys:toy", "--train", str(images), "--train-images", "0", "-o", X]
    fails(capsys, argv, 2, "limit: expected at least one image, got 0")


def test_interrupted(work, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rmtkern.cli.inputs.load_model", interrupt)
    fails(capsys, ["analyze", "clitoys:toy"], 130, "interrupted")


@pytest.mark.parametrize(
    "argv", [[], ["destroy"], ["prune", "demo"], ["analyze"], ["prune", "demo", "--sparsity", "half"]]
)
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "usage: rmtkern" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"rmtkern {rmtkern.__version__}\n"


def test_help_says_what_each_setting_of_a_training_is(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--clip CLIP largest length of the gradient of the surviving weights; None: not clipped; default: 1.0" in out
    assert "see FinetuneConfig" not in out
    args = cli._parser().parse_args(["finetune", "demo", "--train", "t", "-o", X, "--clip", "none", "--patience", "3"])
    assert (args.clip, args.patience) == (None, 3)


@pytest.mark.parametrize("verb", [[], ["demo"], ["analyze"], ["prune"], ["certify"], ["bench"], ["info"]])
def test_help_tells_the_exit_codes(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*verb, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes:" in out and "  2  bad usage or bad input" in out


def test_as_a_module_in_a_process_of_its_own(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(rmtkern.__file__).resolve().parents[1])}

    def run(*words):
        argv = [sys.executable, "-m", "rmtkern", *words]
        return subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)

    good = run("analyze", "demo", "--json")
    assert good.returncode == 0, good.stderr
    assert "blocks.0.mlp.fc1.weight" in strict_json(good.stdout)
    bad = run("prune", "demo", "--sparsity", "2", "-o", X)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "rmtkern prune: sparsity: expected a fraction in [0, 1), got 2.0\n"


def test_tokens_are_merged_wherever_a_model_is_loaded(tmp_path, capsys):
    out = tmp_path / "pruned.safetensors"
    arguments = ["prune", "vit_tiny_patch16_224", "--random-weights", "-o", str(out), "--merge-tokens"]
    assert main([*arguments, "8"]) == 0
    model = model_of(cli._parser().parse_args([*arguments, "8"]))
    assert merging_of(model).r == 8 and not model.training
    assert load_file(out).keys() == model.state_dict().keys()
    assert main([*arguments, "-1"]) != 0
    assert "r: expected at least 0, got -1" in capsys.readouterr().err
