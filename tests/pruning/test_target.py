"""The bisection alone: what it tries, what it keeps, and when it gives up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtkern.pruning.target import Target, Trial, search


def run(accuracy, *, max_drop=0.1, tolerance=0.01, least=0.0, before=0.9):
    tried, kept = [], []

    def attempt(sparsity):
        tried.append(sparsity)
        return accuracy(sparsity)

    def keep():
        kept.append(tried[-1])
        return tried[-1]

    best, target = search(Target(max_drop, tolerance, before, 100), least, attempt, keep)
    assert [trial.sparsity for trial in target.trials] == tried
    assert kept == [trial.sparsity for trial in target.trials if target.allows(trial.accuracy)]
    assert best == kept[-1] == max(kept)
    return best, target


@settings(deadline=None, max_examples=100)
@given(st.floats(0, 0.99), st.floats(0.001, 0.2), st.floats(0, 0.9))
def test_the_edge_is_found_to_the_tolerance(edge, tolerance, least):
    edge = max(edge, least)
    best, target = run(lambda s: 0.9 if s <= edge else 0.5, tolerance=tolerance, least=least)
    assert edge - tolerance <= best <= edge
    assert all(least <= trial.sparsity < 1 for trial in target.trials)


def test_a_drop_of_exactly_so_many_images_is_allowed():
    """95 of 100 to 94 of 100 is a drop of 0.01, though 0.95 - 0.94 > 0.01 in floats."""
    assert Target(0.01, 0.01, 0.95, 100).allows(0.94)
    assert not Target(0.01, 0.01, 0.95, 100).allows(0.93)
    assert Target(0.0, 0.01, 1 / 3, 3).allows(1 / 3)


def test_an_accuracy_that_rises_is_followed():
    assert run(lambda s: 0.95)[0] > 0.99


def test_where_nothing_is_allowed_the_weights_stay_as_they_are():
    best, target = run(lambda s: 0.9 if s == 0.2 else 0.1, least=0.2)
    assert best == 0.2 and target.trials[-1] == Trial(0.2, 0.9)


def test_gives_up_with_every_trial_in_the_message():
    with pytest.raises(ValueError, match=r"no sparsity keeps .* max_drop=0.1 of 90.00%: 10.00% at 0.5, 10"):
        run(lambda s: 0.1)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_drop": -0.01}, ValueError, r"max_drop: expected a fraction in \[0, 1\), got -0.01"),
        ({"max_drop": 1}, ValueError, r"max_drop: expected a fraction in \[0, 1\), got 1"),
        ({"max_drop": float("nan")}, ValueError, "max_drop: expected a fraction"),
        ({"max_drop": "1%"}, TypeError, "max_drop: expected a number, got str"),
        ({"max_drop": True}, TypeError, "max_drop: expected a number, got bool"),
        ({"tolerance": 0}, ValueError, r"tolerance: expected a fraction in \(0, 1\), got 0"),
        ({"tolerance": 1.0}, ValueError, r"tolerance: expected a fraction in \(0, 1\)"),
        ({"tolerance": None}, TypeError, "tolerance: expected a number, got NoneType"),
    ],
)
def test_refuses_nonsense(fields, error, message):
    with pytest.raises(error, match=message):
        Target(**{"max_drop": 0.1, "tolerance": 0.01, "accuracy": 0.9, "images": 10, **fields})
