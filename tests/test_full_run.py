"""The long checks' own parts: which versions are chosen, what else they need, and how a run becomes a row."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.record import ROOT, read_rows
from tests import full_run
from tests.full_run import LIBRARIES, OUTPUT, PARTS, SLOW, STOPPED, allowed, counts, missing, newest_two
from tests.notes import read, share_of


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        (["5.24.0", "5.23.1", "5.23.0", "5.22.2"], ["5.24.0", "5.23.1"]),
        (["5.0.0", "4.57.3", "4.57.2"], ["5.0.0", "4.57.3"]),
        (["4.9.1", "4.50.0", "4.51.0", "5.0.0rc1", "old"], ["4.51.0", "4.50.0"]),
        (["5.1.0", "5.1.2", "5.1.10"], ["5.1.10", "5.1.2"]),  # one minor version: its two newest releases
    ],
)
def test_the_two_newest_minor_versions(versions, chosen):
    assert newest_two(versions, Requirement("transformers>=4.50")) == chosen


def test_too_few_versions():
    with pytest.raises(ValueError, match=r"transformers>=4\.50: expected two versions, found 4\.51\.0"):
        newest_two(["4.51.0", "4.49.0", "5.0.0.dev1"], Requirement("transformers>=4.50"))


def test_what_the_project_allows():
    for package in LIBRARIES:
        assert allowed(package).name == package and "<" not in str(allowed(package).specifier)  # none is pinned


def test_versions_that_pip_finds(monkeypatch):
    monkeypatch.setattr(full_run, "pip", lambda *arguments: "timm (1.0.3)\nAvailable versions: 1.0.3, 1.0.2\n")
    assert full_run.available("timm") == ["1.0.3", "1.0.2"]
    monkeypatch.setattr(full_run, "pip", lambda *arguments: "nothing")
    with pytest.raises(RuntimeError, match="pip found no versions of timm"):
        full_run.available("timm")


def put(folder, name, version, requires=()):
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


def installed(name):
    known = {"here": "1.5", "old": "0.9", "pre": "2.0rc1"}
    if name not in known:
        raise metadata.PackageNotFoundError(name)
    return known[name]


def test_only_what_is_not_there_is_asked_for(tmp_path):
    needs = ["here>=1.0", "old>=1.0,<2", "gone", 'other; extra == "x"', 'never; python_version < "3"', "pre>=1.0"]
    put(tmp_path, "lib", "5.0", [*needs, "be_side>=2"])
    put(tmp_path, "be-side", "2.1", ["deeper==3"])
    assert missing(tmp_path, installed) == ["deeper==3", "gone", "old<2,>=1.0"]


def test_a_package_is_put_there_with_what_it_lacks(tmp_path, monkeypatch):
    asked = []

    def pip(*arguments):
        asked.append(arguments[arguments.index(str(tmp_path)) + 1 :])
        for one in asked[-1]:
            name, _, version = one.partition("==")
            put(tmp_path, name, version or "3", ["tests_need_this==3"] if name == "lib" else [])

    monkeypatch.setattr(full_run, "pip", pip)
    full_run.install("lib", "5.0", tmp_path)
    assert asked == [("lib==5.0",), ("tests_need_this==3",)]


def test_failing_pip_says_why():
    with pytest.raises(RuntimeError, match=r"pip .* failed:\n"):
        full_run.pip("no-such-verb")


PASSES = "def test_one(record_property):\n    record_property('calls', 7)\n"
REST = "import pytest\ndef test_two():\n    assert False\ndef test_three():\n    pytest.skip('no')\n"
BROKEN = "@pytest.fixture\ndef bad():\n    1 / 0\ndef test_four(bad):\n    pass\n"


LEAN = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def test_a_run_becomes_counts(tmp_path):
    """In a process of its own, as the parts are run."""
    (tmp_path / "test_it.py").write_text(PASSES + REST + BROKEN)
    found = full_run.run_pytest([str(tmp_path)], LEAN, tmp_path / "notes.jsonl")
    assert {key: found[key] for key in ("passed", "failed", "skipped", "left", "notes")} == {
        "passed": 1, "failed": 2, "skipped": 1, "left": 0, "notes": "calls: 7"
    }  # fmt: skip
    assert found["timm"] and found["transformers"] and {"seconds", "cpu_seconds"} <= found.keys()


def test_a_run_that_was_stopped_says_so(monkeypatch, tmp_path):
    def run(argv, **more):
        if "pytest" in argv:
            return subprocess.CompletedProcess(argv, 2)
        return subprocess.CompletedProcess(argv, 0, '["1", "2"]')

    monkeypatch.setattr(full_run.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="selected no tests"):
        full_run.run_pytest([str(tmp_path)], {}, tmp_path / "notes.jsonl")
    (tmp_path / "notes.jsonl").write_text('{"selected": ["a", "b"]}\n')
    found = full_run.run_pytest([str(tmp_path)], {}, tmp_path / "notes.jsonl")
    assert found["left"] == 2 and found["notes"] == f"{STOPPED} (exit status 2)"


def noted(tmp_path, code=None, share="1/1"):
    """Passed, failed and left after a run of pytest, which has nothing of this one."""
    path = tmp_path / "notes.jsonl"
    if code is not None:
        (tmp_path / "test_it.py").write_text(code)
    options = ["-p", "tests.notes", f"--notes={path}", f"--share={share}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_it.py")]
    subprocess.run(command, cwd=ROOT, env=LEAN, capture_output=True)
    found = counts(read(path))
    return found["passed"], found["failed"], len(read(path).left)


FAILS = "def test_one():\n    assert False\n"
TWO = "def test_two():\n    pass\n"


def test_a_run_goes_on_where_one_was_stopped(tmp_path):
    stopped = "def test_two():\n    raise KeyboardInterrupt\n"
    after = "def test_three():\n    pass\n"
    assert noted(tmp_path, PASSES + stopped + after) == (1, 0, 2)
    with (tmp_path / "notes.jsonl").open("a") as file:
        file.write('{"test": "half a li')
    assert noted(tmp_path, FAILS + TWO + after) == (3, 0, 0)  # test_one was not run again


def test_what_failed_is_run_again_and_nothing_else(tmp_path):
    assert noted(tmp_path, PASSES + TWO.replace("pass", "assert False")) == (1, 1, 1)
    assert noted(tmp_path, FAILS + TWO) == (2, 0, 0)
    assert noted(tmp_path, FAILS + TWO) == (2, 0, 0)  # nothing was left to run


def test_shares_are_run_apart_and_counted_together(tmp_path):
    code = "".join(f"def test_{i}():\n    pass\n" for i in range(5))
    assert noted(tmp_path, code, "2/2") == (2, 0, 3)
    assert noted(tmp_path, code, "1/2") == (5, 0, 0)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b"])
def test_bad_shares(text):
    with pytest.raises(ValueError, match=r"--share: expected I/N with 1 <= I <= N, such as 1/2, got"):
        share_of(text)


def test_notes_of_other_code_or_arguments_are_apart(monkeypatch):
    first = full_run.notes_file("soak")
    assert first == full_run.notes_file("soak") and first.name.startswith("soak.") and "build" in first.parts
    assert len({first, full_run.notes_file("soak", ["--soak-seconds", "20"]), full_run.notes_file("timm, newest")}) == 3
    run = subprocess.run
    monkeypatch.setattr(full_run.subprocess, "run", lambda argv, **more: run([*argv[:3], "rev-parse", "HEAD^"], **more))
    assert full_run.notes_file("soak") != first


def test_parts_are_written_as_they_end_and_failures_fail(tmp_path, monkeypatch):
    output = tmp_path / "out.csv"

    def run(arguments, environment, notes, share):
        kind = "good" if arguments == SLOW["soak"] else "bad"
        return {"timm": "1", "transformers": "2", "passed": 3, "failed": int(kind == "bad"), "skipped": 0,
                "seconds": 9, "notes": "", "left": int(share != "1/1")}  # fmt: skip

    monkeypatch.setattr(full_run, "run_pytest", run)
    monkeypatch.setattr(sys, "argv", ["full_run", "--part", "soak", "-o", str(output), "--share", "1/2"])
    assert full_run.main() == 0 and not output.exists()  # the other share has not ended
    monkeypatch.setattr(sys, "argv", ["full_run", "--part", "soak", "-o", str(output)])
    assert full_run.main() == 0
    monkeypatch.setattr(sys, "argv", ["full_run", "--part", "slow", "--part", "soak", "-o", str(output)])
    assert full_run.main() == 1
    assert [(row["part"], row["failed"]) for row in read_rows(output)] == [("slow", "1"), ("soak", "0")]


def test_versions_run_before_the_installed_one(monkeypatch):
    seen = []

    def run(arguments, environment, notes, share):
        assert notes.name.startswith("timm-") and share == "1/1"
        seen.append((arguments, environment["PYTHONPATH"].split(":")[0]))
        return {"timm": "1.0.9" if "1.0.9" in seen[-1][1] else "1.0.8", "transformers": "2", "passed": 1, "failed": 0}

    monkeypatch.setattr(full_run, "run_pytest", run)
    monkeypatch.setattr(full_run, "available", lambda package: ["1.0.9", "1.0.8"])
    monkeypatch.setattr(full_run, "install", lambda *arguments: None)
    assert [row["part"] for row in full_run.run_part("timm")] == ["timm, newest", "timm, before"]
    assert [path.rsplit("/", 1)[1] for _, path in seen] == ["timm-1.0.9", "timm-1.0.8"]
    monkeypatch.setattr(full_run, "available", lambda package: ["1.0.9", "1.0.7"])
    with pytest.raises(RuntimeError, match=r"asked for timm 1\.0\.7, ran 1\.0\.8"):
        full_run.run_part("timm")


def test_every_slow_test_is_in_one_part():
    """The parts' markers cover what is slow, each test once, and what is short is in the default suite."""
    for marks in ({"slow"}, {"slow", "soak"}, {"slow", "inductor"}, set()):
        chosen = [part for part, arguments in SLOW.items() if selects(arguments[-1], marks)]
        assert len(chosen) == 1, (marks, chosen)
    for mark in ("soak", "inductor"):
        found = subprocess.run(
            ["grep", "-rl", f"pytest.mark.{mark}$", "tests"], cwd=ROOT, capture_output=True, text=True
        )
        assert found.stdout.split() == [SLOW[mark][0]]  # the only file that is searched


