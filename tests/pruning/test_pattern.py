"""Patterns against a count in each group, and their names."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtkern.pruning.pattern import (
    PATTERNS,
    kth_smallest,
    parse_pattern,
    smallest_units,
    unit_entries,
    unit_scores,
    whole_units,
)


def test_unstructured_lets_everything_go():
    assert PATTERNS["unstructured"](torch.randn(3, 5), {}).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_n_of_m_takes_the_lowest_of_each_group_in_order(n, more, rows, groups, seed):
    m = n + more
    score = np.random.default_rng(seed).integers(0, 3, (rows, groups * m)).astype(np.float32)  # many ties
    mask = PATTERNS["n:m"](torch.from_numpy(score), {"n": n, "m": m}).numpy()
    for group, chosen in zip(score.reshape(-1, m), mask.reshape(-1, m), strict=True):
        expected = sorted(range(m), key=lambda i: (group[i], i))[: m - n]
        assert sorted(np.flatnonzero(chosen)) == sorted(expected)


def test_parse():
    assert parse_pattern("unstructured") == ("unstructured", {})
    assert parse_pattern("2:4") == ("n:m", {"n": 2, "m": 4})
    assert parse_pattern("12:16") == ("n:m", {"n": 12, "m": 16})
    assert parse_pattern("4x1") == ("rxc", {"r": 4, "c": 1})
    assert parse_pattern("32x128") == ("rxc", {"r": 32, "c": 128})
    assert parse_pattern("2:4x4") == ("n:m", {"n": 2, "m": 4, "r": 4})


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_units(r, c, rows, cols, seed):
    score = torch.from_numpy(np.random.default_rng(seed).random((rows * r, cols * c)))
    means = unit_scores(score, (r, c))
    whole = whole_units(score > 0.2, (r, c))
    assert means.shape == whole.shape == (rows, cols)
    for i in range(rows):
        for j in range(cols):
            unit = score[i * r : (i + 1) * r, j * c : (j + 1) * c]
            assert float(means[i, j]) == pytest.approx(float(unit.mean()))
            assert bool(whole[i, j]) == bool((unit > 0.2).all())
    assert torch.equal(whole_units(unit_entries(whole, (r, c)), (r, c)), whole)


@pytest.mark.parametrize("bad", ["1x1", "0x4", "16x8", "32x3", "32x48", "256x16"])
def test_size_of_a_block(bad):
    with pytest.raises(ValueError, match=r"expected mini-blocks of 2 to 64 entries, such as '4x1', or blocks with"):
        parse_pattern(bad)


@pytest.mark.parametrize("bad", ["2-4", "", "2:4x", "2:4x4x1", "-1:4"])
def test_unknown_pattern(bad):
    with pytest.raises(
        ValueError, match=r"unknown pattern .*; expected 'unstructured', n:m such as '2:4', n:mxr such as"
    ):
        parse_pattern(bad)


@pytest.mark.parametrize("bad", ["4:4", "0:4", "5:4"])
def test_n_out_of_range(bad):
    with pytest.raises(ValueError, match="expected 1 <= n < m"):
        parse_pattern(bad)


@pytest.mark.parametrize("bad", ["2:4x1", "2:4x65", "2:4x0"])
def test_outputs_that_share_out_of_range(bad):
    with pytest.raises(ValueError, match="expected 2 to 64 outputs that share a pattern"):
        parse_pattern(bad)


def test_pattern_of_another_type():
    with pytest.raises(TypeError, match="pattern: expected a string, got tuple"):
        parse_pattern((2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_smallest_units_and_equal_ones_in_order(dtype):
    scores = (torch.rand(1, 500) * 20).round().to(dtype)  # many are equal
    scores[0, ::50] = torch.inf
    scores[0, 7] = -1
    for count in (0, 1, 250, 495, 500):
        expected = np.zeros(500, bool)
        expected[np.argsort(scores[0].double().numpy(), kind="stable")[:count]] = True
        assert np.array_equal(smallest_units(scores, torch.tensor([count]))[0].numpy(), expected)
        rows = smallest_units(scores.expand(3, 500), torch.tensor([0, count, 500]))
        assert rows.sum(1).tolist() == [0, count, 500] and np.array_equal(rows[1].numpy(), expected)
        if count:
            assert kth_smallest(scores, count) == scores[0].sort().values[count - 1]
