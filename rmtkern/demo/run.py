"""The demo: analyse, prune, pack and time the shipped ViT on the shipped images, and say in words what came out.

It only calls the public functions and reports what they return; every number is measured when it runs.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmtkern.api import analyze, prune_
from rmtkern.demo import load_demo_model, load_test_images
from rmtkern.evaluation import evaluate
from rmtkern.models import prunable_weights
from rmtkern.packing import PackReport, pack_
from rmtkern.spectrum.decompose import singular_values
from rmtkern.tables import Table

__all__ = ["run_demo"]

SPARSITIES = (0.5, 0.7)
CURVE = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CURVE_IMAGES = 2_000
BATCHES = (64, 1)
SHOWN_LAYER = "blocks.1.mlp.fc1.weight"


def interleaved_ms(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median wall time [ms] of each call, measured in turns so that a busy machine slows all alike.

    Args:
        calls: what to time; each is called twice before.
        seconds: roughly how long to measure in all; at least five rounds are made.

    Returns:
        One median per call [ms].
    """
    for call in calls:
        call()
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def _accuracy_curves(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[tuple[float, float]]]:
    """Top-1 against sparsity of the default method and of uniform magnitude, on a subset of the images."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for label, method in (("rmtkern default", "auto"), ("uniform magnitude", "uniform")):
        points = []
        for sparsity in CURVE:
            pruned = copy.deepcopy(model)
            if sparsity:
                prune_(pruned, sparsity, method, show_progress=False)
            points.append((sparsity, evaluate(pruned, (x, y), batch_size=250, show_progress=False).top1))
        curves[label] = points
    return curves


def _latency(
    report: PackReport, dense: nn.Module, strongest: nn.Module, packed: nn.Module, x: Tensor
) -> list[dict[str, Any]]:
    """Dense against packed on each batch size, with the outputs compared first."""
    rows = []
    for batch in BATCHES:
        images = x[:batch]
        with torch.inference_mode():
            error = float((packed(images) - dense(images)).abs().max())
            times = interleaved_ms([partial(m, images) for m in (dense, strongest, packed)], seconds=4.0)
        rows.append(
            {
                "batch": batch,
                "torch_ms": times[0],
                "strongest_dense_ms": times[1],
                "packed_ms": times[2],
                "speedup_over_torch": times[0] / times[2],
                "speedup_over_strongest_dense": min(times[:2]) / times[2],
                "max_abs_difference": error,
                "packed_share": report.packed_share,
            }
        )
    return rows


def run_demo(
    output: Path,
    say: Callable[[str], None],
    *,
    images: int | None = None,
    curve_images: int = CURVE_IMAGES,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        output: folder for rmtkern-demo.png and rmtkern-demo.json; created if missing.
        say: receives each paragraph of the story.
        images: how many of the 10,000 test images to score; default all.
        curve_images: how many of them behind each point of the accuracy-sparsity curve.
        seed: of torch and NumPy.

    Returns:
        Every number that was measured, as in the JSON file.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    model = load_demo_model()
    x, y = load_test_images(images)
    count = sum(p.numel() for p in model.parameters())
    say(f"A Vision Transformer with {count:,} parameters and {len(y):,} real images (Fashion-MNIST, never trained on).")

    say("1. Analyse: the Marchenko-Pastur law fitted to every weight matrix")
    fits = analyze(model, show_progress=False)
    say(str(fits))
    strongest = copy.deepcopy(model)
    pack_(strongest, x[: BATCHES[0]], layouts=("dense",), show_progress=False)
    dense = evaluate(strongest, (x, y), batch_size=250)
    say(f"dense: {dense}")

    results: dict[str, Any] = {"dense": dense.to_dict(), "parameters": count, "threads": torch.get_num_threads()}
    rows = []
    for step, sparsity in enumerate(SPARSITIES, start=2):
        pruned = copy.deepcopy(model)
        plan = prune_(pruned, sparsity, show_progress=False)
        packed = copy.deepcopy(pruned)
        report = pack_(packed, [x[:batch] for batch in BATCHES], show_progress=False)
        score = evaluate(packed, (x, y), batch_size=250)
        say(f"{step}. Prune to {sparsity:.0%} (method {plan.config.method}, no data, no fine-tuning) and pack")
        say(str(report))
        say(f"{sparsity:.0%} pruned and packed: {score}")
        latency = _latency(report, pruned, strongest, packed, x)
        results[f"sparsity_{sparsity:g}"] = {
            "accuracy": score.to_dict(),
            "latency": latency,
            "plan": json.loads(plan.to_json()),
            "packed_share": report.packed_share,
        }
        rows += [
            [
                f"{sparsity:.0%}",
                row["batch"],
                round(100 * score.top1, 2),
                round(100 * (score.top1 - dense.top1), 2),
                f"{report.packed_share:.0%}",
                row["torch_ms"],
                row["strongest_dense_ms"],
                row["packed_ms"],
                row["speedup_over_torch"],
                row["speedup_over_strongest_dense"],
            ]
            for row in latency
        ]
    columns = [
        "sparsity",
        "batch",
        "top-1 %",
        "change pp",
        "packed",
        "torch ms",
        "dense ms",
        "packed ms",
        "x torch",
        "x dense",
    ]
    notes = (
        "torch: nn.Linear in float32. dense: every linear in its fastest dense form (nn.Linear or oneDNN), the one",
        f"to beat. Medians of interleaved runs on {results['threads']} thread(s); all three give the same outputs.",
    )
    say(Table(columns, rows, notes).to_text())

    say(f"{len(SPARSITIES) + 2}. Accuracy against sparsity on {min(curve_images, len(y)):,} images")
    curves = _accuracy_curves(model, x[:curve_images], y[:curve_images])
    results["curves"] = curves
    say(
        Table(
            ["method", *(f"{s:.0%}" for s in CURVE)],
            [[k, *(round(100 * t, 2) for _, t in v)] for k, v in curves.items()],
        ).to_text()
    )
    say(_picture(output, model, fits, curves, min(curve_images, len(y))))
    (output / "rmtkern-demo.json").write_text(json.dumps(results, indent=1))
    say(_verdict(results))
    return results


def _picture(
    output: Path, model: nn.Module, fits: Any, curves: dict[str, list[tuple[float, float]]], images: int
) -> str:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return "No picture: matplotlib is not installed (pip install 'rmtkern[report]')."
    from rmtkern.plots import demo_figure

    weight = next(weight for weight in prunable_weights(model, "all") if weight.name == SHOWN_LAYER)
    values = singular_values(weight.as_matrix()[None])[0]
    path = output / "rmtkern-demo.png"
    demo_figure(values, fits[SHOWN_LAYER], SHOWN_LAYER.removesuffix(".weight"), curves, images).savefig(path, dpi=130)
    return f"Picture: {path}"


def _verdict(results: dict[str, Any]) -> str:
    """What the numbers say, in words: also when they say no."""
    lines = []
    for sparsity in SPARSITIES:
        found = results[f"sparsity_{sparsity:g}"]
        row = found["latency"][0]
        change = 100 * (found["accuracy"]["top1"] - results["dense"]["top1"])
        gain = row["speedup_over_strongest_dense"]
        speed = (
            f"{gain:.2f}x as fast as the strongest dense form" if gain > 1 else f"not faster than dense ({gain:.2f}x)"
        )
        lines.append(
            f"At {sparsity:.0%}: {change:+.2f} pp top-1, {found['packed_share']:.0%} of the linear weights packed, "
            f"{speed} at batch {row['batch']} ({row['speedup_over_torch']:.2f}x torch's nn.Linear)."
        )
    return "\n".join(lines)
