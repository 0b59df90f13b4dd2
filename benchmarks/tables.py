"""Regenerate the tables of README.md from benchmarks/results/*.csv, so that no number there is typed by hand.

    python -m benchmarks.tables           # rewrite README.md
    python -m benchmarks.tables --check   # exit 1 if README.md differs

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of TABLES.
"""

import argparse
import csv
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from rmtkern.tables import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = "amd-epyc-family-25-model-17"
"""The results that README.md shows."""


def rows(name: str) -> list[dict[str, str]]:
    """All rows of one results file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _ratio(value: str) -> str:
    return f"{float(value):.2f}"


def _where(row: dict[str, str]) -> str:
    clock = row.get("clock") or ("thread CPU" if row["threads"] == "1" else "wall")
    return f"{row['cpu']}, torch {row['torch']}, {clock} time, {row['date']}."


def spectra() -> Table:
    """Time of the spectral fits of ViT-B/16 against what others do."""
    found = rows(f"spectra-{CPU}.csv")
    cells = [
        [row["baseline"], row["eigensolver"], row["baseline_ms"], row["fit_spectra_ms"], row["ratio"] + "x"]
        for row in found
    ]
    notes = [
        f"All 50 matrices, 1 thread, CPU time; edges within {found[0]['max_edge_error']} of float64. {_where(found[0])}"
    ]
    return Table(["baseline", "our eigensolver", "baseline ms", "rmtkern ms", "ratio"], cells, notes)


def kernels() -> Table:
    """The sparse layouts against the strongest dense linear, one thread."""
    found = [row for row in rows(f"kernels-{CPU}.csv") if row["threads"] == "1" and not row["activation"]]
    order = list(dict.fromkeys((row["layer"], row["T"], row["N"], row["K"]) for row in found))
    by_case = {(row["layer"], row["T"], row["form"]): row for row in found}
    cells = []
    layouts = ("bitmask", "block 2x1", "block 4x1", "block 8x1", "nofm")
    for (layer, tokens, n, k), layout in itertools.product(order, layouts):
        chosen = [by_case.get((layer, tokens, f"{layout} {s}")) for s in ("0.5", "0.7", "0.9")]
        pairs = [f"{_ratio(r['vs_onednn'])} / {_ratio(r['vs_strongest'])}" if r else None for r in chosen]
        if any(pairs):
            cells.append([layer, f"{k} -> {n}", tokens, layout.replace("nofm", "nofm 2:4"), *pairs])
    notes = [f"Ratio to oneDNN / to the strongest dense form (prepacked oneDNN included). 1 thread. {_where(found[0])}"]
    return Table(["layer", "shape", "tokens", "layout", "50 %", "70 %", "90 %"], cells, notes)


def models() -> Table:
    """Whole ViT-B/16, packed against dense."""
    found = rows(f"models-{CPU}.csv")
    cells = [
        [
            row["batch"],
            row["threads"],
            f"{float(row['sparsity']):.0%}",
            f"{float(row['mlp_share_packed']):.0%}",
            _ratio(row["vs_original"]),
            _ratio(row["vs_strongest_dense"]),
        ]
        for row in sorted(found, key=lambda r: (int(r["threads"]), -int(r["batch"]), float(r["sparsity"])))
    ]
    columns = ["batch", "threads", "sparsity", "MLP weights packed", "x torch fp32", "x strongest dense"]
    return Table(columns, cells, [f"timm vit_base_patch16_224, random weights, uniform magnitude. {_where(found[0])}"])


def accuracy() -> Table:
    """Top-1 of the presets on a real ViT-S/14 without fine-tuning."""
    found = rows("accuracy-vits14-imagenette.csv")
    levels = sorted({round(float(row["sparsity"]), 2) for row in found})
    methods = list(dict.fromkeys(row["method"] for row in found))
    top1 = {(row["method"], round(float(row["sparsity"]), 2)): f"{100 * float(row['top1']):.1f}" for row in found}
    cells = [[method, *(top1.get((method, level)) for level in levels)] for method in methods]
    first = found[0]
    dense = 100 * float(first["dense_top1"])
    note = (
        f"Top-1 in %, dense {dense:.1f}, {first['images']} validation photographs of Imagenette "
        "(standard error about 1.5), ViT-S/14 (DINOv2). One-shot, no fine-tuning; wanda uses 128 training images."
    )
    return Table(["method", *(f"{level:.0%}" for level in levels)], cells, [note])


TABLES: dict[str, Callable[[], Table]] = {
    "spectra": spectra,
    "kernels": kernels,
    "models": models,
    "accuracy": accuracy,
}


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
