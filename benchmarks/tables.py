"""Regenerate the tables of README.md from benchmarks/results/*.csv, so that no number there is typed by hand.

    python -m benchmarks.tables           # rewrite README.md
    python -m benchmarks.tables --check   # exit 1 if README.md differs

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of TABLES.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

from rmtkern.tables import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES: dict[str, Callable[[], Table]] = {}


def rows(name: str) -> list[dict[str, str]]:
    """All rows of one results file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def render(text: str) -> str:
    """The text with every marked table written anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"README asks for table {name!r}; known: {', '.join(sorted(TABLES))}")
        return f"<!-- table: {name} -->\n{TABLES[name]().to_markdown()}\n<!-- end table -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end table -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = render(old)
    if args.check:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
