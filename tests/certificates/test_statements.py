"""Every inequality against random numbers that try to break it, and against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rmtkern.certificates import statements as say

ROUNDING = 1e-12  # float64 sums of a few dozen terms of size up to 100


def logits(seed, images=40, classes=5):
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (4 * torch.rand(images, 1, generator=generator, dtype=torch.float64) - 2)  # 0.01 .. 100
    z = scale * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    change = scale.flip(0) * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    return z, z + change, torch.randint(0, classes, (images,), generator=generator)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31))
def test_no_pair_of_logits_breaks_a_bound(seed):
    before, after, labels = logits(seed)
    change = after - before
    eta, osc = change.abs().amax(1), say.spread(change)
    assert bool((osc <= 2 * eta + ROUNDING).all())
    losses = [F.cross_entropy(z, labels, reduction="none") for z in (before, after)]
    right = [torch.exp(-loss) for loss in losses]
    for i in range(len(labels)):  # image by image, so that errors cannot cancel
        one = slice(i, i + 1)
        moved = abs(float(losses[1][i] - losses[0][i]))
        sharp = say.sharp_loss_bound(osc[one], right[0][one], right[1][one])
        assert moved <= sharp * (1 + ROUNDING) + ROUNDING
        assert sharp <= say.budget(eta[one]) * (1 + ROUNDING) + ROUNDING
    stayed = before.argmax(1) == after.argmax(1)
    for spreads in (osc, 2 * eta):
        assert bool(stayed[say.keeps_label(say.top_gap(before), spreads)].all())
        accuracy = [float((say.true_margin(z, labels) > 0).double().mean()) for z in (before, after)]
        assert abs(accuracy[1] - accuracy[0]) <= say.accuracy_bound(say.true_margin(before, labels), spreads) + ROUNDING


def test_the_label_test_is_sharp():
    """At gap = osc the label can change; so `>` may not become `>=`, nor the spread shrink."""
    before = torch.tensor([[1.0, 0.0]])
    after = torch.tensor([[0.5, 0.5 + 1e-6]])
    assert not bool(say.keeps_label(say.top_gap(before), say.spread(after - before)).any())
    barely = torch.tensor([[0.5 + 1e-6, 0.5]])
    assert bool(say.keeps_label(say.top_gap(before), say.spread(barely - before)).all())


def test_margins_by_hand():
    z = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0]])
    assert say.top_gap(z).tolist() == [0.5, 3.0]
    assert say.true_margin(z, torch.tensor([2, 1])).tolist() == [-0.5, 3.0]
    assert say.spread(z).tolist() == [2.0, 4.0]


def test_the_loss_path_bound_is_linear_in_theta():
    """CE(A_theta) for a last layer: ||R psi||_inf is exact there, so every theta obeys the bound."""
    torch.manual_seed(1)
    kept, removed, psi = (torch.randn(*shape).double() for shape in ((4, 6), (4, 6), (30, 6)))
    labels = torch.randint(0, 4, (30,))

    def loss(theta):
        return F.cross_entropy(psi @ (kept + theta * removed).T, labels)

    eta = (psi @ removed.T).abs().amax(1)
    for theta in torch.linspace(0, 1, 11):
        assert abs(float(loss(theta) - loss(1.0))) <= say.budget(eta, float(theta)) + ROUNDING
    assert say.budget(eta, 0.25) == pytest.approx(0.75 * 2 * float(eta.mean()))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(0, 1), st.booleans(), st.floats(0, 1), st.floats(0, 1))
def test_the_objective_bound_is_the_papers_in_every_form(seed, theta, mask, l2, l1):
    generator = torch.Generator().manual_seed(seed)
    kept, removed = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    if mask:
        where = torch.rand(4, 6, generator=generator) < 0.5
        kept, removed = kept.masked_fill(where, 0), removed.masked_fill(~where, 0)

    def penalty(a):
        return float(l2 * a.square().sum() + l1 * a.abs().sum())

    found = say.objective_bound(1.5, penalty(kept + removed), penalty(kept + theta * removed))
    if mask:
        formula = 1.5 - l2 * (1 - theta**2) * removed.square().sum() - l1 * (1 - theta) * removed.abs().sum()
        assert found == pytest.approx(float(formula), abs=1e-9)
    elif l1 == 0:
        cross = -2 * l2 * (1 - theta) * (kept * removed).sum()
        assert found == pytest.approx(float(1.5 - l2 * (1 - theta**2) * removed.square().sum() + cross), abs=1e-9)


def test_restoring_helps_exactly_when_the_bound_on_the_objective_falls():
    for rest in (0.2, 0.5, 0.9):
        for penalty in (0.0, 0.3, 0.6):
            without = say.objective_bound(1.0, 2.0 + penalty, 1.0)  # everything removed: penalty 2 + q -> 1
            restored = say.objective_bound(rest, 2.0 + penalty, 1.0 + penalty)
            assert say.restoring_helps(1.0, rest, penalty) == (restored < without)


def test_the_slope_bound_holds_for_the_true_slope():
    """dJ/dtheta for the removal of a mask from the last layer, by autograd."""
    torch.manual_seed(2)
    where = torch.rand(4, 6) < 0.5
    weight = torch.randn(4, 6).double()
    removed = weight * where
    psi, labels = torch.randn(20, 6).double(), torch.randint(0, 4, (20,))
    for l2, l1 in ((0.0, 0.0), (0.1, 0.0), (0.3, 0.2)):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        a = weight - step * removed
        loss = F.cross_entropy(psi @ a.T, labels) + l2 * a.square().sum() + l1 * a.abs().sum()
        slope = float(torch.autograd.grad(loss, step)[0])
        budget = say.budget((psi @ removed.T).abs().amax(1))
        bound = say.slope_bound(budget, l2 * float(removed.square().sum()), l1 * float(removed.abs().sum()))
        assert slope <= bound + ROUNDING


def test_random_noise_obeys_its_bounds_as_often_as_promised():
    """T5: at most a share delta of the draws may violate; 400 draws, 4 standard errors of slack."""
    generator = torch.Generator().manual_seed(3)
    delta, draws = 0.2, 400
    psi = torch.randn(20, 30, generator=generator)
    bound = say.noise_bound(psi.norm(dim=1).double(), 0.1, 50, delta)
    noise = 0.1 * torch.randn(draws, 50, 30, generator=generator)
    broken = ((noise @ psi.T).abs().amax(1) > bound).any(1).double().mean()
    assert float(broken) <= delta + 4 * math.sqrt(delta / draws)
    largest = (noise.abs().amax((1, 2)) > say.entry_threshold(0.1, 1500, delta)).double().mean()
    assert 0 < float(largest) <= delta + 4 * math.sqrt(delta / draws)  # sharp enough to be broken at all


def test_the_gaussian_logit_bound():
    """T5: violated with probability below 1/N; the proof gives 1 / (8 N^3), so never in 100 draws."""
    generator = torch.Generator().manual_seed(4)
    width, inputs = 64, 20
    first, image = torch.randn(width, inputs, generator=generator) / inputs, torch.randn(inputs, generator=generator)
    last, kept = torch.randn(10, width, generator=generator), torch.randn(width, width, generator=generator) / width
    bound = say.gaussian_logit_bound(last, float((first @ image).norm()), width)
    for _ in range(100):
        noise = torch.randn(width, width, generator=generator) / math.sqrt(width)
        hidden = torch.relu(first @ image)
        moved = last @ torch.relu((kept + noise) @ hidden) - last @ torch.relu(kept @ hidden)
        assert float(moved.abs().max()) <= bound


@pytest.mark.parametrize("delta", [0, 1, -0.1, math.nan])
def test_refuses_a_delta_that_is_no_probability(delta):
    with pytest.raises(ValueError, match=r"delta: expected a probability in \(0, 1\)"):
        say.noise_bound(torch.ones(3), 1.0, 4, delta)
    with pytest.raises(ValueError, match=r"delta: expected a probability in \(0, 1\)"):
        say.entry_threshold(1.0, 4, delta)


def test_refuses_impossible_noise():
    with pytest.raises(ValueError, match="expected a standard deviation >= 0 and at least one entry"):
        say.entry_threshold(-1.0, 4, 0.5)
    with pytest.raises(ValueError, match="expected a standard deviation >= 0 and at least one entry"):
        say.noise_bound(torch.ones(3), 1.0, 0, 0.5)
    with pytest.raises(ValueError, match=r"at least one entry, got 0\.0 and 0"):
        say.gaussian_logit_bound(torch.ones(2, 3), 1.0, 0)
