"""A short run of tests/fuzz.py, and that it would see what it looks for; the long form is `make fuzz`."""

import os
import random
import signal
from collections import Counter

import pytest

from rmtkern.layouts import LAYOUTS
from rmtkern.testing import random_sparse
from tests import fuzz
from tests.fuzz import FILES, OUTCOMES, WEIGHT, Fuzzer, compare, fuzzer, watched


def run(count, seed):
    with fuzzer(seed) as found:
        return Counter((found.kind(i), found.one(i)) for i in range(count))


def test_mutations_give_a_right_model_or_an_error_by_name():
    found = run(500, seed=1)
    assert {kind for kind, _ in found} == {*FILES, WEIGHT}
    assert {outcome for _, outcome in found} == {"identical", "valid", "refused"}
    assert {outcome for kind, outcome in found if kind == "tensor, old checksum"} <= {"identical", "refused"}
    assert {outcome for kind, outcome in found if kind == WEIGHT} == {"identical", "valid", "refused"}


@pytest.mark.slow
def test_many_mutations():
    assert sum(run(20_000, seed=2).values()) == 20_000


def test_mutations_repeat():
    with fuzzer(3) as one:
        cases = one.cases
        for kind, mutate in FILES.items():
            for case in cases if kind != "index and shards" else cases[:1]:
                first, again = (mutate(random.Random(7), case) for _ in range(2))
                assert first == again and next(iter(first.files.values())) is not None


class Deadly(Fuzzer):
    def __init__(self):
        self.seed = 0

    def one(self, index):
        if index == 103:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 105:
            raise AssertionError("another model")
        return "refused"


def test_a_crash_is_counted_and_the_rest_goes_on(capfd):
    found = watched(Deadly(), 100, 8)
    assert found == [*["refused"] * 3, "crashed", "refused", "wrong", *["refused"] * 2]
    text = capfd.readouterr().err
    assert "mutation 103 " in text and f"ended the process: status {int(signal.SIGKILL)}" in text
    assert "mutation 105 " in text and "another model" in text


def test_a_crash_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["fuzz", "--count", "8", "--begin", "100", "-o", str(tmp_path / "out.csv")])
    monkeypatch.setattr(fuzz, "Fuzzer", lambda folder, seed: Deadly())
    assert fuzz.main() == 1
    rows = fuzz.read_rows(tmp_path / "out.csv")
    assert {row["kind"] for row in rows} == {*FILES, WEIGHT}
    total = {outcome: sum(int(row[outcome]) for row in rows) for outcome in OUTCOMES}
    assert total == {"identical": 0, "valid": 0, "refused": 6, "wrong": 1, "crashed": 1}
    assert sum(int(row["mutations"]) for row in rows) == 8


def test_a_kernel_that_computes_something_else_is_seen(monkeypatch):
    form, real = LAYOUTS["bitmask"].pack(random_sparse(48, 64, 0.5)), fuzz.linear
    compare(form, random.Random(0))
    monkeypatch.setattr(fuzz, "linear", lambda x, w: real(x, w) * 1.001)
    with pytest.raises(AssertionError, match=r"bitmask \(48, 64\) differs by"):
        compare(form, random.Random(0))
