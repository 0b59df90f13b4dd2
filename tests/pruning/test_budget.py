"""Budgets, against sorting in NumPy and the numbers of the papers."""

import math

import numpy as np
import pytest
import torch

from rmtkern.pruning.budget import BUDGETS, SPECTRAL, Layer, alpha_ratios, cycle_targets, edge_weights
from rmtkern.pruning.smallest import held, take_smallest


def layer(score, type="mlp", zeros=0, **signals):
    score = torch.as_tensor(score, dtype=torch.float32)
    return Layer(type, tuple(score.shape), held(score), zeros, **signals)


def signals(edges, types=None):
    types = types or ["mlp"] * len(edges)
    return [layer(torch.ones(1, 1), type, edge=edge) for edge, type in zip(edges, types, strict=True)]


def zeros_of(budget, layers, sparsity):
    keys = BUDGETS[budget](layers, sparsity)
    count = round(sparsity * sum(one.size for one in layers))
    return list(take_smallest(keys, count))


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
def test_uniform_and_row_are_uniform_to_one_weight(sparsity):
    layers = [layer(torch.rand(7, 11) * scale) for scale in (1.0, 50.0)] + [layer(torch.rand(3, 40))]
    for one, mask in zip(layers, zeros_of("uniform", layers, sparsity), strict=True):
        assert abs(int(mask.sum()) - sparsity * mask.numel()) <= 1
        assert one.scores()[mask].max() <= one.scores()[~mask].min()
    for one, mask in zip(layers, zeros_of("row", layers, sparsity), strict=True):
        assert (mask.sum(1) - sparsity * mask.shape[1]).abs().max() <= 1
        assert all(s[m].max() <= s[~m].min() for s, m in zip(one.scores(), mask, strict=True) if m.any())


def test_global_has_one_threshold():
    layers = [layer(torch.rand(4, 9)), layer(torch.rand(5, 5) * 10)]
    masks = zeros_of("global", layers, 0.5)
    gone = torch.cat([one.scores()[mask] for one, mask in zip(layers, masks, strict=True)])
    kept = torch.cat([one.scores()[~mask] for one, mask in zip(layers, masks, strict=True)])
    assert gone.max() <= kept.min()
    assert masks[0].float().mean() > masks[1].float().mean()


# z of (1, 2, 3, 6): mean 3, population deviation sqrt(3.5)
Z = [(x - 3) / math.sqrt(3.5) for x in (1, 2, 3, 6)]


@pytest.mark.parametrize(
    ("sparsity", "type", "beta", "vanish"),
    [
        (0.30, "attn", 1.0, 0.5), (0.30, "other", 1.0, 0.5), (0.40, "mlp", 1.0, 0.5), (0.45, "mlp", 1.25, 0.7),
        (0.55, "attn", 1.25, 0.7), (0.65, "attn", 1.0, 0.85), (0.65, "mlp", 2.0, 0.85), (0.65, "other", 1.5, 0.85),
    ],
)  # fmt: skip
def test_edge_weights_follow_the_four_regimes(sparsity, type, beta, vanish):
    expected = [max(0.1, 1 + beta * (1 - sparsity / vanish) * z) for z in Z]
    assert edge_weights(signals([1, 2, 3, 6], [type] * 4), sparsity) == pytest.approx(expected, rel=1e-12)


def test_edge_weights_are_floored():
    assert min(edge_weights(signals([0, 100, 100, 100, 100, 100, 100, 100]), 0.56)) == 0.1


def test_edge_weights_vanish_above_their_end_and_without_variation():
    assert edge_weights(signals([1, 2, 3]), 0.85) == edge_weights(signals([1, 2, 3]), 0.95) == [1.0] * 3
    assert edge_weights(signals([2, 2, 2]), 0.5) == [1.0] * 3
    assert edge_weights(signals([2, None, None]), 0.5) == edge_weights(signals([None] * 3), 0.5) == [1.0] * 3


