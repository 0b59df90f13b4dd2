"""Calibration images held out, and the budget that changes the outputs on them least."""

import copy

import pytest
import torch
from torch import nn

from rmtkern import PrunePlan, prune_
from rmtkern.pruning.held_out import hold_out, model_outputs, relative_change
from rmtkern.pruning.presets import BEST_OF

X = torch.arange(48.0).reshape(16, 3)


def test_rows_and_batches_are_taken_from_the_end():
    left, taken = hold_out(X)
    assert torch.equal(torch.cat([left, taken]), X) and len(taken) == 2
    (left, ys), (taken, more) = hold_out((X, torch.arange(16)))
    assert len(left) == len(ys) == 14 and more.tolist() == [14, 15] and torch.equal(taken, X[14:])
    batches = list(X.split(1))
    for given in (batches, iter(batches)):
        left, taken = hold_out(given)
        assert len(left) == 14 and all(one is two for one, two in zip([*left, *taken], batches, strict=True))
    assert [len(part) for part in hold_out(tuple(X.split(8)))] == [1, 1]  # two batches, no labels


@pytest.mark.parametrize("batch", [X, (X, torch.arange(16)), [X, torch.arange(16)], {"x": X, "n": 3},
                                   ({"x": X, "n": 3}, torch.arange(16))])  # fmt: skip
def test_a_single_batch_is_cut(batch):
    (left,), (taken,) = hold_out([batch])
    if isinstance(batch, tuple) and isinstance(batch[0], dict):  # inputs by name and their labels
        assert taken[1].tolist() == [14, 15]
        batch, left, taken = batch[0], left[0], taken[0]
    if isinstance(batch, dict):
        assert left["n"] == taken["n"] == 3
        left, taken = left["x"], taken["x"]
    elif not isinstance(batch, torch.Tensor):
        assert len(left[1]) == 14 and len(taken[1]) == 2
        left, taken = left[0], taken[0]
    assert torch.equal(torch.cat([left, taken]), X)


@pytest.mark.parametrize("images", [X[:1], X[:0], [], [X[:1]], [{"x": X[:1]}]])
def test_one_image_is_too_few(images):
    with pytest.raises(ValueError, match="expected at least 2 images, one of them to hold out, got"):
        hold_out(images)


def test_neither_tensor_nor_batches():
    with pytest.raises(TypeError, match="expected a tensor or an iterable of batches, got int"):
        hold_out(3)


def test_the_change_is_relative_and_over_all_outputs():
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert relative_change([one, two], [one + 1, two - 1]) == pytest.approx(3 / 169)
    for wanted, found in ((one, one * float("nan")), (one * float("inf"), one), (one * 0, one)):
        with pytest.raises(ValueError, match=r"\(held-out\) calibration images are all zero, NaN or Inf"):
            relative_change([wanted], [found])
    model = nn.Linear(3, 2).train()
    (found,) = model_outputs(model, X)
    assert torch.equal(found, model(X)) and model.training


class Uneven(nn.Module):
    """Two layers, of which the second counts less and has the higher edge."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.strong, self.weak, self.end = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 4)
        self.weak.weight.data *= 3

    def forward(self, x):
        return self.end(self.strong(x) + 0.3 * self.weak(x))


@pytest.fixture
def images():
    return torch.randn(160, 16, generator=torch.Generator().manual_seed(1))


def budgeted(images, budget):
    model = Uneven()
    return model, prune_(model, 0.5, "admm", budget=budget, targets="all", ignore="end", calibration=images)


def test_best_is_the_budget_that_changes_held_out_outputs_least(images):
    found, plan = budgeted(images, "best")
    dense, wanted = Uneven(), {}
    for budget in BEST_OF:  # each alone, with the images that "best" prunes by
        model, _ = budgeted(images[:140], budget)
        change = (model(images[140:]) - dense(images[140:])).detach().double()
        wanted[budget] = float(change.square().sum() / dense(images[140:]).detach().double().square().sum())
    assert plan.budgets == pytest.approx(wanted, rel=1e-4)
    assert plan.config.budget == min(wanted, key=wanted.get) and len(set(wanted.values())) == 3
    chosen, alone = budgeted(images[:140], plan.config.budget)
    assert torch.equal(found.strong.weight, chosen.strong.weight) and plan.layers == alone.layers
    assert plan.calibration_images == 140 and alone.budgets == {}
    again = PrunePlan.from_json(plan.to_json())
    assert again.budgets == plan.budgets and again.config == plan.config
    assert "budgets tried, relative change of the outputs on held-out images: edge" in str(plan)


def test_best_with_permuted_channels():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 8))
    plan = prune_(model, 0.5, "admm", "2x1", "all", calibration=torch.randn(64, 8), budget="best", permute=True)
    plan.verify(model)
    assert set(plan.budgets) == set(BEST_OF)


def test_what_goes_wrong_leaves_the_model(images, monkeypatch):
    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="budget 'best' needs images; pass calibration="):
        prune_(model, 0.5, "row", budget="best")
    with pytest.raises(ValueError, match="budget 'best': pattern '2:4' says itself how much goes from each layer"):
        prune_(model, 0.5, "admm", "2:4", budget="best", calibration=images)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("third")
        return 0.5 / len(calls)

    monkeypatch.setattr("rmtkern.api.relative_change", fail)
    with pytest.raises(RuntimeError, match="third"):
        prune_(model, 0.5, "admm", budget="best", targets="all", ignore="end", calibration=images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
