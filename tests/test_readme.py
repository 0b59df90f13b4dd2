"""README.md and docs/benchmarks.md tell the truth: tables are the committed results, code and commands work."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.tables import DOCUMENTS, render

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_the_committed_results():
    for path, count in zip(DOCUMENTS, (6, 21), strict=True):
        text = path.read_text()
        assert text.count("<!-- table: ") == count
        assert render(text) == text, "run python -m benchmarks.tables"


def test_code_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "strongest dense" in done.stdout and "sparsity" in done.stdout


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{command}:" in makefile for command in commands)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
