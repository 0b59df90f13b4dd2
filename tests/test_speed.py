"""prune_to_speed_: the lowest sparsity that is fast enough, by the method asked for; nothing changed on failure."""

import functools

import pytest
import timm
import torch
from torch import nn

import rmtkern.speed
from rmtkern.api import prune_
from rmtkern.cli import main
from rmtkern.loading import load_plan
from rmtkern.pruning.plan import PruneConfig
from rmtkern.speed import prune_to_speed_


def net():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return nn.Sequential(first, nn.Linear(64, 64), nn.Linear(64, 8)).eval()


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def speeds(monkeypatch):
    """pack_ without time: the packed model is 1 + 2 (sparsity of its first weight) times as fast as dense."""
    real, seen = rmtkern.speed.pack_, []

    def pack(model, example, **options):
        weight = model[0][0].weight
        fast = 1 + 2 * float((weight == 0).float().mean())

        def measure(calls, budget_ms):
            for call in calls.values():
                call()
            if "original" in calls:
                return {name: {"original": 2 * fast, "dense": fast, "packed": 1.0}[name] for name in calls}
            return {label: {"bitmask": 1.0, "dense/onednn": 8.0}.get(label, 9.0) for label in calls}

        seen.append(options["decisions"])
        return real(model, example, **{**options, "timer": measure})

    monkeypatch.setattr(rmtkern.speed, "pack_", pack)
    return seen


@pytest.mark.parametrize("method", ["uniform", "wanda", "admm"])
def test_the_lowest_sparsity_that_is_fast_enough(method, speeds):
    model = net()
    calibration = None if method == "uniform" else torch.randn(64, 64)
    config = PruneConfig(method=method, targets="linear")
    report = prune_to_speed_(model, 2.0, X, config, calibration, tolerance=0.05)
    last = report.trials[-1]
    assert last.method == method == report.plan.config.method
    assert last.speedup >= 2.0 and 0.5 <= last.sparsity <= 0.5 + 0.05  # 1 + 2 s = 2 at s = 0.5
    assert report.plan.config.sparsity == last.sparsity
    report.plan.verify(model)
    below = [trial for trial in report.trials if trial.speedup < 2.0]
    assert last.sparsity - max(trial.sparsity for trial in below) <= 0.05
    assert [trial.method for trial in report.trials[:-1]] == ["uniform" if method == "uniform" else "magnitude"] * (
        len(report.trials) - 1
    )
    assert len(set(map(str, speeds))) == 1  # every trial uses the decisions of those before
    assert f"asked: 2x; packed, the model pruned to {last.sparsity:g} ran {last.speedup:.2f}x" in str(report)
    model.train()(X).sum().backward()  # pruned, not packed


def test_prune_finds_it_too(speeds):
    model, other = net(), net()
    plan = prune_(model, method="uniform", targets="linear", speedup=2.0, example=X, tolerance=0.05)
    report = prune_to_speed_(other, 2.0, X, PruneConfig(method="uniform", targets="linear"), tolerance=0.05)
    assert plan == report.plan and unchanged(model, other.state_dict())


@pytest.mark.parametrize(("options", "message"), [
    ({"speedup": 2.0}, "speedup= and example= go together"),
    ({"example": X}, "speedup= and example= go together"),
    ({"speedup": 2.0, "example": X, "sparsity": 0.3}, "got a sparsity and speedup, which finds the sparsity"),
    ({"speedup": 2.0, "example": X, "max_drop": 0.1}, "got max_drop or evaluate, and speedup"),
    ({"speedup": 2.0, "example": X, "method": "cast", "prior": {"w": X}}, "a prior that is given as tensors has one"),
])  # fmt: skip
def test_prune_refuses_half_a_request(options, message):
    model = net()
    with pytest.raises(TypeError, match=message):
        prune_(model, **options)
    assert unchanged(model, net().state_dict())