def test_layers_without_a_signal_are_neutral_and_not_counted():
    weights = edge_weights(signals([1, None, 2, 3, 6]), 0.5)
    assert weights[1] == 1.0
    assert weights[:1] + weights[2:] == edge_weights(signals([1, 2, 3, 6]), 0.5)


def test_lowest_regime_is_magnitude_unless_the_published_alpha_is_asked():
    layers = [layer(torch.ones(1, 1), alpha=a, edge=5 - a) for a in (1, 2, 3, 6)]
    assert edge_weights(layers, 0.2) == [1.0] * 4
    expected = [max(0.1, 1 + 0.5 * (1 - 0.2 / 0.3) * z) for z in Z]
    assert edge_weights(layers, 0.2, alpha_regime=True) == pytest.approx(expected, rel=1e-12)
    assert edge_weights(layers, 0.3, alpha_regime=True) == edge_weights(layers, 0.3)


@pytest.mark.parametrize("randomness, published", [
    (1.0, {1: 0.061, 2: 0.120, 4: 0.229, 8: 0.419, 12: 0.573, 16: 0.694, 20: 0.787, 26: 0.883, 34: 0.954}),
    (0.8 * 0.85, {1: 0.034, 2: 0.079, 4: 0.177, 8: 0.364, 12: 0.524, 16: 0.654, 20: 0.756, 26: 0.865, 34: 0.946}),
    (0.26 * 0.73, {1: 0.005, 2: 0.023, 4: 0.083, 8: 0.241, 12: 0.403, 16: 0.548, 20: 0.670, 26: 0.808, 34: 0.918}),
])  # fmt: skip
def test_cycle_targets_add_up_to_the_published_sparsities(randomness, published):
    """arXiv 2503.01922, cumulative sparsity of one layer after i cycles; printed there to three digits."""
    total, gone = 1_000_000, 0.0
    for cycle in range(1, 35):
        (target,) = cycle_targets(
            [layer(torch.empty(1, 1).expand(1000, 1000), zeros=round(gone), randomness=randomness)], cycle
        )
        gone += target
        if cycle in published:
            assert gone / total == pytest.approx(published[cycle], abs=6e-4)


def test_a_cycle_always_removes_something():
    layers = [layer(torch.ones(10, 10), randomness=0.0) for _ in range(2)]
    assert cycle_targets(layers, 3) == pytest.approx([6.367248] * 2)
    assert cycle_targets([layer(torch.ones(2, 2)), layer(torch.ones(2, 2), randomness=0.0)], 3)[1] == 0.0


def test_cycle_shares_by_target():
    layers = [layer(torch.rand(100, 100), randomness=r) for r in (1.0, 0.25)]
    targets = cycle_targets(layers, 1)
    masks = list(take_smallest(BUDGETS["cycle"](layers, 0.5, cycle=1), round(sum(targets))))
    assert [int(mask.sum()) for mask in masks] == pytest.approx(targets, abs=1)
    assert targets[1] == pytest.approx(targets[0] / 8)  # 0.25^1.5


def test_spectral_budgets_are_budgets():
    assert set(SPECTRAL) <= set(BUDGETS)


@pytest.mark.parametrize(("sparsity", "tau"), [(0.2, 0.3), (0.5, 0.3), (0.75, 0.25)])
def test_alphapruning_against_its_definition(sparsity, tau):
    alphas, sizes = [2.0, 2.6, 5.0, None], [40, 100, 60, 30]
    layers = [layer(torch.rand(1, size), alpha=alpha) for alpha, size in zip(alphas, sizes, strict=True)]
    shape = np.array([(alpha - 2.0) / 3.0 if alpha else 0.5 for alpha in alphas])
    wanted = 1 - tau + 2 * tau * shape
    wanted *= sparsity * sum(sizes) / (wanted * sizes).sum()
    assert alpha_ratios(layers, sparsity) == pytest.approx(wanted.tolist(), rel=1e-12)
    masks = zeros_of("alphapruning", layers, sparsity)
    for one, mask, ratio in zip(layers, masks, wanted, strict=True):
        assert abs(int(mask.sum()) - ratio * mask.numel()) <= 1
        assert one.scores()[mask].max() <= one.scores()[~mask].min()


