"""obs_mask and admm_mask: exact counts for every pattern, zeros that stay, and the loss against simpler masks."""

import itertools

import numpy as np
import pytest
import torch

from rmtkern.pruning.layerwise import MASKS
from rmtkern.pruning.obs import obs_mask
from rmtkern.pruning.pattern import parse_pattern, unit_of, whole_units
from rmtkern.pruning.repair import REPAIRS, damped
from tests.pruning.test_repair import layer, loss

ANY_PATTERN = ("obs", "admm")
BLOCKS = ["1x2", "2x1", "4x1", "4x2", "8x1", "1x4"]


@pytest.mark.parametrize("score", ANY_PATTERN)
@pytest.mark.parametrize("pattern", ["unstructured", *BLOCKS])
@pytest.mark.parametrize("by_row", [False, True])
def test_counts_are_exact(score, pattern, by_row):
    weight, _, moment = layer(16, 264)  # more than one block of columns, and the last one narrower
    kind, params = parse_pattern(pattern)
    unit = unit_of(params)
    start = torch.zeros(16, 264, dtype=torch.bool)
    start[:8, :8] = True  # zero already, whole units of every pattern
    units = whole_units(start, unit)
    counts = torch.full((len(units),), round(0.43 * units.shape[1])) if by_row else torch.tensor([units.numel() // 2])
    mask = MASKS[score](weight.masked_fill(start, 0), moment, start, counts, kind, params)
    gone = whole_units(mask, unit)
    assert gone.reshape(len(counts), -1).sum(1).tolist() == counts.tolist()
    assert int(mask.sum()) == int(gone.sum()) * unit[0] * unit[1]  # no unit is cut
    assert mask[start].all()


@pytest.mark.parametrize("score", MASKS)
@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("1:4", 1, 4), ("8:16", 8, 16), ("2:3", 2, 3)])
def test_n_of_m_in_every_group(score, pattern, n, m):
    weight, _, moment = layer(8, 240)
    start = torch.zeros(8, 240, dtype=torch.bool)
    start[0, :m] = True
    mask = MASKS[score](weight.masked_fill(start, 0), moment, start, torch.tensor([0]), *parse_pattern(pattern))
    gone = mask.reshape(8, -1, m).sum(2)
    assert gone[0, 0] == m  # more zeros than the pattern asks stay
    assert gone.flatten()[1:].eq(m - n).all()


@pytest.mark.parametrize("score", ANY_PATTERN)
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything(score, sparsity):
    weight, _, moment = layer()
    start = torch.zeros(6, 12, dtype=torch.bool)
    mask = MASKS[score](weight, moment, start, torch.tensor([round(sparsity * 72)]), "unstructured", {})
    assert mask.float().mean() == sparsity


def test_the_first_unit_is_the_one_that_costs_least():
    """One unit goes: enumerate what each costs with its columns and all to the right free, from the definition."""
    for pattern in ("unstructured", "1x2", "2x1", "2x2"):
        weight, _, moment = layer(4, 8)
        kind, params = parse_pattern(pattern)
        r, c = unit_of(params)
        mask = obs_mask(weight, moment, torch.zeros(4, 8, dtype=torch.bool), torch.tensor([1]), kind, params)
        w, h, costs = weight.numpy(), moment.numpy(), {}
        for i, j in itertools.product(range(0, 4, r), range(0, 8, c)):
            inverse = np.linalg.inv(h[j:, j:])[:c, :c]
            costs[i, j] = sum(row @ np.linalg.solve(inverse, row) for row in w[i : i + r, j : j + c])
        i, j = min(costs, key=costs.__getitem__)
        expected = np.zeros((4, 8), dtype=bool)
        expected[i : i + r, j : j + c] = True
        assert np.array_equal(mask.numpy(), expected), pattern


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x2", "4x1", "4x2"])
def test_less_is_lost_than_by_simpler_masks(pattern):
    """With the same repair, on strongly correlated inputs, for every pattern."""
    weight, _, moment = layer(32, 96, 400)
    kind, params = parse_pattern(pattern)
    unit = unit_of(params)
    half = torch.tensor([32 * 96 // (unit[0] * unit[1]) // 2])
    start = torch.zeros(32, 96, dtype=torch.bool)
    losses = {}
    for score, moments in (("admm", moment), ("obs", moment), ("magnitude", torch.eye(96, dtype=torch.float64))):
        mask = MASKS["obs" if score == "magnitude" else score](weight, moments, start, half, kind, params)
        losses[score] = loss(REPAIRS["obs"](weight, mask, moment), weight, moment).sum()
    assert losses["admm"] < 0.95 * min(losses["obs"], losses["magnitude"])


def test_a_singular_moment_is_refused_and_a_damped_one_is_not():
    weight, _, _ = layer()
    start = torch.zeros(6, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="the second moments are singular; pass more calibration images"):
        obs_mask(weight, torch.zeros(12, 12), start, torch.tensor([36]), "unstructured", {})
    x = torch.randn(2, 12, dtype=torch.float64)  # two tokens for twelve inputs
    for score in ANY_PATTERN:
        mask = MASKS[score](weight, damped(x.t() @ x), start, torch.tensor([36]), "unstructured", {})
        assert int(mask.sum()) == 36


@pytest.mark.parametrize("rows", [8, 40])  # fewer and more than inputs: by eigenvectors, and by an inverse
def test_admm_against_its_definition(rows):
    weight, _, moment = layer(rows, 24)
    count = rows * 24 // 2
    mask = MASKS["admm"](weight, moment, torch.zeros(rows, 24, dtype=torch.bool), torch.tensor([count]),
                         "unstructured", {})  # fmt: skip
    w, h = weight.numpy(), moment.numpy()
    scale = np.sqrt(np.diag(h))
    w, h = w * scale, h / np.outer(scale, scale)
    d, dual, penalty = w, np.zeros_like(w), 0.03
    for _ in range(35):
        v = (w @ h + penalty * d - dual) @ np.linalg.inv(h + penalty * np.eye(24))
        shifted = v + dual / penalty
        gone = np.square(shifted) <= np.sort(np.square(shifted), axis=None)[count - 1]
        d = np.where(gone, 0, shifted)
        dual = dual + penalty * (v - d)
        penalty *= 1.18
    assert np.array_equal(mask.numpy(), gone)
