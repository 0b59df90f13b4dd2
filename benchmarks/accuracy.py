"""Accuracy against sparsity of the pruning methods on a real model: one CSV row per method and sparsity.

    python -m benchmarks.accuracy --path DIR --model module:function --images module:function

DIR is put on the import path. The model function takes nothing and returns a classifier; the images function takes
(split, limit) and returns (images [B, C, H, W], labels [B]). Methods are presets, or budget+score such as
uniform+activation. Choose on --split train (held-out from calibration), report on --split val.
"""

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.record import stamped, write_rows
from rmtkern.api import prune_
from rmtkern.evaluation import evaluate
from rmtkern.pruning.plan import PruneConfig
from rmtkern.tables import Table


def load(name: str) -> Callable[..., Any]:
    """The function "module:function"."""
    module, _, function = name.partition(":")
    if not function:
        raise SystemExit(f"expected module:function, got {name!r}")
    return getattr(importlib.import_module(module), function)


def config(method: str, sparsity: float, pattern: str) -> PruneConfig:
    """A preset by name, or budget+score."""
    if "+" in method:
        budget, score = method.split("+")
        return PruneConfig(sparsity, "magnitude", budget, score, pattern)
    return PruneConfig(sparsity, method, pattern=pattern)


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

    def top1(model: nn.Module) -> float:
        return evaluate(model, (images, labels), batch_size=50, show_progress=False).top1

    dense_top1 = top1(dense)
    print(f"dense: {dense_top1:.4f} on {len(labels)} {args.split} images", flush=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for sparsity in args.sparsities:
            asked = config(method, sparsity, args.pattern)
            model = copy.deepcopy(dense)
            start = time.process_time()
            needs = asked.resolve(calibrated=True).needs_calibration
            plan = prune_(model, asked, calibration=calibration if needs else None)
            seconds = time.process_time() - start
            plan.verify(model)
            accuracy = top1(model)
            done = plan.config
            row = {"model": args.name, "split": args.split, "images": len(labels), "method": method}
            row |= {"budget": done.budget, "score": done.score, "pattern": done.pattern, "sparsity": plan.sparsity}
            row |= {"sparsity_prunable": plan.prunable.sparsity, "sparsity_all": plan.parameters.sparsity}
            row |= {"top1": accuracy, "dense_top1": dense_top1, "calibration_images": plan.calibration_images}
            rows.append({**row, "prune_cpu_s": round(seconds, 2)})
            print(f"{method:24} {sparsity:.2f}  top-1 {accuracy:.4f}  pruned in {seconds:.1f} s", flush=True)
    print(Table(list(rows[0]), [list(row.values()) for row in rows]).to_text())
    if args.out:
        write_rows(args.out, [stamped(row) for row in rows])


if __name__ == "__main__":
    main()
