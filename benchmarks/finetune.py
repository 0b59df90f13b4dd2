"""Top-1 of a pruned model before and after fine-tuning, against the dense one: one CSV row per method and pattern.

    python -m benchmarks.finetune --path DIR --model module:function --images module:function --epochs 2

DIR, --model and --images as in benchmarks.accuracy. Calibration, training and the choice of the epoch use split "train"
alone; split "val" only reports. Seconds are wall time of the training loop with its held-out scores.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import config, load
from benchmarks.record import stamped, write_rows
from rmtkern.api import prune_
from rmtkern.evaluation import evaluate
from rmtkern.pruning.pattern import parse_pattern
from rmtkern.tables import Table
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

KEYS = ("model", "method", "pattern", "asked_sparsity", "epochs", "lr", "distill", "ema", "train_images", "seed")


def main() -> None:
    """Prune, fine-tune and score every method and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="folder put on the import path")
    parser.add_argument("--model", default="imagenette:load_model", help="module:function")
    parser.add_argument("--images", default="imagenette:load_images", help="module:function")
    parser.add_argument("--name", default="model", help="the model's name in the table")
    parser.add_argument("--methods", nargs="+", default=["wanda"], help="presets, or budget+score")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5], help="not for n:m, which have their own")
    parser.add_argument("--calibration", type=int, default=128, help="training images to calibrate on")
    parser.add_argument("--train-images", type=int, help="at most so many; default: all")
    parser.add_argument("--val-images", type=int, help="at most so many; default: all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--distill", type=float, default=0.5, help="share of the loss that is distillation; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV file; equal runs in it are replaced; default: print only")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    sys.path.insert(0, args.path)
    dense = load(args.model)().eval()
    load_images = load(args.images)
    train, val = load_images("train", args.train_images), load_images("val", args.val_images)
    how = FinetuneConfig(
        epochs=args.epochs, lr=args.lr, distill=args.distill, ema=args.ema, seed=args.seed, autocast="bfloat16"
    )

    def score(model: nn.Module) -> float:
        return evaluate(model, val, batch_size=50, show_progress=False).top1

    dense_top1 = score(dense)
    print(f"dense: {dense_top1:.4f} on {len(val[1])} val images", flush=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for pattern in args.patterns:
            _, params = parse_pattern(pattern)
            sparsities = [1 - params["n"] / params["m"]] if "n" in params else args.sparsities
            for sparsity in sparsities:
                asked = config(method, sparsity, pattern)
                model = copy.deepcopy(dense)
                needs = asked.resolve(calibrated=True).needs_calibration
                plan = prune_(model, asked, calibration=train[0][: args.calibration] if needs else None)
                before = score(model)
                print(f"{method} {pattern} {sparsity:g}: {before:.4f} after pruning", flush=True)
                start = time.process_time()
                teacher = dense if args.distill > 0 else None
                report = finetune_(model, plan, train, teacher=teacher, config=how)
                cpu_s = time.process_time() - start
                plan.verify(model)
                after = score(model)
                print(f"{report}\n{method} {pattern} {sparsity:g}: {after:.4f} after fine-tuning", flush=True)
                row = {"model": args.name, "method": method, "budget": plan.config.budget, "score": plan.config.score}
                row |= {"pattern": pattern, "asked_sparsity": sparsity, "sparsity": plan.sparsity}
                row |= {"calibration_images": plan.calibration_images, "train_images": len(train[1])}
                row |= {"epochs": how.epochs, "lr": how.lr, "batch_size": how.batch_size, "ema": how.ema}
                row |= {"distill": how.distill, "autocast": how.autocast, "seed": how.seed, "kept": report.best_epoch}
                row |= {"val_images": len(val[1]), "dense_top1": dense_top1, "pruned_top1": before, "top1": after}
                row |= {"held_out_accuracy": report.epochs[report.best_epoch].held_out_accuracy}
                rows.append({**row, "train_s": round(report.seconds, 1), "train_cpu_s": round(cpu_s, 1)})
                if args.out:
                    write_rows(args.out, [stamped(row) for row in rows], KEYS)
    shown = ["method", "pattern", "sparsity", "dense_top1", "pruned_top1", "top1", "train_s", "train_cpu_s"]
    print(Table(shown, [[row[name] for name in shown] for row in rows]).to_text())


if __name__ == "__main__":
    main()
