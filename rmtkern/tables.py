"""Rows of cells as text, Markdown, CSV or JSON: the one place that formats a table.

It knows nothing about what the cells mean.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table"]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.4g}"
    return str(value)


@dataclass(frozen=True)
class Table:
    """A titled table; cells are strings, numbers, booleans or None (shown as "-").

    Args:
        columns: header of each column.
        rows: one sequence of cells per row, as long as `columns`.
        notes: lines printed under the table, such as totals.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    def to_text(self) -> str:
        """Aligned columns for a terminal; numbers to the right, words to the left."""
        cells = [[_cell(value) for value in row] for row in self.rows]
        widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(self.columns)]
        numeric = [
            bool(self.rows) and all(row[i] is None or isinstance(row[i], int | float) for row in self.rows)
            for i in range(len(self.columns))
        ]

        def line(row: Sequence[str]) -> str:
            parts = (
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, numeric, strict=True)
            )
            return "  ".join(parts).rstrip()

        body = [line(self.columns), line(["-" * width for width in widths]), *(line(row) for row in cells)]
        return "\n".join([*body, *self.notes])

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown; notes follow as paragraphs."""

        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"

        body = [line(self.columns), "|" + "---|" * len(self.columns)]
        body += [line([_cell(value) for value in row]) for row in self.rows]
        return "\n".join([*body, *(f"\n{note}" for note in self.notes)])

    def to_csv(self) -> str:
        """RFC 4180 CSV with full precision; None is an empty cell; notes are left out."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return out.getvalue()

    def to_json(self) -> str:
        """JSON list with one object per row."""
        return json.dumps([dict(zip(self.columns, row, strict=True)) for row in self.rows], indent=1)