@pytest.mark.parametrize("alphas", [[3.0, 3.0, 3.0], [None, None, None], [None, 2.0, None]])
def test_alphapruning_is_uniform_where_exponents_do_not_vary(alphas):
    layers = [layer(torch.rand(4, 9), alpha=alpha) for alpha in alphas]
    assert alpha_ratios(layers, 0.4) == pytest.approx([0.4] * 3)
    assert [int(mask.sum()) for mask in zeros_of("alphapruning", layers, 0.25)] == [9, 9, 9]


def test_alphapruning_meets_the_count_where_a_share_exceeds_one():
    layers = [layer(torch.rand(1, 10), alpha=9.0), layer(torch.rand(1, 990), alpha=1.5)]
    assert alpha_ratios(layers, 0.7)[0] > 1
    masks = zeros_of("alphapruning", layers, 0.7)
    assert sum(int(mask.sum()) for mask in masks) == 700 and masks[0].all()


def test_sensitivity_gives_the_ith_smallest_score_the_ith_smallest_loss():
    first = layer([[3.0, 1.0, -1.0, 2.0]], zeros=1, loss=torch.tensor([[5.0, 7.0, 100.0, 6.0]]))
    (keys,) = BUDGETS["sensitivity"]([first], 0.75)  # half of the quarter that stays is less than an entry
    assert keys.tolist() == [[7.0, 5.0, math.inf, 6.0]]
    many = layer(torch.arange(16.0)[None], loss=torch.zeros(1, 16))
    (keys,) = BUDGETS["sensitivity"]([many], 0.5)
    assert keys.isinf().sum() == 4 and keys[0, -4:].isinf().all()
    plain = layer([[3.0, 1.0]])
    assert torch.equal(BUDGETS["sensitivity"]([plain], 0.5)[0], plain.scores())


def test_edge_sensitivity_divides_losses_by_the_squared_weights_of_the_edge():
    rng = np.random.default_rng(0)
    losses = [rng.random((4, 5)).astype(np.float32) for _ in Z]
    layers = [layer(one, edge=edge, loss=torch.tensor(one)) for one, edge in zip(losses, (1, 2, 3, 6), strict=True)]
    keys = BUDGETS["edge-sensitivity"](layers, 0.3)
    least_kept = math.ceil(0.65 * 20)  # of each layer at least half of what stays in all
    for key, loss, weight in zip(keys, losses, edge_weights(layers, 0.3), strict=True):
        open_ = np.sort((loss / weight**2).ravel())[:least_kept]
        np.testing.assert_allclose(np.sort(key.numpy().ravel()), [*open_, *[np.inf] * (20 - least_kept)], rtol=1e-6)
    plain = layer([[3.0, 1.0]], edge=6)
    keys = BUDGETS["edge-sensitivity"]([*layers[:3], plain], 0.3)
    assert torch.equal(keys[3], BUDGETS["edge"]([*layers[:3], plain], 0.3)[3]())


@pytest.mark.parametrize("zeros", [0, 7, 60])
def test_sensitivity_of_a_loss_that_is_the_score_is_the_same_in_place(zeros):
    losses = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    losses.view(-1)[:zeros] = -1
    losses.view(-1)[-3:] = torch.inf
    (apart,) = BUDGETS["sensitivity"]([layer(losses.clone(), zeros=zeros, loss=losses.clamp(min=0))], 0.5)
    (same,) = BUDGETS["sensitivity"]([layer(losses, zeros=zeros, loss=losses)], 0.5)
    assert same is losses and torch.equal(same, apart)
