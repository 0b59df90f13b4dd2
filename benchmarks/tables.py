"""Regenerate the tables of README.md and docs/benchmarks.md from benchmarks/results/*.csv: no number is typed by hand.

    python -m benchmarks.tables           # rewrite both
    python -m benchmarks.tables --check   # exit 1 if one of them differs

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a key of TABLES. Where its results file
is missing, a sentence says so.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import accuracy_tables
from benchmarks.record import ROOT, rows
from rmtkern.tables import Table

CPU = "amd-epyc-family-25-model-17"
"""The results that README.md shows."""


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


def mlps() -> Table:
    """fc1, GELU and fc2 in one kernel against the same two kernels one after the other."""
    found = rows(f"mlp-{CPU}.csv")
    cells = [
        [
            row["layer"],
            f"{row['K']} -> {row['hidden']} -> {row['N']}",
            row["T"],
            row["dtype"],
            row["form"],
            _ratio(row["vs_separate"]),
            _ratio(row["vs_torch"]),
        ]
        for row in found
    ]
    note = f"Ratios to the two kernels apart and to PyTorch's dense MLP of the same dtype. {_where(found[0])}"
    columns = ["layer", "shape", "tokens", "dtype", "form", "x apart", "x dense torch"]
    return Table(columns, cells, [note])


def _side_by_side(
    found: Sequence[dict[str, str]], head: Sequence[str], beside: Callable[[dict[str, str]], str], ratios: Sequence[str]
) -> tuple[list[str], list[list[str | None]]]:
    """Columns and cells: a row for each value of the columns `head`, and the ratios of what `beside` tells apart."""
    across = list(dict.fromkeys(map(beside, found)))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found:
        chosen = " / ".join(_ratio(row[ratio]) for ratio in ratios)
        cells.setdefault(tuple(row[column] for column in head), {})[beside(row)] = chosen
    return across, [[*key, *(chosen.get(name) for name in across)] for key, chosen in cells.items()]


def normed_linears() -> Table:
    """LayerNorm and the linear after it in one kernel against the two apart."""
    found = rows(f"normed-{CPU}.csv")
    head = ("layer", "K", "N", "dtype", "form")
    across, cells = _side_by_side(
        found, head, lambda row: f"T={row['T']}, {row['threads']}t", ("vs_separate", "vs_dense")
    )
    note = (
        "Ratio to LayerNorm (PyTorch's or ours, the faster) and then the same kernel / and then the strongest dense"
        f" linear; 1t, 2t: threads, in CPU and wall time. {_where(found[0])}"
    )
    return Table([*head, *across], cells, [note])


def attentions() -> Table:
    """Our attention kernel against the strongest backend of PyTorch's."""
    found = rows(f"attention-{CPU}.csv")
    head = ("heads", "head_dim", "batch", "T", "dtype")
    across, cells = _side_by_side(found, head, lambda row: f"{row['form']}, {row['threads']}t", ("vs_torch",))
    strongest = ", ".join(sorted({row["torch_by"].partition(",")[0] for row in found}))
    note = (
        "Times the strongest of PyTorch's own choice, its flash kernel and its composition of products (the strongest"
        f" here: {strongest}); bias: one for each head; 1t, 2t: threads, in CPU and wall time. {_where(found[0])}"
    )
    return Table([*head, *across], cells, [note])


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


def footprints() -> Table:
    """Peak memory of the calls on whole models, beside the model."""
    from benchmarks.footprint import BOUNDS  # not above: it imports models, and no other table needs them

    found = rows(f"footprint-{CPU}.csv")
    cells = [
        [
            row["model"].removesuffix("_patch16_224"),
            row["call"],
            row["unit"],
            f"{float(row['unit_mib']):.0f}",
            f"{float(row['extra_mib']):.0f}",
            _ratio(row["extra"]),
            f"{BOUNDS[row['call']]:g}",
        ]
        for row in found
    ]
    first = found[0]
    note = (
        "Peak of the resident set beyond what was held before the call. float32, random weights,"
        f" {float(found[-1]['sparsity']):.0%} pruned, 1 thread; pack_ on one image, load into a model on the meta"
        f" device. {first['cpu']}, torch {first['torch']}, {first['date']}."
    )
    return Table(["model", "call", "unit", "unit MiB", "extra MiB", "extra / unit", "promised"], cells, [note])


def long_checks() -> Table:
    """The last full run of the tests, part by part."""
    found = rows("test-all.csv")
    columns = ["part", "timm", "transformers", "passed", "failed", "skipped", "seconds", "cpu_seconds"]
    columns += ["revision", "date"]
    mutated = rows("fuzz.csv")
    total = sum(int(row["mutations"]) for row in mutated)
    bad = sum(int(row[key]) for row in mutated for key in ("wrong", "crashed"))
    noted = [f"{row['notes']}." for row in found if row["notes"]]
    note = (
        f"Fuzz: {total} mutations under AddressSanitizer, {bad} of them wrong or crashed, {mutated[0]['date']}."
        " Seconds are on a machine that did other things as well."
    )
    cells = [[row.get(column) or None for column in columns] for row in found]
    return Table([name.replace("cpu_", "CPU ") for name in columns], cells, [" ".join([note, *noted])])


TABLES: dict[str, Callable[[], Table]] = {
    "spectra": spectra,
    "kernels": lambda: kernels(["vit_b.fc1"], ["197", "1576"]),
    "kernels-all": kernels,
    "kernels-2-threads": lambda: kernels(threads="2"),
    "kernels-other": other_kernels,
    "mlps": mlps,
    "normed": normed_linears,
    "attention": attentions,
    "models": lambda: models("vit_base_patch16_224", "8", "1"),
    "models-all": models,
    "growth": growth,
    "growth-2-threads": lambda: growth("2"),
    **accuracy_tables.TABLES,
    "footprint": footprints,
    "test-all": long_checks,
}


DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


def render(text: str) -> str:
    """The text with every marked table written anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"a document asks for table {name!r}; known: {', '.join(sorted(TABLES))}")
        try:
            table = TABLES[name]().to_markdown()
        except FileNotFoundError as error:
            table = f"Not measured yet: there is no `benchmarks/results/{Path(error.filename).name}`."
        return f"<!-- table: {name} -->\n{table}\n<!-- end table -->"

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
