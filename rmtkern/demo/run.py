"""The demo: analyse, prune, pack and time the shipped ViT on the shipped images, and say in words what came out.

It only calls the public functions and reports what they return; every number is measured when it runs.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmtkern.api import analyze, prune_
from rmtkern.demo import load_demo_model, load_test_images
from rmtkern.environment import environment, environment_line
from rmtkern.evaluation import Evaluation, evaluate
from rmtkern.models import prunable_weights
from rmtkern.packing import PackReport, pack_
from rmtkern.packing.timing import interleaved_ms
from rmtkern.pruning.plan import PrunePlan
from rmtkern.spectrum.decompose import singular_values
from rmtkern.spectrum.fit import SpectralFits
from rmtkern.tables import Table

__all__ = ["FULL", "QUICK", "Effort", "run_demo"]

SPARSITIES = (0.5, 0.7)
CURVE = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
METHODS = {"method auto": "auto", "spectral edge budget (seb)": "seb", "uniform magnitude": "uniform"}
SHOWN_LAYER = "blocks.1.mlp.fc1.weight"
EVALUATION_BATCH = 64  # larger batches fall out of the cache: 250 images take 20 % longer each

Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Effort:
    """How much the demo does.

    Args:
        images: test images scored, 1..10,000.
        curve_images: how many of them are behind each point of the accuracy-sparsity curve.
        batches: batch sizes that are packed for and timed, largest first.
        pack_ms: time that pack_ gives each distinct measurement [ms].
        latency_ms: time of each final latency comparison [ms].
    """

    images: int = 10_000
    curve_images: int = 1_000
    batches: tuple[int, ...] = (64, 1)
    pack_ms: float = 150.0
    latency_ms: float = 3_000.0


FULL = Effort()
QUICK = Effort(images=256, curve_images=64, batches=(8, 1), pack_ms=10.0, latency_ms=200.0)


@dataclass(frozen=True)
class _Result:
    """One sparsity, measured."""

    plan: PrunePlan
    report: PackReport
    score: Evaluation
    latency: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.score.to_dict(),
            "packed_share": self.report.packed_share,
            "latency": self.latency,
            "plan": json.loads(self.plan.to_json()),
            "pack_report": json.loads(self.report.to_json()),
        }


def _accuracy_curves(model: nn.Module, x: Tensor, y: Tensor) -> Curves:
    """Top-1 against sparsity of each method, on a subset of the images."""
    dense = evaluate(model, (x, y), batch_size=EVALUATION_BATCH, show_progress=False).top1
    curves: Curves = {}
    for label, method in METHODS.items():
        curves[label] = [(0.0, dense)]
        for sparsity in CURVE[1:]:
            pruned = copy.deepcopy(model)
            prune_(pruned, sparsity, method, show_progress=False)
            score = evaluate(pruned, (x, y), batch_size=EVALUATION_BATCH, show_progress=False)
            curves[label].append((sparsity, score.top1))
    return curves


def _latency(
    pruned: nn.Module, strongest: nn.Module, packed: nn.Module, x: Tensor, effort: Effort
) -> list[dict[str, Any]]:
    """The pruned model as it is, the strongest dense form and the packed model, on each batch size."""
    rows = []
    for batch in effort.batches:
        images = x[:batch]
        with torch.inference_mode():
            expected = pruned(images)
            error = float((packed(images) - expected).abs().max() / expected.abs().max())
            calls = {"torch": pruned, "dense": strongest, "packed": packed}
            ms = interleaved_ms({name: partial(m, images) for name, m in calls.items()}, effort.latency_ms)
        rows.append(
            {
                "batch": batch,
                "torch_ms": ms["torch"],
                "strongest_dense_ms": ms["dense"],
                "packed_ms": ms["packed"],
                "speedup_over_torch": ms["torch"] / ms["packed"],
                "speedup_over_strongest_dense": min(ms["torch"], ms["dense"]) / ms["packed"],
                "relative_difference_of_logits": error,
            }
        )
    return rows


def run_demo(output: Path, say: Callable[[str], None], *, effort: Effort = FULL, seed: int = 0) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        output: folder for rmtkern-demo.png and rmtkern-demo.json; created if missing.
        say: receives each paragraph of the story.
        effort: how much to measure.
        seed: of torch and NumPy.

    Returns:
        Every number that was measured, as in the JSON file.

    Raises:
        ValueError: a number of images outside 1..10,000.
    """
    if not 1 <= effort.images <= FULL.images:
        raise ValueError(f"images: expected 1 to {FULL.images} test images, got {effort.images}")
    torch.manual_seed(seed)
    np.random.seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    model = load_demo_model()
    x, y = load_test_images(effort.images)
    examples = [x[:batch] for batch in effort.batches]
    count = sum(p.numel() for p in model.parameters())
    say(
        f"A Vision Transformer with {count:,} parameters and {len(y):,} real test images (Fashion-MNIST).\n"
        f"{environment_line()}"
    )

    say("1. Analyse: the Marchenko-Pastur law fitted to every weight matrix")
    fits = analyze(model, show_progress=False)
    say(str(fits))
    strongest = copy.deepcopy(model)
    pack_(strongest, examples, layouts=("dense",), budget_ms=effort.pack_ms, show_progress=False)
    dense = evaluate(strongest, (x, y), batch_size=EVALUATION_BATCH)
    say(f"Before pruning: {dense}")

    results: dict[float, _Result] = {}
    for step, sparsity in enumerate(SPARSITIES, start=2):
        pruned = copy.deepcopy(model)
        plan = prune_(pruned, sparsity, show_progress=False)
        config = plan.config
        say(
            f"{step}. Prune to {sparsity:.0%} and pack (method {config.method}: budget {config.budget}, score "
            f"{config.score}; no data, no fine-tuning)"
        )
        packed = copy.deepcopy(pruned)
        report = pack_(packed, examples, budget_ms=effort.pack_ms, show_progress=False)
        say(_pack_table(report))
        score = evaluate(packed, (x, y), batch_size=EVALUATION_BATCH)
        say(f"Pruned to {sparsity:.0%} and packed: {score}")
        latency = _latency(pruned, strongest, packed, x, effort)
        results[sparsity] = _Result(plan, report, score, latency)

    say(f"{len(SPARSITIES) + 2}. Accuracy and latency, before and after")
    say(_summary(dense, results))
    shown = min(effort.curve_images, len(y))
    curves = _accuracy_curves(model, x[:shown], y[:shown])
    say(_curve_table(curves, shown))
    say(_picture(output, model, fits, curves, shown))
    record = {
        "environment": environment(),
        "seed": seed,
        "parameters": count,
        "fits": json.loads(fits.to_json()),
        "dense": dense.to_dict(),
        **{f"sparsity_{sparsity:g}": result.to_dict() for sparsity, result in results.items()},
        "curves": curves,
        "curve_images": shown,
    }
    (output / "rmtkern-demo.json").write_text(json.dumps(record, indent=1) + "\n")
    say(f"All numbers: {output / 'rmtkern-demo.json'}")
    say(_verdict(dense, results))
    return record


