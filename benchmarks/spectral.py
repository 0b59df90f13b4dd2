"""Spikes above the Marchenko-Pastur edge as low rank plus a sparse rest, against plain patterns at equal measured time.

    python -m benchmarks.spectral --path DIR --name vits14-imagenette --layers 'blocks.[27].*' --out FILE.csv

Layer by layer, with the inputs that the dense model gives calibration images. Every form is pruned by "admm" and refit
by least squares ("obs"), the rest of a spectral one to what its factors leave; `loss` is tr (V - W) H (V - W)ᵀ over
tr W H Wᵀ. All forms of a layer are timed in one interleaved run. `plain_loss` is what plain patterns lose in the time
of a spectral form: on the line, in log loss, between their best points; empty where none is as fast, 0 where the dense
layer is. Options of the model and the images are those of benchmarks.accuracy.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import load
from benchmarks.record import read_rows, stamped, write_rows
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.factors import factor
from rmtkern.layouts.spectral import SpectralWeight
from rmtkern.models import PrunableWeight, prunable_weights
from rmtkern.ops import linear
from rmtkern.packing.timing import Timer, interleaved_ms
from rmtkern.pattern_timing import wanted_shares
from rmtkern.pruning.admm import admm_mask
from rmtkern.pruning.calibrate import evaluating, forward_passes, second_moments
from rmtkern.pruning.pattern import parse_pattern, unit_of
from rmtkern.pruning.repair import REPAIRS, damped
from rmtkern.pruning.stages import Call, Stage, find_stages
from rmtkern.pruning.visit import visit_stages
from rmtkern.spectrum.fit import fit_spectrum
from rmtkern.tables import Table

KEYS = ("model", "layer", "form", "rank", "sparsity", "dtype", "tokens", "threads")
"""Columns that identify a row."""


def moments_of(model: nn.Module, weights: Sequence[PrunableWeight], images: Tensor) -> dict[str, Tensor]:
    """E x xᵀ of the inputs of each weight in the model as it is, [K, K]; of several, the mean."""
    found: dict[str, Tensor] = {}

    def visit(stage: Stage, calls: list[Call]) -> list[Any]:
        moments, outputs = second_moments(stage, calls)
        found.update({name: one.mean(0) for name, one in moments.items()})
        return outputs

    with torch.no_grad(), evaluating(model):
        visit_stages(find_stages(model, weights), (run for run, _ in forward_passes(model, images)), visit)
    return found


def pruned(matrix: Tensor, moment: Tensor, pattern: str, sparsity: float) -> Tensor:
    """The matrix [N, K] with a share of zeros in a pattern, by admm and least squares."""
    kind, params = parse_pattern(pattern)
    r, c = unit_of(params)
    count = torch.tensor([round(sparsity * matrix.numel() / (r * c))])
    mask = admm_mask(matrix, moment, torch.zeros_like(matrix, dtype=torch.bool), count, kind, params)
    return REPAIRS["obs"](matrix, mask, moment).to(matrix.dtype)


def relative_loss(matrix: Tensor, other: Tensor, moment: Tensor) -> float:
    """tr((V - W) H (V - W)ᵀ) / tr(W H Wᵀ), in float64."""
    w, v, h = matrix.double(), other.double(), moment.double()
    return float((((v - w) @ h) * (v - w)).sum() / ((w @ h) * w).sum())


def equal_time(points: Iterable[tuple[float, float]], dense_ms: float, ms: float) -> float | None:
    """The least loss of plain forms (ms, loss) in that time; see the head of this file."""
    if ms >= dense_ms:
        return 0.0
    best: list[tuple[float, float]] = []
    for taken, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((taken, loss))
    if not best or ms < best[0][0]:
        return None
    return float(np.exp(np.interp(ms, [taken for taken, _ in best], np.log([loss for _, loss in best]))))


def ranks_of(matrix: Tensor, shares: Sequence[float]) -> tuple[int, list[int]]:
    """How many spikes a matrix has, and the ranks that shares of them are, at least 1."""
    spikes = fit_spectrum(matrix).n_spikes or 0
    return spikes, sorted({max(1, round(share * spikes)) for share in shares})


def known_rows(path: Path | None, head: Mapping[str, Any], wanted: Sequence[tuple[str, int, float]]) -> list[Any]:
    """The rows that a file has of a layer, if it has all (form, rank, sparsity) that are wanted, else none."""
    if path is None or not path.exists():
        return []
    named = {key: str(value) for key, value in {**head, "threads": torch.get_num_threads()}.items()}
    rows = [row for row in read_rows(path) if all(row[key] == value for key, value in named.items())]
    found = {(row["form"], row["rank"], row["sparsity"]) for row in rows}
    return rows if found.issuperset(tuple(map(str, one)) for one in wanted) else []


def compare(
    matrix: Tensor,
    bias: Tensor | None,
    moment: Tensor,
    tokens: int,
    patterns: Sequence[str],
    sparsities: Sequence[float],
    shares: Sequence[float],
    dtype: torch.dtype,
    budget_ms: float,
    time_calls: Timer,
) -> list[dict[str, Any]]:
    """The rows of one layer.

    Args:
        matrix: [N, K] float32.
        bias: [N] or None.
        moment: [K, K], undamped.
        tokens: T of the timed input.
        patterns: plain ones.
        sparsities: of plain forms and of what the factors leave.
        shares: of the spikes above the edge that become factors, (0, 1]; at least one of them does.
        dtype: of the kernels.
        budget_ms: time spent.
        time_calls: as packing.timing.interleaved_ms.
    """
    solid = damped(moment)
    facts: dict[str, dict[str, Any]] = {}
    forms: dict[str, list[PackedWeight]] = {}
    for pattern, sparsity in wanted_shares(patterns, sparsities):
        value, name = pruned(matrix, solid, pattern, sparsity), f"{pattern} {sparsity}"
        loss = relative_loss(matrix, value, moment)
        facts[name] = {"form": pattern, "rank": 0, "sparsity": sparsity, "loss": loss}
        forms[name] = list(_packed(value.to(dtype)))
    spikes, ranks = ranks_of(matrix, shares)
    for rank in ranks:
        b, a = (part.float() for part in factor(matrix, rank))
        for sparsity in sparsities:
            rest, name = pruned(matrix - b @ a, solid, "unstructured", sparsity), f"spectral {rank} {sparsity}"
            loss = relative_loss(matrix, b @ a + rest, moment)
            facts[name] = {"form": "spectral", "rank": rank, "sparsity": sparsity, "loss": loss}
            forms[name] = [SpectralWeight.from_parts(b.to(dtype), a.to(dtype), rest.to(dtype))]
    dense = matrix.to(dtype)
    forms["dense"] = [LAYOUTS["dense"].pack(dense, tokens=tokens, **one) for one in LAYOUTS["dense"].variants(dense)]
    x = torch.randn(tokens, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    offset = None if bias is None else bias.to(dtype)
    calls = {
        f"{name}|{index}": lambda form=form: linear(x, form, offset)
        for name, some in forms.items()
        for index, form in enumerate(some)
    }
    with torch.no_grad():
        times: Mapping[str, float] = time_calls(calls, budget_ms)
    ms = {name: min(times[f"{name}|{index}"] for index in range(len(some))) for name, some in forms.items() if some}
    rows = [{**fact, "ms": ms[name], "dense_ms": ms["dense"], "spikes": spikes} for name, fact in facts.items()
            if name in ms]  # fmt: skip
    plain = [(row["ms"], row["loss"]) for row in rows if row["form"] != "spectral"]
    for row in rows:
        row["plain_loss"] = equal_time(plain, ms["dense"], row["ms"]) if row["form"] == "spectral" else None
    return rows


def _packed(weight: Tensor) -> Iterable[PackedWeight]:
    """The sparse forms of a weight that are smaller than it."""
    for layout in LAYOUTS:
        for params in LAYOUTS[layout].variants(weight) if layout not in ("dense", "lowrank") else ():
            form = LAYOUTS[layout].pack(weight, **params)
            if form.nbytes < weight.nbytes:
                yield form


def main(timer: Timer = interleaved_ms) -> None:
    """Measure the layers asked for, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="folder put on the import path")
    parser.add_argument("--model", default="imagenette:load_model", help="module:function")
    parser.add_argument("--images", default="imagenette:load_images", help="module:function")
    parser.add_argument("--name", default="model", help="the model's name in the table")
    parser.add_argument("--layers", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "1x2", "4x2"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--spikes", nargs="+", type=float, default=[0.25, 1.0], help="shares of them that are factors")
    parser.add_argument("--calibration", type=int, default=128, help="training images to calibrate on")
    parser.add_argument("--tokens", type=int, default=8 * 65, help="of the timed input")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--budget-ms", type=float, default=3000.0, help="time spent on each layer's timing")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args()

    sys.path.insert(0, args.path)
    model = load(args.model)().eval()
    weights = prunable_weights(model, args.layers)
    plain = [(pattern, 0, sparsity) for pattern, sparsity in wanted_shares(args.patterns, args.sparsities)]
    heads, known = {}, {}
    for weight in weights:
        head = {"model": args.name, "layer": weight.name, "dtype": args.dtype, "tokens": args.tokens}
        heads[weight.name] = {**head, "calibration_images": args.calibration}
        ranks = ranks_of(weight.as_matrix(), args.spikes)[1]
        wanted = [*plain, *(("spectral", rank, sparsity) for rank in ranks for sparsity in args.sparsities)]
        known[weight.name] = known_rows(args.out, heads[weight.name], wanted)
    left = [weight for weight in weights if not known[weight.name]]
    moments = moments_of(model, left, load(args.images)("train", args.calibration)[0]) if left else {}
    biases = dict(model.named_parameters())
    every: list[Mapping[str, Any]] = []
    for weight in weights:
        rows: Sequence[Mapping[str, Any]] = known[weight.name]
        if not rows:
            bias = biases.get(weight.name.removesuffix("weight") + "bias")
            made = compare(
                weight.as_matrix(), None if bias is None else bias.detach(), moments[weight.name], args.tokens,
                args.patterns, args.sparsities, args.spikes, getattr(torch, args.dtype), args.budget_ms, timer,
            )  # fmt: skip
            rows = [stamped({**heads[weight.name], **row}) for row in made]
            if args.out:
                write_rows(args.out, rows, KEYS)
        columns = ("layer", "form", "rank", "sparsity", "ms", "dense_ms", "loss", "plain_loss")
        print(Table(columns, [tuple(row[name] for name in columns) for row in rows]).to_text(), flush=True)
        every += rows
    both = [(float(row["loss"]), float(row["plain_loss"])) for row in every if row["plain_loss"] not in (None, "")]
    both = [(loss, plain) for loss, plain in both if plain > 0]
    if both:
        wins = sum(loss < plain for loss, plain in both)
        ratio = np.exp(np.mean([np.log(loss / plain) for loss, plain in both]))
        print(f"spectral loses less in {wins} of {len(both)} points as fast as a plain one; its loss over theirs, "
              f"geometric mean: {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