def test_a_stand_in_that_was_too_fast_is_made_up_for(speeds, monkeypatch):
    real = rmtkern.speed.prune_

    def slower(model, config, **options):
        plan = real(model, config, **options)
        if config.method == "wanda":  # as if its zeros were worth less
            with torch.no_grad():
                model[0][0].weight[:6] += 1e-3
        return plan

    monkeypatch.setattr(rmtkern.speed, "prune_", slower)
    config = PruneConfig(method="wanda", targets="linear")
    report = prune_to_speed_(net(), 2.0, X, config, torch.randn(64, 64), tolerance=0.05)
    tried = [trial for trial in report.trials if trial.method == "wanda"]
    assert len(tried) > 1 and [trial.speedup >= 2 for trial in tried] == [False] * (len(tried) - 1) + [True]


def test_what_cannot_be_reached_says_what_was_and_changes_nothing(speeds):
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match=r"no sparsity up to 0.5 makes the packed model 2.5x .*: 2.00x at 0.5;"):
        prune_to_speed_(model, 2.5, X, PruneConfig(targets="linear"), highest=0.5)
    assert unchanged(model, before) and len(speeds) == 1


def test_a_failure_half_way_changes_nothing(monkeypatch, speeds):
    model = net()
    before, real = state(model), rmtkern.speed.pack_

    def fail(*args, **options):
        if len(speeds) == 3:
            raise OSError("injected")
        return real(*args, **options)

    monkeypatch.setattr(rmtkern.speed, "pack_", fail)
    with pytest.raises(OSError, match="injected"):
        prune_to_speed_(model, 2.0, X, PruneConfig(targets="linear"))
    assert unchanged(model, before)


@pytest.fixture
def briefly(monkeypatch):
    """pack_ measures for real, but each thing for 5 ms only."""
    monkeypatch.setattr(rmtkern.speed, "pack_", functools.partial(rmtkern.speed.pack_, budget_ms=5))


def test_measured_for_real(briefly):
    model = net()
    report = prune_to_speed_(
        model, 0.01, X, PruneConfig(targets="linear"), tolerance=0.5
    )  # any packed model reaches it
    assert report.trials[-1].speedup >= 0.01 and 0 < report.plan.sparsity <= 0.5
    report.plan.verify(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"speedup": 0}, ValueError, r"speedup: expected a finite number above 0, got 0"),
        ({"speedup": "fast"}, TypeError, "speedup: expected a number, got str"),
        ({"highest": 1.0}, ValueError, r"highest: expected a fraction in \(0, 1\), got 1.0"),
        ({"tolerance": 0}, ValueError, r"tolerance: expected a fraction in \(0, 1\), got 0"),
        ({"config": "row"}, TypeError, "config: expected a PruneConfig, got str"),
        ({"config": PruneConfig(pattern="2:4")}, ValueError, "pattern '2:4' has one sparsity only"),
        ({"config": PruneConfig(method="wanda")}, ValueError, "needs images; pass calibration="),
        ({"calibration": iter([])}, TypeError, "calibration: got list_iterator, which can be read once only"),
    ],
)
def test_nonsense_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        prune_to_speed_(**{"model": net(), "speedup": 1.5, "example": X, **options})


def demo():
    return timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=4, num_classes=5, img_size=32
    ).eval()


def test_command_line(briefly, tmp_path, capsys):
    spec, file = "tests.test_speed:demo", str(tmp_path / "small.safetensors")
    assert main(["prune", spec, "--speedup", "0.01", "--batch", "1", "--method", "uniform", "-o", file]) == 0
    assert "asked: 0.01x; packed, the model pruned to" in capsys.readouterr().out
    assert load_plan(file).config.method == "uniform"
    for more in (["--sparsity", "0.5"], ["--max-drop", "0.1", "--images", "x"]):
        assert main(["prune", spec, "--speedup", "1.5", *more, "-o", file]) == 2
        assert "--speedup finds the sparsity: give it no --sparsity and no --max-drop" in capsys.readouterr().err
