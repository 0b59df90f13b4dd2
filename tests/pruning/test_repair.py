"""Repair against the normal equations in NumPy float64, and against the Optimal Brain Surgeon's formula."""

import numpy as np
import pytest
import torch

from rmtkern.pruning import repair
from rmtkern.pruning.repair import REPAIRS, damped


def layer(n=6, k=12, tokens=200, seed=0):
    """A weight, correlated inputs, and their damped second moment, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(n, k, generator=generator, dtype=torch.float64), x, damped(x.t() @ x / tokens)


def loss(weight, other, moment):
    d = (weight - other).numpy()
    return np.einsum("nk,kl,nl->n", d, moment.numpy(), d)


@pytest.fixture
def exact(monkeypatch):
    """Conjugate gradients that go on to 1e-5 of the output's energy norm."""
    monkeypatch.setattr(repair, "_TOLERANCE", 1e-5)


def test_one_weight_is_the_optimal_brain_surgeon(exact):
    weight, _, moment = layer()
    inverse = np.linalg.inv(moment.numpy())
    for j in (0, 5, 11):
        mask = torch.zeros(6, 12, dtype=torch.bool)
        mask[:, j] = True
        found = REPAIRS["obs"](weight, mask, moment)
        w = weight.numpy()
        expected = w - w[:, j : j + 1] * inverse[j] / inverse[j, j]  # Hassibi and Stork 1993, eq. 5
        np.testing.assert_allclose(found, expected, atol=1e-4)  # conjugate gradients stop at 1e-5 of the output's size
        np.testing.assert_allclose(loss(found, weight, moment), w[:, j] ** 2 / inverse[j, j], rtol=1e-6)
        assert found[:, j].eq(0).all()


def test_a_mask_is_the_normal_equations_of_its_survivors(exact):
    weight, _, moment = layer()
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[3], mask[4] = True, False  # a row that goes whole, and one that stays
    found = REPAIRS["obs"](weight, mask, moment)
    h = moment.numpy()
    for row in range(6):
        keep = ~mask[row].numpy()
        expected = np.zeros(12)
        expected[keep] = np.linalg.solve(h[np.ix_(keep, keep)], h[keep] @ weight[row].numpy())
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
    assert torch.equal(found[4], weight[4]) and found[mask].eq(0).all()
    best, plain = loss(found, weight, moment), loss(weight.masked_fill(mask, 0), weight, moment)
    assert (best <= plain + 1e-12).all() and best.sum() < 0.9 * plain.sum()


def test_what_it_stops_at_costs_next_to_nothing(monkeypatch):
    weight, _, moment = layer(n=64, k=96, tokens=400)
    mask = torch.rand(64, 96, generator=torch.Generator().manual_seed(1)) < 0.5
    found = loss(REPAIRS["obs"](weight, mask, moment), weight, moment).sum()
    monkeypatch.setattr(repair, "_TOLERANCE", 1e-7)
    monkeypatch.setattr(repair, "_STEPS", 2000)
    least = loss(REPAIRS["obs"](weight, mask, moment), weight, moment).sum()
    assert least <= found <= 1.001 * least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_large_scales(dtype):
    weight, x, _ = layer(n=8, k=32, tokens=2000)
    weight = weight.to(dtype)
    x = x * torch.logspace(-3, 3, 32)  # inputs of very different size, as behind a norm's scale
    moment = damped((x.t() @ x / len(x)).float())
    mask = torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    found = REPAIRS["obs"](weight, mask, moment)
    assert found.dtype == torch.float32 and torch.isfinite(found).all() and found[mask].eq(0).all()
    plain = weight.float().masked_fill(mask, 0)
    assert (loss(found, weight.float(), moment) <= 1.0001 * loss(plain, weight.float(), moment)).all()


def test_inputs_that_are_all_alike_or_dead():
    weight, x, _ = layer()
    x = x.clone()
    x[:, 1] = x[:, 0]  # exactly dependent
    x[:, 2] = 0  # dead
    moment = damped(x.t() @ x / len(x))
    assert torch.linalg.eigvalsh(moment).min() > 0
    mask = torch.zeros(6, 12, dtype=torch.bool)
    mask[:, 0] = True
    found = REPAIRS["obs"](weight, mask, moment)
    np.testing.assert_allclose(found[:, 1], weight[:, 0] + weight[:, 1], rtol=0.05, atol=0.05)  # its twin takes over
    np.testing.assert_allclose(found[:, 2], weight[:, 2], atol=1e-9)  # nothing is known of a dead input: as it was
    nothing = damped(torch.zeros(12, 12))
    assert torch.equal(REPAIRS["obs"](weight, mask, nothing), weight.float().masked_fill(mask, 0))


def test_damping():
    moment = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    assert torch.equal(damped(moment), torch.diag(torch.tensor([4.02, 2.02, 2.0])))
    assert torch.equal(moment, torch.diag(torch.tensor([4.0, 2.0, 0.0])))  # a copy


def test_none_only_masks():
    weight, _, _ = layer()
    mask = weight > 0
    assert torch.equal(REPAIRS["none"](weight, mask, None), weight.clamp(max=0))
    with pytest.raises(ValueError, match=r"repair 'obs' needs the second moments of the inputs; pass calibration="):
        REPAIRS["obs"](weight, mask, None)
