"""Spectral edge reallocation against its definition in float64: what comes back, what it costs, what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmtkern.api import OVER_PRUNED, prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.spectrum.fit import fit_spectra

BOTH = ("0", "2")


def net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)


def data(count=40, dtype=torch.float64):
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return x, x[:, :4].argmax(1)


def masks(model):
    return [weight.as_matrix() == 0 for weight in prunable_weights(model, BOTH)]


def over_pruned(sparsity, budget):
    """The model with 3 % more removed, its candidates, and 1 / w of each layer, by definition."""
    model = net()
    dense = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    weights, favour = [1.0, 1.0], [1.0, 1.0]
    if budget == "edge":
        edges = np.array([fit.sigma_plus for fit in fit_spectra({"a": dense[0], "b": dense[1]}).values()])
        z = (edges - edges.mean()) / edges.std()

        def at(s):  # 0.4 < s <= 0.55, layers of type "other"
            return np.maximum(0.1, 1 + 1.25 * (1 - s / 0.7) * z)

        weights, favour = at(sparsity), 1 / at(sparsity + OVER_PRUNED)
    total = sum(matrix.numel() for matrix in dense)
    keys = torch.cat([(matrix.abs() / w).flatten() for matrix, w in zip(dense, weights, strict=True)])
    count = round(sparsity * total) + round(OVER_PRUNED * total)
    gone = torch.zeros(total, dtype=torch.bool)
    gone[keys.argsort()[:count]] = True
    candidates = [part.view_as(one) for part, one in zip(gone.split([m.numel() for m in dense]), dense, strict=True)]
    with torch.no_grad():
        for layer, mask in zip((model[0], model[2]), candidates, strict=True):
            layer.weight.masked_fill_(mask, 0)
    return model, dense, candidates, favour, count - round(sparsity * total)


def loss_of(model, x, y, wanted):
    logits = model(x)
    return F.cross_entropy(logits, y) + ((logits - wanted) ** 2).mean()


def expected(candidates, evidence, favour, back):
    """The candidates without the `back` of most evidence times favour."""
    keys = torch.cat([(e * f)[m] for e, f, m in zip(evidence, favour, candidates, strict=True)])
    least = keys.sort(descending=True).values[back - 1]
    return [m & ~(e * f >= least) for e, f, m in zip(evidence, favour, candidates, strict=True)]


@pytest.mark.parametrize("budget", ["global", "edge"])
def test_the_first_order_substitute_against_finite_differences(budget):
    model, dense, candidates, favour, back = over_pruned(0.5, budget)
    (x, y), step = data(), 1e-6
    wanted = net()(x).detach()
    evidence = [torch.zeros_like(matrix) for matrix in dense]
    with torch.no_grad():
        for found, layer, matrix, mask in zip(evidence, (model[0], model[2]), dense, candidates, strict=True):
            for at in map(tuple, mask.nonzero().tolist()):
                values = []
                for way in (step, -step):
                    layer.weight[at] = way
                    values.append(float(loss_of(model, x, y, wanted)))
                layer.weight[at] = 0
                found[at] = abs((values[0] - values[1]) / (2 * step) * matrix[at])
    made = net()
    before = copy.deepcopy(made)
    plan = prune_(made, 0.5, "ser-gradient", budget=budget, targets=BOTH, calibration=(x, y))
    assert all(
        torch.equal(a, b) for a, b in zip(masks(made), expected(candidates, evidence, favour, back), strict=True)
    )
    for new, old in zip(made.parameters(), before.parameters(), strict=True):
        assert torch.equal(new, torch.where(new == 0, new, old))  # what came back has its old value
    assert plan.selected.zeros == round(0.5 * 2240) and plan.calibration_images == 40
    plan.verify(made)


@pytest.mark.parametrize("budget", ["global", "edge"])
def test_movement_is_one_pass_of_adam_over_the_candidates(budget):
    model, dense, candidates, favour, back = over_pruned(0.5, budget)
    x, y = data()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    reference = net()
    layers = (model[0], model[2])
    first = [torch.zeros_like(matrix) for matrix in dense]
    second = [torch.zeros_like(matrix) for matrix in dense]
    for step, (images, labels) in enumerate(batches, 1):
        loss = loss_of(model, images, labels, reference(images).detach())
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])
        rate = 4e-4 * (1 - 0.75 * (step - 1) / 4)
        with torch.no_grad():
            for layer, gradient, mask, m, v in zip(layers, gradients, candidates, first, second, strict=True):
                gradient = gradient * mask
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                layer.weight -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    evidence = [layer.weight.detach().abs() * mask for layer, mask in zip(layers, candidates, strict=True)]
    made = net()
    prune_(made, 0.5, "ser", budget=budget, targets=BOTH, calibration=batches)
    assert all(
        torch.equal(a, b) for a, b in zip(masks(made), expected(candidates, evidence, favour, back), strict=True)
    )


@pytest.mark.parametrize("method", ["ser", "ser-gradient"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_counts_and_nothing_else_changed(method, pattern, dtype):
    model = net(dtype).train()
    model[0].weight.data[:4] = 0  # 96 zeros that stay
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, 0.6, method, pattern, targets=BOTH, calibration=data(dtype=dtype))
    unit = {"unstructured": 1, "4x1": 4, "1x2": 2}[pattern]
    assert sum(int(mask.sum()) for mask in masks(model)) == unit * round(0.6 * 2240 / unit)
    assert bool((model[0].weight[:4] == 0).all()) and all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.grad is None and parameter.requires_grad
        assert torch.equal(parameter, torch.where(parameter == 0, 0, before[name]))


def test_masks_grow_over_targets_and_follow_the_images():
    model, others = net(), net()
    for sparsity in (0.3, 0.45, 0.9, 0.99):
        old = masks(model)
        prune_(model, sparsity, "ser", targets=BOTH, calibration=data())
        assert all(bool((new | ~was).all()) for new, was in zip(masks(model), old, strict=True))
    x, y = data()
    prune_(others, 0.3, "ser", targets=BOTH, calibration=(x.flip(1), 3 - y))
    first = net()
    prune_(first, 0.3, "ser", targets=BOTH, calibration=data())
    assert any(not torch.equal(a, b) for a, b in zip(masks(first), masks(others), strict=True))


def test_hybrid_is_magnitude_to_20_percent_and_ser_above():
    assert prune_(net(), 0.2, "hybrid", targets=BOTH).config.method == "magnitude"
    model, same = net(), net()
    plan = prune_(model, 0.25, "hybrid", targets=BOTH, calibration=data())
    assert plan == prune_(same, 0.25, "ser", targets=BOTH, calibration=data())
    assert PrunePlan.from_json(plan.to_json()) == plan and "restore movement" in str(plan)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({}, ValueError, "method 'ser' with restore 'movement' needs images; pass calibration="),
    ({"calibration": data()[0]}, ValueError, r"restore 'movement' needs labels; pass calibration=\(images, labels\)"),
    ({"calibration": (data()[0], data()[1] + 9)}, ValueError, "labels must lie in 0..3, got 9..12"),
    ({"calibration": (data()[0] * float("inf"), data()[1])}, ValueError, "the loss of the pruned model is nan"),
    ({"calibration": (data()[0][:, :9], data()[1])}, ValueError, r"the model does not take a batch of float64 \["),
    ({"calibration": data(), "pattern": "2:4"}, ValueError, "expected a pattern without n:m.*got pattern '2:4'"),
    ({"calibration": data(), "score": "obs"}, ValueError, "a score that is known before any layer.*and score 'obs'"),
    ({"restore": "half"}, ValueError, "unknown restore 'half'; expected one of none, movement, gradient"),
    ({"restore": 1}, TypeError, "restore: expected a string, got int"),
])  # fmt: skip
def test_what_is_refused_changes_nothing(options, error, message):
    model = net()
    with pytest.raises(error, match=message):
        prune_(model, 0.5, "ser", targets=BOTH, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))


def test_every_budget_and_a_repair_go_with_it():
    for budget in ("uniform", "row", "cycle", "alphapruning"):
        model = net()
        options = {"budget": budget, "score": "magnitude", "repair": "none", "restore": "gradient"}
        prune_(model, 0.5, targets=BOTH, calibration=data(), **options)
        assert sum(int(mask.sum()) for mask in masks(model)) == 1120
    model = net()
    plan = prune_(model, 0.5, "ser", repair="obs", targets=BOTH, calibration=data())
    plan.verify(model)
    assert not torch.equal(model[2].weight[model[2].weight != 0], net()[2].weight[model[2].weight != 0])
    assert PruneConfig(method="ser").resolve(True).needs_labels
