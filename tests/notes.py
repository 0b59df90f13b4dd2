"""pytest plugin of tests.full_run: notes each test as it ends, so that a run goes on where one was stopped.

    pytest -p tests.notes --notes FILE [--share 1/2] ...

The file has a JSON object per line: the tests that were selected ("selected": names), and each one that ended ("test",
"outcome", "seconds", "cpu_seconds" of the process and its children, "notes"). A test that is noted and did not fail is
left out. With --share I/N only every N-th of the tests is run, from the I-th on; the processes of all shares append to
one file.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Notes", "read"]


class Notes:
    """What a file of notes says.

    Args:
        selected: names of the tests, of all shares.
        ended: name -> outcome ("passed", "failed" or "skipped"), seconds, CPU seconds and notes; of several runs the
            last counts.
    """

    def __init__(self, selected: set[str], ended: dict[str, dict[str, Any]]) -> None:
        self.selected, self.ended = selected, ended

    @property
    def left(self) -> set[str]:
        """Selected tests that did not end, or failed."""
        return {name for name in self.selected if self.ended.get(name, {}).get("outcome") in (None, "failed")}


def read(path: Path) -> Notes:
    """The notes in a file; of a line that a killed process left incomplete, nothing."""
    selected: set[str] = set()
    ended: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        selected |= set(record.get("selected", ()))
        if "test" in record:
            ended[record["test"]] = record
    return Notes(selected, {name: record for name, record in ended.items() if name in selected})


def share_of(text: str) -> tuple[int, int]:
    """(I, N) of a text such as "1/2"; ValueError for any other."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--share: expected I/N with 1 <= I <= N, such as 1/2, got {text!r}")
    return int(match[1]), int(match[2])


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    parser.addoption("--notes", type=Path, required=True, help="file to note each test in as it ends")
    parser.addoption("--share", default="1/1", help="I/N: every N-th test, from the I-th on")


def pytest_configure(config: pytest.Config) -> None:
    """Notes go to a file of their own."""
    config.pluginmanager.register(_Noting(config.getoption("--notes"), *share_of(config.getoption("--share"))))


class _Noting:
    def __init__(self, path: Path, share: int, shares: int) -> None:
        self.path, self.share, self.shares = path, share, shares
        self.running: dict[str, Any] = {}
        self.before = _cpu_seconds()

    def _note(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:  # in one write, as several processes may be at it
            file.write(f"\n{json.dumps(record)}\n")  # the first newline ends what a killed one left

    def pytest_collection_finish(self) -> None:
        self.before = _cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
        result = yield  # other plugins deselect first
        self._note({"selected": [item.nodeid for item in items]})
        left = read(self.path).left
        mine = [item for index, item in enumerate(items)
                if index % self.shares == self.share - 1 and item.nodeid in left]  # fmt: skip
        others = [item for item in items if item not in mine]
        if others:
            config.hook.pytest_deselected(items=others)
        items[:] = mine
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self.running = {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "notes": []}
        self.running["seconds"] += report.duration
        if report.outcome != "passed" and self.running["outcome"] != "failed":
            self.running["outcome"] = report.outcome
        if report.when == "teardown":
            self.running["notes"] = [f"{name}: {value}" for name, value in report.user_properties]
            self.running["cpu_seconds"] = _cpu_seconds() - self.before
            self.before = _cpu_seconds()
            self._note(self.running)


def _cpu_seconds() -> float:
    """Of this process and of all children that ended."""
    return sum(os.times()[:4])
