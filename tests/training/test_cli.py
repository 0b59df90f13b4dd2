"""rmtkern finetune: a pruned checkpoint in, a fine-tuned one with the same zeros and plan out."""

from safetensors.torch import load_file

from rmtkern.cli import main
from rmtkern.storage import read_metadata
from tests.test_cli import FC, fails, images, strict_json, work  # noqa: F401  (fixtures)

TUNE = ["finetune", "clitoys:toy", "--train", "images", "-o", "tuned.safetensors"]


def prune(capsys):
    assert main(["prune", "clitoys:toy", "--sparsity", "0.7", *FC, "-o", "pruned.safetensors"]) == 0
    assert main(["prune", "clitoys:toy", "--sparsity", "0", *FC, "-o", "dense.safetensors"]) == 0
    capsys.readouterr()
    return [*TUNE, "--checkpoint", "pruned.safetensors"]


def test_finetune_holds_the_zeros_and_keeps_the_plan(work, images, capsys):  # noqa: F811
    argv = [*prune(capsys), "--teacher", "dense.safetensors", "--evaluate", "images", "--epochs", "4", "--lr", "0.01"]
    argv += ["--holdout", "0", "--batch-size", "2", "--autocast", "bfloat16", "--run", "run.safetensors"]
    assert main([*argv, "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["after"]["loss"] < found["before"]["loss"] and found["output"] == "tuned.safetensors"
    assert found["report"]["config"]["batch_size"] == 2 and found["report"]["best_epoch"] == 4
    before, after = load_file("pruned.safetensors"), load_file("tuned.safetensors")
    for name in ("fc1.weight", "fc2.weight"):
        assert bool(((before[name] == 0) == (after[name] == 0)).all()) and not bool((before[name] == after[name]).all())
    assert read_metadata("tuned.safetensors")["rmtkern"] == read_metadata("pruned.safetensors")["rmtkern"]
    assert main(argv) == 0  # goes on from a finished run: the same result
    out = capsys.readouterr().out
    assert "kept: epoch 4" in out and "wrote tuned.safetensors" in out
    assert all(bool((load_file("tuned.safetensors")[name] == after[name]).all()) for name in after)


def test_held_out_images_choose_the_state(work, images, capsys):  # noqa: F811
    argv = [*prune(capsys), "--epochs", "1", "--held-out", "images", "--batch-size", "2", "--json"]
    assert main(argv) == 0
    row = strict_json(capsys.readouterr().out)["report"]["epochs"][0]
    assert main([*argv, "--evaluate", "images"]) == 0
    before = strict_json(capsys.readouterr().out)["before"]
    assert row["held_out_accuracy"] == before["top1"]  # of the same images, all of them


def test_bad_use_of_finetune(work, images, capsys):  # noqa: F811
    argv = prune(capsys)
    fails(capsys, [*argv, "--epochs", "0"], 2, "epochs: expected at least 1")
    fails(capsys, [*argv, "--optimizer", "lion"], 2, "unknown optimizer 'lion'")
    fails(capsys, [*argv, "--teacher", "none.safetensors"], 2, "none.safetensors: no such file")
    fails(capsys, [*argv[:-2], "-o", "none/tuned.safetensors"], 2, "no such folder to write tuned.safetensors into")
    assert not (work / "tuned.safetensors").exists()
