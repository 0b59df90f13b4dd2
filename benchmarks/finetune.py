"""Top-1 of a pruned model before and after fine-tuning, against the dense one: one CSV row per method and pattern.

    python -m benchmarks.finetune --path DIR --model module:function --images module:function --epochs 2

DIR, --model, --images and the names of methods as in benchmarks.accuracy. Every method is trained alike: same images,
epochs, learning rate and seed. Calibration, training and the choice of the epoch use split "train" alone; split "val"
only reports. With --gradual the sparsities are steps: each is pruned and fine-tuned from the one before, as in the
papers' cycles ("hybrid" is "ser" above 20 %, so that it differs only there). A row is written as soon as it is known,
and one that the file has is not run again. Seconds are of the training loop with its held-out scores.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import against, calibration_images, config, hits, hits_of, load, pack_hits, score_dense
from benchmarks.record import has_row, stamped, write_rows
from rmtkern.api import prune_
from rmtkern.pruning.pattern import parse_pattern
from rmtkern.tables import Table
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

KEYS = ("model", "method", "pattern", "asked_sparsity", "steps", "epochs", "lr", "distill", "ema", "train_images",
        "calibration_images", "calibration_seed", "val_images", "seed")  # fmt: skip
"""Columns that identify a row: all that was asked."""


@dataclass(frozen=True)
class Case:
    """One model to prune and fine-tune.

    Args:
        method: as in benchmarks.accuracy.
        pattern: as prune_ takes it.
        sparsities: one after the other; a row for each.
        seed: of the training, and of which images calibrate.
    """

    method: str
    pattern: str
    sparsities: tuple[float, ...]
    seed: int

    def asked(self, step: int) -> dict[str, Any]:
        """What a row says of the request; "steps" are the sparsities that were pruned and trained before it."""
        steps = " ".join(f"{one:g}" for one in self.sparsities[:step])
        return {"method": self.method, "pattern": self.pattern, "asked_sparsity": self.sparsities[step],
                "steps": steps, "seed": self.seed, "calibration_seed": self.seed}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setting:
    """What all rows of a run share.

    Args:
        name: of the model in the table.
        dense: the model; also the teacher, if `how` distils.
        train: images and labels.
        val: the same.
        calibration: how many of the training images calibrate.
        dense_hits: of the dense model on `val`, [B].
        how: the fine-tuning; its seed is the case's.
        score_pruned: whether the models are scored before fine-tuning too.
    """

    name: str
    dense: nn.Module
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    calibration: int
    dense_hits: Tensor
    how: FinetuneConfig
    score_pruned: bool = True

    def asked(self, case: Case, step: int) -> dict[str, Any]:
        """The columns of a row that are known before it is run."""
        asked = config(case.method, case.sparsities[step], case.pattern)
        images = self.calibration if asked.resolve(calibrated=True).needs_calibration else 0
        how = self.how
        return {
            "model": self.name, **case.asked(step), "calibration_images": images,
            "train_images": len(self.train[1]), "val_images": len(self.val[1]),
            "epochs": how.epochs, "lr": how.lr, "batch_size": how.batch_size, "ema": how.ema,
            "distill": how.distill, "autocast": how.autocast,
        }  # fmt: skip

    def rows(self, case: Case) -> Iterator[dict[str, Any]]:
        """Prune, fine-tune and score, step by step."""
        model = copy.deepcopy(self.dense)
        images, labels = (calibration_images(part, self.calibration, case.seed) for part in self.train)
        for step, sparsity in enumerate(case.sparsities):
            request = config(case.method, sparsity, case.pattern)
            resolved = request.resolve(calibrated=True)
            data: Any = (images, labels) if resolved.needs_labels else images
            start = time.process_time()
            plan = prune_(model, request, calibration=data if resolved.needs_calibration else None)
            prune_s = time.process_time() - start
            before = float(hits_of(model, *self.val).mean()) if self.score_pruned else None
            start = time.process_time()
            teacher = self.dense if self.how.distill > 0 else None
            report = finetune_(model, plan, self.train, teacher=teacher, config=replace(self.how, seed=case.seed))
            train_s = time.process_time() - start
            plan.verify(model)
            found = hits_of(model, *self.val)
            print(report, flush=True)
            yield {
                **self.asked(case, step), "budget": plan.config.budget, "score": plan.config.score,
                "sparsity": plan.sparsity, "kept": report.best_epoch,
                "held_out_accuracy": report.epochs[report.best_epoch].held_out_accuracy,
                "pruned_top1": before, **against(self.dense_hits, found), "hits": pack_hits(found),
                "prune_cpu_s": round(prune_s, 1), "train_s": round(report.seconds, 1),
                "train_cpu_s": round(train_s, 1),
            }  # fmt: skip


def cases(
    methods: Sequence[str], patterns: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int], gradual: bool
) -> list[Case]:
    """Every method with every pattern, sparsity and seed; n:m patterns have their own sparsity."""
    made = []
    for pattern in patterns:
        _, params = parse_pattern(pattern)
        own = [1 - params["n"] / params["m"]] if "n" in params else sparsities
        steps = [tuple(sorted(own))] if gradual else [(one,) for one in own]
        made += [Case(method, pattern, step, seed) for step in steps for method in methods for seed in seeds]
    return made


def main() -> None:
    """Prune, fine-tune and score every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="folder put on the import path")
    parser.add_argument("--model", default="imagenette:load_model", help="module:function")
    parser.add_argument("--images", default="imagenette:load_images", help="module:function")
    parser.add_argument("--name", default="model", help="the model's name in the table")
    parser.add_argument("--methods", nargs="+", default=["wanda"], help="presets, or budget+score")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5], help="not for n:m, which have their own")
    parser.add_argument("--gradual", action="store_true", help="one sparsity after the other, each fine-tuned")
    parser.add_argument("--calibration", type=int, default=128, help="training images to calibrate on")
    parser.add_argument("--train-images", type=int, help="at most so many; default: all")
    parser.add_argument("--val-images", type=int, help="at most so many; default: all")
    parser.add_argument("--no-pruned-score", action="store_true", help="score after fine-tuning only")
    parser.add_argument("--epochs", type=int, default=2, help="after each pruning")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--distill", type=float, default=0.5, help="share of the loss that is distillation; 0: none")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training and of the calibration images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="replace the rows that the file has")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    sys.path.insert(0, args.path)
    dense = load(args.model)().eval()
    load_images = load(args.images)
    train, val = load_images("train", args.train_images), load_images("val", args.val_images)
    how = FinetuneConfig(epochs=args.epochs, lr=args.lr, distill=args.distill, ema=args.ema, autocast="bfloat16")
    asked = cases(args.methods, args.patterns, args.sparsities, args.seeds, args.gradual)
    setting = Setting(
        args.name, dense, train, val, args.calibration, torch.zeros(0), how, score_pruned=not args.no_pruned_score
    )

    def known(case: Case) -> bool:
        steps = range(len(case.sparsities))
        return not args.again and all(has_row(args.out, setting.asked(case, step), KEYS) for step in steps)

    left = [case for case in asked if args.out is None or not known(case)]
    print(f"{len(left)} of {len(asked)} cases to run", flush=True)
    rows: list[dict[str, Any]] = []
    if left:
        setting = replace(setting, dense_hits=hits(score_dense(dense, *val), val[1]))
    for case in left:
        for row in setting.rows(case):
            rows.append(row)
            if args.out:
                write_rows(args.out, [stamped(row)], KEYS)
            print(f"{case.method} {case.pattern} {row['asked_sparsity']:g} seed {case.seed}: {row['top1']:.4f}, "
                  f"{100 * row['loss']:.1f} +- {100 * row['loss_error']:.1f} points lost", flush=True)  # fmt: skip
    shown = ["method", "pattern", "sparsity", "seed", "dense_top1", "pruned_top1", "top1", "train_s", "train_cpu_s"]
    print(Table(shown, [[row[name] for name in shown] for row in rows]).to_text())


if __name__ == "__main__":
    main()
