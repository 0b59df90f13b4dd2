"""The papers' experiments: each runs and confirms its claims; a number outside of its bounds does not."""

import csv

import pytest

from benchmarks.paper.__main__ import EXPERIMENTS, main
from benchmarks.paper.finding import Finding


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_confirms_its_claims(name):
    findings = list(EXPERIMENTS[name](1))
    assert findings and {finding.experiment for finding in findings} == {name}
    assert [finding for finding in findings if not finding.holds] == []
    assert all(finding.low is not None or finding.high is not None for finding in findings if finding.published is None)


@pytest.mark.parametrize(
    ("measured", "low", "high", "holds"),
    [(1, None, None, True), (1, 1, 1, True), (1, 2, None, False), (1, None, 0, False), (float("nan"), 0, 1, False)],
)
def test_bounds(measured, low, high, holds):
    assert Finding("X", "", "", measured, low, high).holds is holds


def test_rows_are_stored_and_a_failed_claim_is_the_exit_status(tmp_path, monkeypatch):
    path = tmp_path / "paper.csv"
    monkeypatch.setitem(EXPERIMENTS, "T6", lambda seed: iter([Finding("T6", "a", "b", seed, 0, 0)]))
    assert main(["T6", "--out", str(path)]) == 0
    assert main(["T6", "--seeds", "2", "--out", str(path)]) == 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["holds"]) for row in rows] == [("0", "True"), ("1", "False")] and rows[0]["torch"]
    with pytest.raises(SystemExit):
        main(["T99"])
