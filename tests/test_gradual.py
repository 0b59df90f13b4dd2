"""prune_gradually_: the cycles are prune_ and finetune_ in turn, the switch of methods, and every refusal."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rmtkern import gradual
from rmtkern.api import prune_
from rmtkern.cli import main
from rmtkern.evaluation import Evaluation, evaluate
from rmtkern.gradual import CYCLE, GRID, prune_gradually_
from rmtkern.loading import load_plan
from rmtkern.models import prunable_weights
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_
from tests.test_cli import FC, fails, images, strict_json, work  # noqa: F401  (fixtures)

QUICK = FinetuneConfig(epochs=1, lr=0.02, optimizer="sgd", batch_size=16, distill=0.0)


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 4))


def data(seed, count=64):
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


TRAIN, HELD = data(1), data(2)


def by_hand(methods, sparsities, held_out):
    """The same cycles, written out."""
    model, scores = net(), []
    for method, sparsity in zip(methods, sparsities, strict=True):
        plan = prune_(model, sparsity, method, calibration=TRAIN if method == "ser" else None)
        finetune_(model, plan, TRAIN, held_out=held_out, config=QUICK)
        scores.append(evaluate(model, HELD).top1)
    return model, plan, scores


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_hybrid_is_magnitude_to_20_percent_and_ser_above():
    model = net()
    found = prune_gradually_(model, TRAIN, (0.1, 0.2, 0.25, 0.5), held_out=HELD, finetune=QUICK)
    other, plan, scores = by_hand(["magnitude"] * 2 + ["ser"] * 2, (0.1, 0.2, 0.25, 0.5), HELD)
    assert equal(model, other) and found.plan.layers == plan.layers
    assert [cycle.method for cycle in found.cycles] == ["magnitude", "magnitude", "ser", "ser"]
    assert [cycle.accuracy for cycle in found.cycles] == scores and found.reference == evaluate(net(), HELD).top1
    assert found.drop is None and json.loads(found.to_json())["plan"] == json.loads(plan.to_json())
    found.plan.verify(model)


def test_one_method_without_held_out_images():
    model = net()
    found = prune_gradually_(model, TRAIN, (0.3, 0.6), "uniform", finetune=QUICK, pattern="1x2")
    assert [cycle.accuracy for cycle in found.cycles] == [None, None] and found.reference is None
    other = net()
    for sparsity in (0.3, 0.6):
        finetune_(other, prune_(other, sparsity, "uniform", "1x2"), TRAIN, config=QUICK)
    assert equal(model, other) and "before the first" not in str(found)


def test_the_haar_step_is_for_the_first_cycle_and_other_fields_for_all():
    model, other = net(), net()
    options = {"alpha_regime": True, "targets": ("0", "2")}
    found = prune_gradually_(model, TRAIN, (0.1, 0.5), "seb", finetune=QUICK, haar=0.5, **options)
    for sparsity, haar in ((0.1, 0.5), (0.5, 0.0)):
        finetune_(other, prune_(other, sparsity, "seb", haar=haar, **options), TRAIN, config=QUICK)
    assert equal(model, other) and found.plan.config.alpha_regime and found.plan.config.haar == 0
    plain = net()
    prune_gradually_(plain, TRAIN, (0.1, 0.5), "seb", finetune=QUICK, targets=("0", "2"))
    assert not equal(plain, model)


@pytest.mark.parametrize(("scores", "methods", "note"), [
    # before, then for each cycle pruned and fine-tuned; a drop of exactly 0.01 is allowed
    ([0.9, 0.5, 0.9, 0.5, 0.889, 0.5, 0.9, 0.5, 0.9], ["magnitude", "magnitude", "ser", "ser"], "at 0.2"),
    ([0.9, 0.5, 0.1, 0.5, 0.9, 0.5, 0.9, 0.5, 0.9], ["magnitude", "ser", "ser", "ser"], "at 0.1"),
    ([0.9, 0.5, 0.89, 0.5, 0.95, 0.5, 0.89, 0.5, 0.8], ["magnitude"] * 4, "not yet"),
])  # fmt: skip
def test_drop_threshold_changes_at_the_next_sparsity(monkeypatch, scores, methods, note):
    given = iter(scores)
    monkeypatch.setattr(gradual, "evaluate", lambda *_, **__: Evaluation(next(given), 1.0, 0.0, 64))
    model = net()
    found = prune_gradually_(
        model, TRAIN, (0.1, 0.2, 0.3, 0.4), "drop-threshold", held_out=HELD, drop=0.01, finetune=QUICK
    )
    assert [cycle.method for cycle in found.cycles] == methods and next(given, None) is None
    assert equal(model, by_hand(methods, (0.1, 0.2, 0.3, 0.4), HELD)[0])
    assert f"fallen by more than 1 points: {note}" in str(found)
    assert [cycle.pruned for cycle in found.cycles] == [0.5] * 4


def test_the_published_cycle():
    assert len(GRID) == 14 and GRID[0] == 0.05 and GRID[-1] == 0.7
    assert (CYCLE.epochs, CYCLE.lr, CYCLE.momentum, CYCLE.label_smoothing, CYCLE.clip) == (1, 3e-5, 0.9, 0.1, 1.0)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"method": "drop-threshold"}, ValueError, "method 'drop-threshold' needs held_out="),
    ({"method": "magic"}, ValueError, "unknown method 'magic'"),
    ({"sparsities": (0.3, 0.3)}, ValueError, r"expected one or more rising fractions in \[0, 1\), got \[0.3, 0.3\]"),
    ({"sparsities": ()}, ValueError, r"expected one or more rising fractions in \[0, 1\), got \[\]"),
    ({"sparsities": (0.5, 1.0)}, ValueError, r"sparsity: expected a fraction in \[0, 1\), got 1.0"),
    ({"sparsities": (0.1, 0.5), "pattern": "2:4"}, ValueError, "pattern '2:4' takes only sparsity 0.5, got 0.1"),
    ({"haar": -1}, ValueError, "haar: expected a finite number >= 0, got -1"),
    ({"method": "seb", "har": 1}, TypeError, "unknown field 'har'; expected one of budget, score"),
    ({"drop": 1}, ValueError, r"drop: expected a fraction in \[0, 1\), got 1"),
    ({"drop": "1"}, TypeError, "drop: expected a number, got str"),
    ({"finetune": {}}, TypeError, "finetune: expected a FinetuneConfig, got dict"),
    ({"held_out": iter([HELD])}, TypeError, "held_out: got list_iterator, which can be read once only"),
])  # fmt: skip
def test_bad_requests_change_nothing(options, error, message):
    model = net()
    with pytest.raises(error, match=message):
        prune_gradually_(model, TRAIN, **{"sparsities": (0.2, 0.4), **options})
    assert equal(model, net())


def test_a_failed_cycle_leaves_the_last_step(monkeypatch):
    model, states = net(), []

    def fail(model, plan, *args, **options):
        if plan.config.sparsity == 0.4:
            states.append(copy.deepcopy(model))
            raise KeyboardInterrupt
        return finetune_(model, plan, *args, **options)

    monkeypatch.setattr(gradual, "finetune_", fail)
    with pytest.raises(KeyboardInterrupt):
        prune_gradually_(model, TRAIN, (0.2, 0.4), finetune=QUICK)
    zeros = sum(int((weight.parameter == 0).sum()) for weight in prunable_weights(model))
    assert equal(model, states[0]) and zeros == round(0.4 * 2240)


def test_the_command_line(work, images, capsys):  # noqa: F811
    argv = ["gradual", "clitoys:toy", "--train", "images", "--held-out", "images", "--evaluate", "images", *FC,
            "--sparsities", "0.2", "0.4", "--batch-size", "4", "--holdout", "0", "-o", "steps.safetensors"]  # fmt: skip
    assert main([*argv, "--method", "drop-threshold", "--drop", "0.5", "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert [cycle["sparsity"] for cycle in found["cycles"]] == [0.2, 0.4] and found["drop"] == 0.5
    assert found["before"] and found["after"] and found["output"] == "steps.safetensors"
    plan, tensors = load_plan("steps.safetensors"), load_file("steps.safetensors")
    assert sum(int((tensors[layer.name] == 0).sum()) for layer in plan.layers) == plan.selected.zeros
    assert plan.config.sparsity == 0.4
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "ser" in out and "before the first" in out and "wrote steps.safetensors" in out
    assert main([*argv, "--method", "seb", "--haar", "0.5", "--alpha-regime", "--json"]) == 0
    assert strict_json(capsys.readouterr().out)["plan"]["config"]["alpha_regime"] is True
    fails(capsys, [*argv, "--method", "half"], 2, "unknown method 'half'")
    fails(capsys, [*argv, "--lr", "0"], 2, "lr: expected a finite number > 0")
