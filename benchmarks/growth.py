"""The growth level: how time and bytes grow with tokens, sparsity and layer size, and where that stops being flat.

A case is one of the kernel level; this file adds what a row of a series says beside its neighbours.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks import kernel
from benchmarks.cases import KernelCase

__all__ = ["KEYS", "SHOWN", "mark_flat", "measure"]

KEYS = ("sweep", *kernel.KEYS)
SHOWN = ("form", "p50_ms", "ns_per_token", "ps_per_kept_product", "bytes_per_token", "bytes_per_kept", "vs_strongest")
FLAT = 1.25
"""A point is flat while a product takes at most this multiple of the best of its series."""
SERIES = ("sweep", "dtype", "threads", "isa", "clock")
VARIES = {"tokens": ("form", "layer"), "sparsity": ("layer", "T", "layout", "pattern"), "layer": ("form", "T")}
"""What the table varies -> the columns that, with SERIES, are constant in a series."""


def measure(case: KernelCase, rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The kernel rows of a case, with time and bytes per token and per kept weight; `flat` is filled by mark_flat."""
    rows = []
    for row in kernel.measure(case, rounds, say):
        kept = row["N"] * row["K"] * (1 - row["sparsity"])
        item = 4 if case.dtype == "float32" else 2
        rows.append(
            {
                **row,
                "sweep": case.sweep,
                "ns_per_token": 1e6 * row["p50_ms"] / row["T"],
                "ps_per_kept_product": 1e9 * row["p50_ms"] / (row["T"] * kept),
                "bytes_per_token": item * (row["N"] + row["K"]) + row["weight_bytes"] / row["T"],
                "bytes_per_kept": row["weight_bytes"] / kept,
                "flat": None,
            }
        )
    return rows


def mark_flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `flat`: "yes" within FLAT of the best of the series, else the multiple of it, such as "2.1x".

    Args:
        rows: of `measure` or read from the CSV; the whole file, so that a part that was measured again is seen beside
            the rest of its series.
    """
    best: dict[tuple[str, ...], float] = defaultdict(lambda: float("inf"))

    def series(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in (*SERIES, *VARIES[row["sweep"]]))

    for row in rows:
        best[series(row)] = min(best[series(row)], float(row["ps_per_kept_product"]))

    def flat(row: dict[str, Any]) -> str:
        multiple = float(row["ps_per_kept_product"]) / best[series(row)]
        return "yes" if multiple <= FLAT else f"{multiple:.1f}x"

    return [{**row, "flat": flat(row)} for row in rows]