def _pack_table(report: PackReport) -> str:
    """The report's table without its last column: the reasons are too long for a terminal (the JSON has them)."""
    table = report.table()
    return Table(table.columns[:-1], [row[:-1] for row in table.rows], table.notes).to_text()


def _summary(dense: Evaluation, results: dict[float, _Result]) -> str:
    columns = ("sparsity", "top-1 %", "change pp", "packed", "batch", "nn.Linear ms", "strongest dense ms", "packed ms",
               "x nn.Linear", "x strongest")  # fmt: skip
    rows: list[list[Any]] = [["0%", round(100 * dense.top1, 2), None, None, None, None, None, None, None, None]]
    for sparsity, result in results.items():
        for row in result.latency:
            rows.append(
                [
                    f"{sparsity:.0%}",
                    round(100 * result.score.top1, 2),
                    round(100 * (result.score.top1 - dense.top1), 2),
                    f"{result.report.packed_share:.0%}",
                    row["batch"],
                    row["torch_ms"],
                    row["strongest_dense_ms"],
                    row["packed_ms"],
                    round(row["speedup_over_torch"], 2),
                    round(row["speedup_over_strongest_dense"], 2),
                ]
            )
    notes = (
        "nn.Linear: the pruned model as PyTorch runs it. Strongest dense, the one to beat: each linear in its fastest",
        "dense float32 form (nn.Linear, oneDNN, oneDNN with a reordered weight, our own). packed: share of the linear",
        f"weights that a sparse kernel runs. Medians of interleaved float32 runs, {torch.get_num_threads()} thread(s).",
    )
    return Table(columns, rows, notes).to_text()


def _curve_table(curves: Curves, images: int) -> str:
    columns = [f"top-1 % on {images:,} images", *(f"{sparsity:.0%}" for sparsity in CURVE)]
    rows = [[label, *(round(100 * top1, 1) for _, top1 in points)] for label, points in curves.items()]
    return Table(columns, rows).to_text()


def _picture(output: Path, model: nn.Module, fits: SpectralFits, curves: Curves, images: int) -> str:
    from rmtkern.plots import demo_figure

    weight = next(weight for weight in prunable_weights(model, "all") if weight.name == SHOWN_LAYER)
    values = singular_values(weight.as_matrix()[None])[0]
    path = output / "rmtkern-demo.png"
    try:
        figure = demo_figure(values, fits[SHOWN_LAYER], SHOWN_LAYER.removesuffix(".weight"), curves, images)
    except ModuleNotFoundError as error:
        return f"No picture: {error}"
    figure.savefig(path, dpi=130)
    return f"Picture: {path}"


def _verdict(dense: Evaluation, results: dict[float, _Result]) -> str:
    """What the numbers say, in words: also when they say no."""
    lines = []
    for sparsity, result in results.items():
        share = result.report.packed_share
        lines.append(
            f"At {sparsity:.0%}: top-1 {100 * (result.score.top1 - dense.top1):+.2f} points; {share:.0%} of the linear "
            f"weights are packed ({'at least' if share >= 0.5 else 'less than'} half)."
        )
        for row in result.latency:
            gain = row["speedup_over_strongest_dense"]
            word = "faster than" if gain > 1.01 else "slower than" if gain < 0.99 else "as fast as"
            lines.append(
                f"  Batch {row['batch']}: {word} the strongest dense form ({gain:.2f}x), "
                f"{row['speedup_over_torch']:.2f}x PyTorch's nn.Linear."
            )
    return "\n".join(lines)
