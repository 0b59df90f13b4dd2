"""Every equation that a docstring of spectrum cites exists in docs/math.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_cited_equations_exist():
    defined = {int(n) for n in re.findall(r"^\*\*\((\d+)\)", (ROOT / "docs/math.md").read_text(), re.MULTILINE)}
    cited = set()
    for path in (ROOT / "rmtkern" / "spectrum").glob("*.py"):
        for first, last in re.findall(r"docs/math\.md \((\d+)\)(?:-\((\d+)\))?", path.read_text()):
            cited |= set(range(int(first), int(last or first) + 1))
    assert len(cited) >= 21
    assert cited <= defined
