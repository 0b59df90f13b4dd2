"""Rows of cells as text, Markdown, HTML, CSV or JSON: the one place that formats a table.

It knows nothing about what the cells mean.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rmtkern.markup import escape

__all__ = ["Table", "Tabulated", "cell_text"]


def cell_text(value: Any) -> str:
    """A cell as people read it: "-" for None, yes or no for a boolean, four digits of a float."""
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

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers (or None) only."""
        return [
            bool(self.rows) and all(row[i] is None or isinstance(row[i], int | float) for row in self.rows)
            for i in range(len(self.columns))
        ]

    def to_text(self) -> str:
        """Aligned columns for a terminal; numbers to the right, words to the left."""
        cells = [[cell_text(value) for value in row] for row in self.rows]
        widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(self.columns)]

        def line(row: Sequence[str]) -> str:
            parts = (
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, self.numeric, strict=True)
            )
            return "  ".join(parts).rstrip()

        body = [line(self.columns), line(["-" * width for width in widths]), *(line(row) for row in cells)]
        return "\n".join([*body, *self.notes])

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown; notes follow as paragraphs."""

        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"

        body = [line(self.columns), "|" + "---|" * len(self.columns)]
        body += [line([cell_text(value) for value in row]) for row in self.rows]
        return "\n".join([*body, *(f"\n{note}" for note in self.notes)])

    def to_html(self) -> str:
        """A table element with a header for each column and row, and the notes as paragraphs; text is escaped."""

        def line(cells: Sequence[str], head: bool) -> str:
            parts = []
            for index, (text, right) in enumerate(zip(cells, self.numeric, strict=True)):
                tag, scope = ("th", ' scope="col"') if head else ("th", ' scope="row"') if index == 0 else ("td", "")
                side = "right" if right else "left"
                parts.append(f'<{tag}{scope} style="text-align:{side}">{escape(text)}</{tag}>')
            return f"<tr>{''.join(parts)}</tr>"

        body = "\n".join(line([cell_text(value) for value in row], False) for row in self.rows)
        notes = "\n".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table>\n<thead>{line(self.columns, True)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n{notes}"

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


class Tabulated:
    """What shows as its table: as text where it is printed, as HTML in a notebook."""

    __slots__ = ()

    def table(self) -> Table:
        """Its rows."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().to_text()

    def _repr_html_(self) -> str:
        return self.table().to_html()
