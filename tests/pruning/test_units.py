"""Which units go: against brute force in float64, from the definition."""

from itertools import combinations

import numpy as np
import pytest
import torch

from rmtkern.pruning.units import loss_share, norm_units, remove_units


def problem(n=5, units=6, size=1, more=0):
    rng = np.random.default_rng(3)
    k = units * size + more
    x = rng.standard_normal((40, k)) @ rng.standard_normal((k, k))
    return rng.standard_normal((n, k)), x.T @ x / len(x)


def best(w, h, gone):
    """Least squares on the columns that stay, and its loss."""
    stay = [k for k in range(w.shape[1]) if k not in gone]
    value = np.zeros_like(w)
    value[:, stay] = np.linalg.solve(h[np.ix_(stay, stay)], h[stay] @ w.T).T
    change = value - w
    return value, np.trace(change @ h @ change.T)


@pytest.mark.parametrize(("size", "more"), [(1, 0), (1, 1), (3, 0), (3, 1)])
def test_one_unit_is_the_best_one_and_the_rest_is_refit(size, more):
    w, h = problem(size=size, more=more)
    units, value = remove_units(torch.tensor(w), torch.tensor(h), 6, 1, size)
    losses = [best(w, h, range(u * size, (u + 1) * size))[1] for u in range(6)]
    assert units.tolist() == [int(np.argmin(losses))]
    gone = range(units[0] * size, (units[0] + 1) * size)
    np.testing.assert_allclose(value, best(w, h, gone)[0], rtol=1e-8, atol=1e-10)
    assert bool((value[:, list(gone)] == 0).all())
    share = losses[int(units[0])] / np.trace(w @ h @ w.T)
    assert loss_share(torch.tensor(w), value, torch.tensor(h)) == pytest.approx(share, rel=1e-8)


def test_several_units_are_each_the_best_next_one():
    w, h = problem(units=7)
    gone: list[int] = []
    for _ in range(4):
        left = [u for u in range(7) if u not in gone]
        gone.append(min(left, key=lambda u: best(w, h, [*gone, u])[1]))
    units, value = remove_units(torch.tensor(w), torch.tensor(h), 7, 4)
    assert units.tolist() == sorted(gone)
    np.testing.assert_allclose(value, best(w, h, gone)[0], rtol=1e-7, atol=1e-9)
    every = sorted(best(w, h, pair)[1] for pair in combinations(range(7), 4))
    assert best(w, h, gone)[1] <= every[len(every) // 4]  # greedy is not the best, but far from a bad choice


def test_many_units_go_in_steps_and_are_still_refit_exactly():
    w, h = problem(n=3, units=600)
    h = h + np.eye(600)
    units, value = remove_units(torch.tensor(w), torch.tensor(h), 600, 200)
    assert len(units.unique()) == 200
    np.testing.assert_allclose(value, best(w, h, set(units.tolist()))[0], rtol=1e-6, atol=1e-8)


def test_norms_are_products():
    w = torch.tensor([[3.0, 0.0, 1.0, 1.0], [4.0, 0.0, 1.0, 1.0]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 9.0], [5.0, 0.0], [0.1, 0.0]])
    assert norm_units(w, [rows], 1, 2).tolist() == [1, 3]  # 5, 0, 5 sqrt 2, 0.1 sqrt 2
    assert norm_units(w, [rows[:2]], 2, 1).tolist() == [0]  # 5 against 2 * 9
