"""Accuracy against sparsity of the pruning methods on a real model: one CSV row per method and sparsity.

    python -m benchmarks.accuracy --path DIR --model module:function --images module:function

DIR is put on the import path. The model function takes nothing and returns a classifier; the images function takes
(split, limit) and returns (images [B, C, H, W], labels [B]). Methods are presets, or budget+score+repair such as
uniform+activation+obs (without a repair: none). Choose on --split train (held-out from calibration), report on --split
val. Every row is written as soon as it is known; rows of the file for other methods, patterns or sparsities stay.
"""

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import stamped, write_rows
from rmtkern.api import prune_
from rmtkern.pruning.plan import PruneConfig
from rmtkern.tables import Table


def load(name: str) -> Callable[..., Any]:
    """The function "module:function"."""
    module, _, function = name.partition(":")
    if not function:
        raise SystemExit(f"expected module:function, got {name!r}")
    return getattr(importlib.import_module(module), function)


def config(method: str, sparsity: float, pattern: str) -> PruneConfig:
    """A preset by name, or budget+score, or budget+score+repair."""
    if "+" in method:
        budget, score, repair = [*method.split("+"), "none"][:3]
        return PruneConfig(sparsity, "magnitude", budget, score, pattern, repair=repair)
    return PruneConfig(sparsity, method, pattern=pattern)


@torch.inference_mode()
def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images [B] the model classifies right, float64 0 or 1."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(50)]).eq(labels).double()


def against(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """Top-1, its loss against dense, and the standard error of that loss over the images, paired; as fractions."""
    lost = dense - pruned
    error = float(lost.std() / len(lost) ** 0.5) if len(lost) > 1 else 0.0
    return {"top1": float(pruned.mean()), "dense_top1": float(dense.mean()),
            "loss": round(float(lost.mean()), 6), "loss_error": round(error, 6)}  # fmt: skip


KEYS = ("model", "split", "images", "method", "pattern", "asked", "calibration_images")
"""Columns that identify a row."""


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="folder put on the import path")
    parser.add_argument("--model", default="imagenette:load_model", help="module:function")
    parser.add_argument("--images", default="imagenette:load_images", help="module:function")
    parser.add_argument("--name", default="model", help="the model's name in the table")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "uniform", "seb", "rmt", "wanda"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--cases", nargs="+", help="pattern=sparsity, such as 2:4=0.5; instead of the two above")
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--limit", type=int, default=500, help="images to evaluate on")
    parser.add_argument("--calibration", type=int, default=128, help="training images to calibrate on")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args()

    sys.path.insert(0, args.path)
    dense = load(args.model)().eval()
    load_images = load(args.images)
    calibration = load_images("train", args.calibration)[0]
    skip = args.calibration if args.split == "train" else 0  # never evaluate on what was calibrated on
    images, labels = (part[skip:] for part in load_images(args.split, args.limit + skip))

    dense_hits = hits(dense, images, labels)
    print(f"dense: {float(dense_hits.mean()):.4f} on {len(labels)} {args.split} images", flush=True)
    cases = [(args.pattern, sparsity) for sparsity in args.sparsities]
    if args.cases:
        cases = [(pattern, float(sparsity)) for pattern, sparsity in (case.split("=") for case in args.cases)]
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for pattern, sparsity in cases:
            asked = config(method, sparsity, pattern)
            model = copy.deepcopy(dense)
            start = time.process_time()
            needs = asked.resolve(calibrated=True).needs_calibration
            plan = prune_(model, asked, calibration=calibration if needs else None)
            seconds = time.process_time() - start
            plan.verify(model)
            found = against(dense_hits, hits(model, images, labels))
            done = plan.config
            row = {"model": args.name, "split": args.split, "images": len(labels), "method": method}
            row |= {"budget": done.budget, "score": done.score, "repair": done.repair, "pattern": done.pattern}
            row |= {"asked": sparsity, "sparsity": plan.sparsity}
            row |= {"sparsity_prunable": plan.prunable.sparsity, "sparsity_all": plan.parameters.sparsity}
            row |= {**found, "calibration_images": plan.calibration_images, "prune_cpu_s": round(seconds, 2)}
            rows.append(row)
            if args.out:
                write_rows(args.out, [stamped(row)], KEYS)
            lost = (
                f"top-1 {found['top1']:.4f}, {100 * found['loss']:.1f} +- {100 * found['loss_error']:.1f} points lost"
            )
            print(f"{method:20} {pattern:12} {sparsity:.2f}  {lost}, pruned in {seconds:.1f} s", flush=True)
    print(Table(list(rows[0]), [list(row.values()) for row in rows]).to_text())


if __name__ == "__main__":
    main()
