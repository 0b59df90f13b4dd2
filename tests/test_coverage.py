"""Every model class of docs/coverage.md is pruned, packed, saved, loaded and compiled, as the document says."""

from pathlib import Path

import pytest

from benchmarks.coverage import COUNTS, MODELS, TOLERANCE, cover, table

LINES = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text().splitlines()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_class_is_covered_as_documented(name):
    row = cover(name)
    assert row.error <= TOLERANCE and row.loaded and row.compiled
    assert row.counts == (row.share >= COUNTS)
    assert table([row]).to_markdown().splitlines()[-1] in LINES


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", MODELS)
def test_a_model_class_under_inductor(name):
    row = cover(name, "inductor")
    assert row.error <= TOLERANCE and row.loaded and row.compiled


def test_the_document_has_no_other_models():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in LINES if line.startswith("| t")]
    assert rows == list(MODELS)
    assert sum(line.split(" | ")[6] == "yes" for line in LINES if line.startswith("| t")) >= 25
