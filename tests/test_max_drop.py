"""prune_(max_drop=, evaluate=): what a held-out split allows, with any method, and nothing lost on the way."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rmtkern.api import prune_
from rmtkern.evaluation import evaluate
from rmtkern.models import prunable_weights
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.pruning.presets import PRESETS
from rmtkern.pruning.score import GROUPED

IMAGES = torch.randn(120, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


FC = ("blocks.*",)


def net():
    torch.manual_seed(1)
    return Net().eval()


def split(model):
    """Images with the labels that the dense model gives: it scores 100 %."""
    with torch.no_grad():
        return IMAGES, model(IMAGES).argmax(1)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


METHODS = [(method, "unstructured") for method, preset in PRESETS.items() if preset.score not in GROUPED]
METHODS += [("magnitude", "4x1"), ("uniform", "1x2"), ("seb", "2x2")]


@pytest.mark.parametrize(("method", "pattern"), METHODS)
def test_every_method_and_pattern(method, pattern):
    model = net()
    data, before = split(model), copy.deepcopy(model)
    calibrated = PruneConfig(method=method).resolve(True).needs_calibration
    calibration = data if calibrated else None
    options = {"method": method, "pattern": pattern, "targets": FC, "calibration": calibration}
    plan = prune_(model, max_drop=0.05, evaluate=data, tolerance=0.05, **options)
    target = plan.target
    good = [trial for trial in target.trials if target.allows(trial.accuracy)]
    assert plan.config.sparsity == max(trial.sparsity for trial in good)
    assert target.accuracy == 1.0 and target.images == 120
    assert evaluate(model, data).top1 == good[-1].accuracy >= 0.95
    plan.verify(model)
    # the same as asking for that sparsity at once, to the single weight; and the next sparsity tried is too much
    once = copy.deepcopy(before)
    assert prune_(once, plan.config.sparsity, **options).layers == plan.layers
    assert equal(once, state(model))
    above = [trial for trial in target.trials if trial.sparsity > plan.config.sparsity]
    assert min(trial.sparsity for trial in above) - plan.config.sparsity <= 0.05
    assert all(trial.accuracy < 0.95 for trial in above)


def test_it_is_deterministic_and_travels_as_json():
    plans = []
    for _ in range(2):
        model = net()
        plans.append(prune_(model, max_drop=0.05, evaluate=DataLoader(TensorDataset(*split(model)), 32), targets=FC))
    assert plans[0].to_json() == plans[1].to_json()
    again = PrunePlan.from_json(plans[0].to_json())
    assert again.target == plans[0].target and again.to_json() == plans[0].to_json()
    text = str(plans[0])
    assert "found for a drop of at most 5 points from 100.00% on 120 images, to 0.01 in sparsity" in text
    assert ", too low" in text and all(f"{trial.sparsity:.4f}" in text for trial in again.target.trials)


def test_zeros_that_are_there_already_stay_and_count():
    model = net()
    prune_(model, 0.4, targets=FC)
    masks = [weight.as_matrix() == 0 for weight in prunable_weights(model, FC)]
    plan = prune_(model, max_drop=0.0, evaluate=split(model), targets=FC)
    assert min(trial.sparsity for trial in plan.target.trials) >= 1638 / 4096  # round(0.4 * 4096) zeros
    after = [weight.as_matrix() == 0 for weight in prunable_weights(model, FC)]
    assert all(bool((new | ~old).all()) for old, new in zip(masks, after, strict=True))


def test_a_config_will_do():
    model = net()
    plan = prune_(model, PruneConfig(method="uniform", targets=FC), max_drop=0.05, evaluate=split(model))
    assert plan.config.method == "uniform" and plan.target is not None
    assert prune_(net(), 0.5, targets=FC).target is None


def test_an_error_half_way_restores_the_model():
    model = net()
    x, y = split(model)
    before, modes = state(model), [module.training for module in model.modules()]

    class Failing:
        def __init__(self, images):
            self.left, self.images = 3, images

        def __iter__(self):
            self.left -= 1
            if self.left == 0:
                raise OSError("disk full")
            return iter([self.images])

    for error, loader, message in (
        (OSError, Failing((x, y)), "disk full"),
        (KeyboardInterrupt, None, None),
    ):
        if loader is None:
            loader = Failing((x, y))
            loader.left, loader.__class__ = 2, type("Interrupted", (Failing,), {"__iter__": _interrupt})
        with pytest.raises(error, match=message):
            prune_(model, max_drop=0.05, evaluate=loader, targets=FC)
        assert equal(model, before) and modes == [module.training for module in model.modules()]


def _interrupt(self):
    self.left -= 1
    if self.left == 0:
        raise KeyboardInterrupt
    return iter([self.images])


def test_a_loader_that_shrinks_is_noticed_and_the_model_restored():
    model = net()
    x, y = split(model)
    before = state(model)

    class Shrinking:
        rest = 120

        def __iter__(self):
            self.rest -= 1
            return iter([(x[: self.rest], y[: self.rest])])

    with pytest.raises(ValueError, match="evaluate: gave 119 images at first and 118 for a trial; pass the same"):
        prune_(model, max_drop=0.05, evaluate=Shrinking(), targets=FC)
    assert equal(model, before)


def test_a_method_that_hurts_without_removing_is_refused_and_undone():
    model = net()
    before = state(model)
    data = split(model)
    with pytest.raises(ValueError, match=r"no sparsity keeps the accuracy within max_drop=0 of 100.00%: .*% at 0\.5"):
        prune_(model, max_drop=0.0, evaluate=data, targets=FC, haar=40.0)
    assert equal(model, before)


def _labels(model):
    return split(model)[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drop": -0.1}, ValueError, r"max_drop: expected a fraction in \[0, 1\), got -0.1"),
        ({"max_drop": "small"}, TypeError, "max_drop: expected a number, got str"),
        ({"tolerance": 0}, ValueError, r"tolerance: expected a fraction in \(0, 1\), got 0"),
        ({"sparsity": 0.5}, TypeError, "got a sparsity and max_drop, which finds the sparsity"),
        ({"sparsity": PruneConfig(0.7)}, TypeError, "got a sparsity and max_drop"),
        ({"config": PruneConfig(0.3)}, TypeError, "got a sparsity and max_drop"),
        ({"evaluate": None}, TypeError, "max_drop needs evaluate=, held-out images with labels"),
        ({"evaluate": []}, ValueError, "no images to evaluate"),
        ({"evaluate": IMAGES}, TypeError, "images: expected a loader of"),
        ({"evaluate": iter([])}, TypeError, "evaluate: got list_iterator, which can be read once only"),
        ({"calibration": iter([]), "method": "wanda"}, TypeError, "calibration: got list_iterator, which can be read"),
        ({"pattern": "2:4"}, ValueError, "pattern '2:4' has one sparsity only, so max_drop has nothing to find"),
        ({"pattern": "3x1"}, ValueError, "which pattern '3x1' does not divide"),
        ({"method": "wanda"}, ValueError, "needs images; pass calibration="),
        ({"method": "magic"}, ValueError, "unknown method 'magic'"),
        ({"evaluate": (IMAGES, torch.full((120,), 9))}, ValueError, r"labels must lie in 0..3"),
        ({"targets": "conv"}, ValueError, "target 'conv' matches no weight"),
        ({"max_drop": None}, TypeError, r"evaluate= and tolerance= are for the search with max_drop="),
        ({"max_drop": None, "evaluate": None, "tolerance": 0.1}, TypeError, "for the search with max_drop="),
    ],
)
def test_nonsense_is_refused_before_anything_changes(options, error, message):
    model = net()
    before = state(model)
    with pytest.raises(error, match=message):
        prune_(model, **{"max_drop": 0.05, "evaluate": split(model), **options})
    assert equal(model, before)


def test_a_model_without_accuracy_is_refused():
    model = net()
    x, y = split(model)
    with pytest.raises(ValueError, match=r"the model scores 0.00% before pruning, no more than max_drop=0 may lose"):
        prune_(model, max_drop=0.0, evaluate=(x, (y + 1) % 4), targets=FC)
