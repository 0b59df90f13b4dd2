"""The exact selection, against sorting in NumPy: of keys that are held, and of keys that follow from ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtkern.pruning.smallest import RankKeys, take_smallest


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_take_smallest_equals_a_stable_sort(sizes, levels, wide, seed):
    rng = np.random.default_rng(seed)
    dtype = np.float64 if wide else np.float32
    keys = [(rng.integers(0, levels, (1, size)) * 10.0 ** rng.integers(-30, 30)).astype(dtype) for size in sizes]
    opens = [rng.random(key.shape) < 0.7 for key in keys]
    flat, open_ = np.concatenate(keys, 1)[0], np.concatenate(opens, 1)[0]
    count = int(rng.integers(0, open_.sum() + 1))
    order = [i for i in np.argsort(flat, kind="stable") if open_[i]][:count]
    expected = np.zeros(len(flat), bool)
    expected[order] = True
    closed = rng.choice([-1.0, np.inf], size=4)
    marked = [np.where(one, key, closed[i]).astype(dtype) for i, (one, key) in enumerate(zip(opens, keys, strict=True))]
    taken = list(take_smallest([torch.from_numpy(key) for key in marked], count))
    assert np.array_equal(torch.cat(taken, 1)[0].numpy(), expected)


def test_take_smallest_takes_all_that_may_go_and_both_zeros():
    taken = list(take_smallest([torch.tensor([[math.inf, 1.0, -0.0, -1.0, 0.0]])], 3))
    assert taken[0].tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("count", [-1, 3])
def test_take_smallest_refuses_other_counts(count):
    with pytest.raises(ValueError, match=rf"count: expected 0 to 2 \(the entries that may go\), got {count}"):
        next(take_smallest([torch.tensor([[1.0, 1.0, -1.0], [math.inf] * 3])], count))


def ranks(scores, by_row, share, before=0):
    return RankKeys(scores.shape, lambda: torch.from_numpy(scores), by_row, share, before)


def keys_of(scores, by_row, share, before):
    """Float64 keys [N, K] by their definition, inf where an entry may not go."""
    rows = scores if by_row else scores.reshape(1, -1)
    order = np.argsort(rows, axis=1, kind="stable")
    rank = np.empty(rows.shape)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(rows.shape[1], dtype=float), rows.shape), axis=1)
    with np.errstate(divide="ignore"):
        keys = (rank - before + 0.5) / np.float64(share)
    return np.where((rows >= 0) & (rows < np.inf) & (keys >= 0), keys, np.inf).reshape(scores.shape)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.sampled_from([1, 2, 3, 6, 9, 18, 37])), min_size=1, max_size=4),
    st.sampled_from(["row", "layer", "cycle", "share"]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_keys_that_follow_from_ranks_take_what_a_stable_sort_of_them_takes(shapes, kind, levels, seed):
    """Zeros, forbidden entries, equal scores, equal keys of layers with widths that divide each other."""
    rng = np.random.default_rng(seed)
    made = []
    for shape in shapes:
        scores = rng.integers(0, levels, shape).astype(np.float32)
        scores[rng.random(shape) < 0.2] = -1
        if kind != "cycle":
            scores[rng.random(shape) < 0.2] = np.inf
        size, gone = scores.size, int((scores < 0).sum())
        share = {"row": shape[1], "layer": size, "cycle": rng.choice([0.0, 0.3, 1.7]) * size,
                 "share": rng.choice([0.1, 0.9, 1.3]) * size}[kind]  # fmt: skip
        made.append((scores, kind == "row", share, gone if kind == "cycle" else 0))
    keys = np.concatenate([keys_of(*one).ravel() for one in made])
    may = int(np.isfinite(keys).sum())
    for count in {0, may, int(rng.integers(0, may + 1))}:
        want = np.zeros(len(keys), bool)
        want[np.argsort(keys, kind="stable")[:count]] = True
        taken = list(take_smallest([ranks(*one) for one in made], count))
        assert [tuple(mask.shape) for mask in taken] == shapes
        assert np.array_equal(np.concatenate([mask.numpy().ravel() for mask in taken]), want)


def test_equal_ranks_of_a_row_budget_go_by_layer_then_row():
    scores = np.tile(np.arange(3, dtype=np.float32), (4, 1))
    first, second = take_smallest([ranks(scores, True, 3), ranks(scores, True, 3)], 6)
    assert first[:, 0].all() and int(first.sum()) == 4 and second.nonzero().tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("count", [-1, 5])
def test_keys_of_ranks_refuse_other_counts(count):
    scores = np.array([[1.0, 1.0, -1.0], [math.inf, 2.0, 3.0]], np.float32)
    with pytest.raises(ValueError, match=rf"count: expected 0 to 4 \(the entries that may go\), got {count}"):
        next(take_smallest([ranks(scores, True, 3)], count))
