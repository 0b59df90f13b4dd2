"""Where result rows go: one CSV per kind of benchmark and CPU, with the environment in every row."""

import csv
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmtkern.environment import cpu_model, environment

__all__ = ["results_file", "stamped", "write_rows"]

RESULTS = Path(__file__).resolve().parent / "results"


def results_file(kind: str) -> Path:
    """benchmarks/results/<kind>-<cpu>.csv for this CPU."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in cpu_model().lower()).split())
    return RESULTS / f"{kind}-{slug}.csv"


def stamped(row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The row with CPU, threads, versions and date; what the row has already stays."""
    return {**environment(), **more, "date": datetime.date.today().isoformat(), **row}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = ()) -> None:
    """Write rows; with `keys`, rows of the file that differ in them are kept, equal ones replaced.

    Args:
        path: the CSV; its folder is created.
        rows: all with the same columns.
        keys: columns that identify a row.
    """
    kept: list[dict[str, Any]] = []
    if keys and path.exists():
        new = {tuple(str(row[key]) for key in keys) for row in rows}
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in new]
    path.parent.mkdir(exist_ok=True)
    columns = list(rows[0])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows([*kept, *rows])
