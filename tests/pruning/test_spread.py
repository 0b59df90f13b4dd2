"""spread_columns against enumeration, and against the deal alone."""

from itertools import combinations

import pytest
import torch

from rmtkern.pruning import spread
from rmtkern.pruning.spread import group_loss, spread_columns


def costs_of(n, k, seed=0):
    """Entries whose columns differ in size, and whose rows like different columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, generator=generator) ** 4 * torch.rand(k, generator=generator) ** 2


def lost(costs, n, m):
    """From the definition: the m - n cheapest of every group of every row."""
    return sum(sum(sorted(row[at : at + m].tolist())[: m - n]) for row in costs for at in range(0, len(row), m))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (1, 2), (5, 8)])
def test_the_loss_is_counted_right_and_falls(n, m):
    costs = costs_of(20, 6 * m).double()
    assert group_loss(costs, n, m) == pytest.approx(lost(costs, n, m), rel=1e-5)
    order = spread_columns(costs, n, m)
    assert order.sort().values.tolist() == list(range(6 * m))
    assert group_loss(costs[:, order], n, m) < group_loss(costs, n, m)
    # every swap gains what it says
    places = torch.arange(6 * m)
    for _ in range(4):
        before = group_loss(costs[:, places], n, m)
        gain = spread._swap_(places, costs, torch.randperm(6).reshape(2, 3), n, m)
        assert before - gain == pytest.approx(group_loss(costs[:, places], n, m), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_are_split_almost_as_well_as_can_be(seed):
    costs = costs_of(12, 8, seed)
    found = group_loss(costs[:, spread_columns(costs, 2, 4)], 2, 4)
    everything = []
    for part in combinations(range(8), 4):
        rest = [column for column in range(8) if column not in part]
        everything.append(group_loss(costs[:, [*part, *rest]], 2, 4))
    assert min(everything) <= found * (1 + 1e-6)
    assert found < min(everything) + 0.15 * (group_loss(costs, 2, 4) - min(everything)) + 1e-6


def test_swaps_lose_less_than_the_deal_alone(monkeypatch):
    costs = costs_of(64, 256)
    swapped = group_loss(costs[:, spread_columns(costs, 2, 4)], 2, 4)
    monkeypatch.setattr(spread, "_ROUNDS", 0)
    dealt = group_loss(costs[:, spread_columns(costs, 2, 4)], 2, 4)
    assert swapped < 0.97 * dealt < dealt < group_loss(costs, 2, 4)


def test_one_group_and_an_order_that_is_best_stay():
    assert spread_columns(costs_of(3, 4), 2, 4).tolist() == [0, 1, 2, 3]
    best = torch.tensor([[9.0, 8, 0, 0, 7, 6, 0, 0]])
    assert spread_columns(best, 2, 4).tolist() == list(range(8))