def selects(expression, marks):
    names = {name: name in marks for name in ("slow", "soak", "inductor", "compiled")}
    return eval(expression, {}, names)


def test_what_is_committed():
    rows = {row["part"]: row for row in read_rows(OUTPUT)}
    versions = {f"{library}, {age}" for library in LIBRARIES for age in ("newest", "before")}
    assert {"soak", *versions} <= set(rows) <= {*SLOW, *versions}
    for row in rows.values():
        assert int(row["passed"]) > 0 and row["failed"] == "0" and row["revision"] and row["date"], row
    for library in LIBRARIES:
        newest, before = (Version(rows[f"{library}, {age}"][library]) for age in ("newest", "before"))
        assert newest > before
    mutated = read_rows(OUTPUT.with_name("fuzz.csv"))
    assert sum(int(row["mutations"]) for row in mutated) >= 100_000
    assert all(row["wrong"] == row["crashed"] == "0" and row["sanitizer"] for row in mutated)


def test_make_runs_every_part():
    text = (ROOT / "Makefile").read_text()
    recipe = text[text.index("\ntest-all:") :].split("\n\n")[0]
    assert "-m tests.full_run\n" in recipe and "$(MAKE) fuzz" in recipe  # all parts, as none is named
    assert (*SLOW, *LIBRARIES) == PARTS
