"""Regenerate the tables of README.md and docs/benchmarks.md from benchmarks/results/*.csv: no number is typed by hand.

    python -m benchmarks.tables           # rewrite both
    python -m benchmarks.tables --check   # exit 1 if one of them differs

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of TABLES.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

import numpy as np

from benchmarks.accuracy import unpack_hits
from benchmarks.record import RESULTS, ROOT, read_rows
from rmtkern.tables import Table

CPU = "amd-epyc-family-25-model-17"
"""The results that README.md shows."""


def rows(name: str) -> list[dict[str, str]]:
    """All rows of one results file."""
    return read_rows(RESULTS / name)


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


def kernels(layers: Sequence[str] = (), tokens: Sequence[str] = (), threads: str = "1") -> Table:
    """The sparse layouts against the strongest dense linear of the same precision.

    Forms without one of the three sparsities (lowrank, spectral, own dense) are in `other_kernels`.

    Args:
        layers: names; empty for all.
        tokens: counts; empty for all.
        threads: of torch.
    """
    found = [
        row
        for row in rows(f"kernel-{CPU}.csv")
        if row["threads"] == threads
        and not row["activation"]
        and (not layers or row["layer"] in layers)
        and (not tokens or row["T"] in tokens)
    ]
    by_case = {(row["layer"], row["T"], row["dtype"], row["form"]): row for row in found}
    order = list(dict.fromkeys((row["layer"], row["T"], row["dtype"], row["N"], row["K"]) for row in found))
    forms = list(dict.fromkeys(_form(row) for row in found if row["layout"] not in ("dense", "lowrank", "spectral")))
    cells = []
    for (layer, count, dtype, n, k), form in itertools.product(order, forms):
        pruned = [f"{form} {s}" for s in ("0.5", "0.7", "0.9")]
        chosen = [by_case.get((layer, count, dtype, name)) for name in pruned]
        if form in FIXED:
            chosen[0] = by_case.get((layer, count, dtype, form))
        pairs = [f"{_ratio(r['vs_onednn'])} / {_ratio(r['vs_strongest'])}" if r else None for r in chosen]
        if any(pairs):
            cells.append([layer, f"{k} -> {n}", count, dtype, form, *pairs])
    notes = [
        f"Ratio to oneDNN / to the strongest dense form (prepacked oneDNN included). {threads} thread(s)."
        f" {_where(found[0])}"
    ]
    return Table(["layer", "shape", "tokens", "dtype", "layout", "50 %", "70 %", "90 %"], cells, notes)


def other_kernels() -> Table:
    """Our own dense kernel, and the layouts with factors, one thread."""
    found = [
        row
        for row in rows(f"kernel-{CPU}.csv")
        if row["threads"] == "1"
        and not row["activation"]
        and (row["layout"] in ("lowrank", "spectral") or row["form"] == "dense own")
    ]
    cells = [
        [row["layer"], row["T"], row["dtype"], row["form"], _ratio(row["vs_onednn"]), _ratio(row["vs_strongest"])]
        for row in found
    ]
    note = (
        "Ratios to oneDNN and to the strongest dense form of PyTorch. lowrank R: two factors of rank R; spectral R+s:"
        f" the same and a remainder of sparsity s. {_where(found[0])}"
    )
    return Table(["layer", "tokens", "dtype", "form", "x oneDNN", "x strongest dense"], cells, [note])


FIXED = ("nofm 2:4", "nofm 2:4x4")
"""Forms whose pattern says the sparsity, 50 %."""


def _form(row: dict[str, str]) -> str:
    """Layout and pattern: the form without its sparsity."""
    return row["form"] if row["layout"] == "nofm" else row["form"].rpartition(" ")[0]


MODEL_PEERS = {
    "vs_torch_fp32": "torch fp32",
    "vs_torch_bf16": "torch bf16",
    "vs_compile_bf16": "compile bf16",
    "vs_onnxruntime_fp32": "ORT fp32",
    "vs_openvino_fp32": "OpenVINO fp32",
    "vs_openvino_bf16": "OpenVINO bf16",
    "vs_torch_int8": "torch int8",
    "vs_openvino_int8": "OpenVINO int8",
    "vs_dense": "strongest dense",
}
"""Ratio column -> its heading; a column without a value is left out."""


def models(model: str = "", batch: str = "", threads: str = "") -> Table:
    """Whole models, packed against dense peers: how many times faster than each.

    Args:
        model: a timm name; empty for all.
        batch: images; empty for all.
        threads: of every contestant; empty for all.
    """
    found = [
        row
        for row in rows(f"model-{CPU}.csv")
        if row["pattern"]
        and (not model or row["model"] == model)
        and (not batch or row["batch"] == batch)
        and (not threads or row["threads"] == threads)
    ]
    found.sort(
        key=lambda r: (
            r["model"], int(r["threads"]), -int(r["batch"]), r["dtype"] != "float32", r["pattern"] != "dense",
            r["pattern"], float(r["sparsity"]),
        )
    )  # fmt: skip
    ratios = {column: title for column, title in MODEL_PEERS.items() if any(row[column] for row in found)}
    cells = [
        [
            row["model"].removesuffix("_patch16_224"),
            row["batch"],
            row["threads"],
            row["dtype"],
            row["pattern"],
            f"{float(row['sparsity']):.0%}",
            *(_ratio(row[column]) if row[column] else None for column in ratios),
        ]
        for row in found
    ]
    columns = ["model", "batch", "threads", "dtype", "pattern", "sparsity", *(f"x {name}" for name in ratios.values())]
    note = (
        f"timm, random weights, uniform magnitude; x: how many times faster than that dense model. {_where(found[0])}"
    )
    return Table(columns, cells, [note])


def growth(threads: str = "1") -> Table:
    """Time and bytes as tokens, sparsity and layer grow, unstructured; and where that stops being flat."""
    found = [row for row in rows(f"growth-{CPU}.csv") if row["threads"] == threads and row["layout"] == "bitmask"]
    cells = [
        [
            row["sweep"],
            row["layer"],
            row["T"],
            row["dtype"],
            f"{float(row['sparsity']):.0%}",
            f"{float(row['ns_per_token']):.0f}",
            f"{float(row['ps_per_kept_product']):.1f}",
            f"{float(row['bytes_per_token']):.0f}",
            f"{float(row['bytes_per_kept']):.2f}",
            row["flat"],
        ]
        for row in found
    ]
    columns = ["varies", "layer", "tokens", "dtype", "sparsity", "ns / token", "ps / kept weight and token"]
    columns += ["bytes / token", "bytes / kept weight", "flat"]
    note = f"flat: within 25 % of the best of the series, else the multiple of it. Layout bitmask. {_where(found[0])}"
    return Table(columns, cells, [note])


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


def calibrated() -> Table:
    """Points of top-1 that the calibrated methods lose on a real ViT-S/14 without fine-tuning, by pattern."""
    return lost_points("accuracy-vits14-imagenette-calibrated.csv", "One-shot, no fine-tuning.")


def edge_budgets() -> Table:
    """What the Marchenko-Pastur edge adds: budgets with and without it, the same score and repair."""
    note = 'One-shot; each budget with score "admm" and repair "obs", and 512 calibration images.'
    return lost_points("accuracy-vits14-imagenette-edge.csv", note, against="sensitivity")


def cycles() -> Table:
    """Classical RMT with and without its soft threshold and its published thresholds on singular vectors."""
    return lost_points("accuracy-vits14-imagenette-cycles.csv", "One-shot, without data.", against="rmt")


def lost_points(name: str, how: str, against: str = "") -> Table:
    """Points of top-1 lost, method by method and pattern by pattern; of the rows on most validation images.

    Args:
        name: of a file that benchmarks.accuracy wrote.
        how: what the note says of all rows.
        against: method to compare the others with image by image; "": none.
    """
    found = [row for row in rows(name) if row["split"] == "val"]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in sorted(found, key=lambda row: int(row["images"]), reverse=True):
        group = groups.setdefault((row["method"], row["calibration_images"], row["pattern"], row["asked"]), [])
        if not group or group[0]["images"] == row["images"]:
            group.append(row)
    cases = sorted({(row["pattern"] != "unstructured", row["pattern"], row["asked"]) for row in found})
    methods = list(dict.fromkeys((row["method"], row["calibration_images"]) for row in found))
    base = {key[2:]: group for key, group in groups.items() if key[0] == against}
    cells = [
        [*method,
         *(_lost(groups.get((*method, *case[1:]))) for case in cases),
         *(_more_lost(groups.get((*method, *case[1:])), base.get(case[1:])) for case in cases if against)]
        for method in methods
    ]  # fmt: skip
    dense = sorted({f"{100 * float(row['dense_top1']):.1f}" for group in groups.values() for row in group})
    images = sorted({row["images"] for group in groups.values() for row in group}, key=int)
    note = (
        f"Points of top-1 lost against dense ({', '.join(dense)}), paired standard error, {', '.join(images)}"
        f" validation photographs of Imagenette, ViT-S/14 (DINOv2). {how}"
        f"{_about_seeds(groups.values(), 'sets of calibration images')}"
    )
    heads = [f"{pattern} {float(asked):.0%}" for _, pattern, asked in cases]
    more = [f"{head}, more than {against}" for head in heads if against]
    return Table(["method", "calibration images", *heads, *more], cells, [note])


def _lost(group: Sequence[dict[str, str]] | None) -> str | None:
    """Points of top-1 lost in the mean over seeds, the standard error over images, and the range over seeds."""
    if not group:
        return None
    losses = [100 * float(row["loss"]) for row in group]
    errors = [100 * float(row["loss_error"]) for row in group if row["loss_error"]]
    error = f" ± {fmean(errors):.1f}" if errors else ""
    span = f" ({min(losses):.1f} to {max(losses):.1f})" if len(losses) > 1 else ""
    return f"{fmean(losses):.1f}{error}{span}"


def _more_lost(group: Sequence[dict[str, str]] | None, base: Sequence[dict[str, str]] | None) -> str | None:
    """By how many points more than others, with the standard error of that difference image by image."""
    if not group or not base or group is base:
        return None
    means = []
    for rows_ in (base, group):
        images = int(rows_[0].get("images") or rows_[0]["val_images"])
        known = [unpack_hits(row["hits"], images) for row in rows_ if row["hits"]]
        if not known:
            return None
        means.append(np.mean(known, 0))
    more = 100 * (means[0] - means[1])
    return f"{more.mean():+.1f} ± {more.std(ddof=1) / len(more) ** 0.5:.1f}"


def _about_seeds(groups: Iterable[Sequence[dict[str, str]]], what: str) -> str:
    return f" In brackets the range over {what}." if any(len(group) > 1 for group in groups) else ""


def finetuned() -> Table:
    """Top-1 of a pruned ViT-S/14 before and after fine-tuning; seeds of one request together."""
    found = rows("finetune-vits14-imagenette.csv")
    request = ("method", "calibration_images", "pattern", "asked_sparsity", "epochs", "train_images", "val_images")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in found:
        groups.setdefault(tuple(row[key] for key in request), []).append(row)

    def top1(group: Sequence[dict[str, str]], column: str) -> str | None:
        known = [100 * float(row[column]) for row in group if row[column]]
        return f"{fmean(known):.1f}" if known else None

    cells = [
        [method, images, pattern, f"{float(sparsity):.0%}", f"{epochs} x {train}",
         " ".join(sorted(row["seed"] for row in group)), val,
         *(top1(group, column) for column in ("dense_top1", "pruned_top1", "top1")), _lost(group)]
        for (method, images, pattern, sparsity, epochs, train, val), group in groups.items()
    ]  # fmt: skip
    columns = ["method", "calibration images", "pattern", "sparsity", "epochs x images", "seeds", "val images"]
    note = (
        "Top-1 in %, mean over the seeds, and points lost against dense with their paired standard error where it was"
        " kept; ViT-S/14 (DINOv2) on Imagenette: AdamW, distillation from the dense model, bfloat16 autocast, 1 thread;"
        f" at most {max(float(row['train_cpu_s']) for row in found):.0f} s of CPU time."
        f"{_about_seeds(groups.values(), 'seeds')}"
    )
    return Table([*columns, "dense", "pruned", "fine-tuned", "lost"], cells, [note])


def same_protocol() -> Table:
    """The papers' methods and magnitude, pruned and fine-tuned alike: at once, or in steps from a first sparsity on."""
    found = rows("protocol-vits14-imagenette.csv")
    levels = sorted({row["asked_sparsity"] for row in found}, key=float)
    cells = []
    for first in ["", *sorted({row["steps"].split()[0] for row in found if row["steps"]}, key=float)]:
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in found:
            if row["steps"].split()[:1] == ([first] if first else []):
                groups.setdefault((row["method"], row["asked_sparsity"]), []).append(row)
            elif not row["steps"] and row["asked_sparsity"] == first:  # a first step is what at once is too
                groups.setdefault((row["method"], first), []).append(row)
        for method in dict.fromkeys(row["method"] for row in found):
            mine = [groups.get((method, level)) for level in levels]
            if len([group for group in mine if group]) > bool(first):
                base = [groups.get(("magnitude", level)) for level in levels]
                cells.append([method, f"from {float(first):.0%}" if first else "at once", *map(_lost, mine),
                              *map(_more_lost, mine, base)])  # fmt: skip
    heads = [f"{float(level):.0%}" for level in levels]
    one = found[0]
    note = (
        f"Points of top-1 lost against dense ({100 * float(one['dense_top1']):.1f}) after fine-tuning, paired standard"
        f" error, {one['val_images']} validation photographs of Imagenette, ViT-S/14 (DINOv2). Every method alike:"
        f" {one['epochs']} epoch(s) over {one['train_images']} images after each pruning, learning rate {one['lr']},"
        f" distillation {one['distill']}, the same seed; methods with images see"
        f" {max(int(row['calibration_images']) for row in found)} of them before. At once: pruned from dense; from 20 %"
        " and so on: in steps, each fine-tuned."
    )
    return Table(["method", "pruned", *heads, *(f"{head}, more than magnitude" for head in heads)], cells, [note])


