"""The pages with code work as they stand: Python and commands run, links lead somewhere; api.md is current."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import rmtkern
from docs.make_api import API, render
from rmtkern import comparison
from rmtkern.cli import main
from rmtkern.packing.timing import interleaved_samples

DOCS = Path(__file__).resolve().parents[1] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TUTORIALS = sorted(path.name for path in DOCS.glob("tutorial-*.md"))
PAGES = [*TUTORIALS, "migration.md"]
SHOWN = {"text"}
"""Fences that only show something."""


def blocks(path):
    return [(kind, code) for kind, code in FENCE.findall(path.read_text()) if kind not in SHOWN]


def test_blocks_outside_of_these_pages_are_none():
    """Every page with code is run, here or (README.md) in test_readme.py."""
    others = [path.name for path in DOCS.glob("*.md") if path.name not in PAGES and blocks(path)]
    assert others == [] and len(TUTORIALS) == 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with images of two classes and the model of the tutorials."""
    pil = pytest.importorskip("PIL.Image")
    for name in ("calibration", "held-out"):
        for label, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            (tmp_path / name / label).mkdir(parents=True)
            for index in range(2):
                pil.new("RGB", (70, 70), colour).save(tmp_path / name / label / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert write_file(blocks(DOCS / "tutorial-serve-cpu.md")[0][1])
    yield tmp_path
    sys.modules.pop("mymodel", None)


def write_file(code):
    """A block whose first line names a file becomes that file."""
    name = re.match(r"# (\w+\.py)\n", code)
    if name:
        Path(name.group(1)).write_text(code)
    return bool(name)


def sparse_wins(calls, budget_ms):
    """A timer without noise: every call runs once, sparse forms are twice as fast."""
    for call in calls.values():
        call()
    return {name: 2.0 if name == "original" or name.startswith("dense") else 1.0 for name in calls}


def run_command(line, capsys):
    """One line of a shell: rmtkern with its arguments, and perhaps a file for its output."""
    words = shlex.split(line)
    target = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if target else words
    assert words[0] == "rmtkern", line
    capsys.readouterr()
    assert main(words[1:]) in ((0, 1) if words[1] == "bench" else (0,)), f"{line}\n{capsys.readouterr().err}"
    if target:
        Path(target).write_text(capsys.readouterr().out)


@pytest.mark.parametrize("name", PAGES)
def test_pages_run(name, folder, capsys, monkeypatch):
    if name == "tutorial-spectra.md":
        pytest.importorskip("matplotlib")
    for module in ("rmtkern.packing.device", "rmtkern.advice"):
        monkeypatch.setattr(f"{module}.interleaved_ms", sparse_wins)
    monkeypatch.setattr(
        comparison,
        "interleaved_samples",
        lambda calls, ms, *rest, **more: interleaved_samples(calls, 1.0, *rest, **more),
    )
    space = {"__name__": "__main__"}
    for kind, code in blocks(DOCS / name):
        if kind == "bash":
            for line in code.strip().splitlines():
                run_command(line, capsys)
        elif kind == "python":
            if not write_file(code):
                exec(compile(code, name, "exec"), space)
        else:
            raise AssertionError(f"{name}: a block of {kind}, which is neither run nor text")


def test_names_of_the_migration_page_exist():
    text = (DOCS / "migration.md").read_text()
    names = {*re.findall(r"rmtkern\.(\w+)", text), *re.findall(r"`(\w+_)[`(]", text)} - {"sparsify_"}
    assert names <= set(dir(rmtkern)) and {"pack_", "prune_gradually_", "read_checkpoint", "save"} <= names


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_the_reference_is_what_the_docstrings_say():
    assert API.read_text() == render(), "run python -m docs.make_api"
