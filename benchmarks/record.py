"""Where result rows go: one CSV per kind of benchmark and CPU, with the environment in every row."""

import csv
import datetime
import functools
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmtkern.environment import cpu_model, environment

__all__ = [
    "RESULTS", "ROOT", "find_row", "has_row", "read_rows", "results_file", "revision", "rows", "stamped", "write_rows",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def results_file(kind: str, device: str | None = None) -> Path:
    """benchmarks/results/<kind>-<device>.csv, for this CPU unless a device's name is given."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in (device or cpu_model()).lower()).split())
    return RESULTS / f"{kind}-{slug}.csv"


@functools.cache
def revision(folder: Path = ROOT) -> str | None:
    """Short git revision of a checkout, with "+" where the library differs from it; None outside of git."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "rmtkern", "csrc", "setup.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def stamped(row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The row with CPU, threads, versions, git revision and date; what the row has already stays."""
    return {**environment(), "revision": revision(), **more, "date": datetime.date.today().isoformat(), **row}


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a results file; an empty cell is ""."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows(name: str) -> list[dict[str, str]]:
    """All rows of one file in RESULTS."""
    return read_rows(RESULTS / name)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = ()) -> None:
    """Write rows; with `keys`, rows of the file that differ in them are kept, equal ones replaced.

    Args:
        path: the CSV; its folder is created.
        rows: all with the same columns; None is an empty cell.
        keys: columns that identify a row.
    """
    kept: list[dict[str, str]] = []
    if keys and path.exists():
        new = {tuple(_cell(row[key]) for key in keys) for row in rows}
        kept = [row for row in read_rows(path) if tuple(row[key] for key in keys) not in new]
    path.parent.mkdir(exist_ok=True)
    columns = list(rows[0])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def find_row(path: Path, asked: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str] | None:
    """The row of a results file that equals `asked` in the columns `keys`; None if it has none, or no file is there."""
    if not path.exists():
        return None
    wanted = [_cell(asked[key]) for key in keys]
    return next((row for row in read_rows(path) if [row[key] for key in keys] == wanted), None)


def has_row(path: Path, asked: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Whether a results file has a row that equals `asked` in the columns `keys`."""
    return find_row(path, asked, keys) is not None


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