def controls() -> Table:
    """Negative controls: the bulk removed, without training."""
    found = rows("controls-vits14-imagenette.csv")
    cells = [
        [row["control"], f"{row['kept_values']} of {row['values']}" if row["values"] else None,
         f"{float(row['stored']):.0%}", f"{100 * float(row['top1']):.1f}", _lost([row])]
        for row in found
    ]  # fmt: skip
    note = (
        f"All attention and MLP weights of ViT-S/14 (DINOv2), no training; top-1 in %, dense"
        f" {100 * float(found[0]['dense_top1']):.1f}, {found[0]['images']} validation photographs of Imagenette, paired"
        " standard error. stored: numbers needed, as two factors where these are fewer."
    )
    return Table(["what is done to every weight", "singular values left", "stored", "top-1", "lost"], cells, [note])


TABLES: dict[str, Callable[[], Table]] = {
    "spectra": spectra,
    "kernels": lambda: kernels(["vit_b.fc1"], ["197", "1576"]),
    "kernels-all": kernels,
    "kernels-2-threads": lambda: kernels(threads="2"),
    "kernels-other": other_kernels,
    "models": lambda: models("vit_base_patch16_224", "8", "1"),
    "models-all": models,
    "growth": growth,
    "growth-2-threads": lambda: growth("2"),
    "accuracy": accuracy,
    "calibrated": calibrated,
    "edge-budgets": edge_budgets,
    "cycles": cycles,
    "finetuned": finetuned,
    "same-protocol": same_protocol,
    "controls": controls,
}


DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


def render(text: str) -> str:
    """The text with every marked table written anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"a document asks for table {name!r}; known: {', '.join(sorted(TABLES))}")
        return f"<!-- table: {name} -->\n{TABLES[name]().to_markdown()}\n<!-- end table -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end table -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    differ = False
    for path in DOCUMENTS:
        old = path.read_text()
        new = render(old)
        differ |= new != old
        if not args.check:
            path.write_text(new)
    return int(args.check and differ)


if __name__ == "__main__":
    sys.exit(main())
