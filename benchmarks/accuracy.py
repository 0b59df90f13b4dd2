"""Accuracy against sparsity of the pruning methods on a real model: one CSV row per method and sparsity.

    python -m benchmarks.accuracy --path DIR --model module:function --images module:function

DIR is put on the import path. The model function takes nothing and returns a classifier; the images function takes
(split, limit) and returns (images [B, C, H, W], labels [B]). Methods are presets, or budget+score+repair such as
uniform+activation+obs (without a repair: none), each with /permute behind it (channels inside blocks), /residual (those
of the residual stream too) or neither. With --times FILE (measured if it is not there), rows say how fast the linears
of each plan are by these times, and a case may name several patterns to choose among and the speed-up to reach, such as
unstructured+1x2+4x2=1.4x; with --pack, each row's model is packed and timed whole. With --shrink, rows are of smaller
dense models instead: shares of hidden features and heads that go, such as 0.3 or 0.3+0.17, chosen by calibration
("lstsq") or by norms. Choose on --split train (held-out from calibration), report on --split val. Every row is written
as soon as it is known; rows of the file for other methods, patterns or sparsities stay.
"""

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import stamped, write_rows
from rmtkern.api import prune_
from rmtkern.packing.dtype import DTYPES
from rmtkern.pattern_timing import time_patterns
from rmtkern.pruning.plan import BLOCKS, PruneConfig, PrunePlan
from rmtkern.pruning.times import PatternTimes
from rmtkern.shrinking import shrink_
from rmtkern.speed import packed_copy
from rmtkern.tables import Table


def load(name: str) -> Callable[..., Any]:
    """The function "module:function"."""
    module, _, function = name.partition(":")
    if not function:
        raise SystemExit(f"expected module:function, got {name!r}")
    return getattr(importlib.import_module(module), function)


def config(method: str, goal: float | str, pattern: str) -> PruneConfig:
    """A preset by name, or budget+score, or budget+score+repair, with what may change places behind it.

    Args:
        method: such as "sensitivity" or "row+activation+obs/permute".
        goal: a sparsity, or with several patterns a speed-up such as "1.4x".
        pattern: one, or several with + between.
    """
    name, _, moves = method.partition("/")
    options: dict[str, Any] = {"permute": {"": False, "permute": BLOCKS, "residual": True}[moves]}
    options["pattern"] = pattern if "+" not in pattern else tuple(pattern.split("+"))
    options |= {"linear_speedup": float(goal[:-1])} if isinstance(goal, str) else {"sparsity": goal}
    if "+" in name:
        budget, score, repair = [*name.split("+"), "none"][:3]
        return PruneConfig(method="magnitude", budget=budget, score=score, repair=repair, **options)
    return PruneConfig(method=name, **options)


def linear_speedup(plan: PrunePlan, times: PatternTimes) -> float:
    """The pruned linears of a plan against dense ones, by measured times; what is not faster runs dense.

    Sparsities above the highest measured one take its time, those below the lowest the dense one.
    """
    dense_ms = ms = 0.0
    for layer in plan.layers:
        known = times.of(layer.name)
        if known is None:
            raise SystemExit(f"--times: no times of {layer.name}")
        highest = max(known.ms.get(layer.pattern, {}), default=0.0)
        taken = known.at(layer.pattern, min(layer.sparsity, highest))
        dense_ms, ms = dense_ms + known.dense_ms, ms + min(known.dense_ms, taken or known.dense_ms)
    return dense_ms / ms


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """[B, C]."""
    model.eval()
    return torch.cat([model(part) for part in images.split(50)])


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images [B] are classified right, float64 0 or 1."""
    return logits.argmax(1).eq(labels).double()


def divergence(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """Mean of KL(dense || pruned) over the images and its standard error [nat], from logits [B, C]."""
    p, q = dense.double().log_softmax(1), pruned.double().log_softmax(1)
    each = (p.exp() * (p - q)).sum(1)
    error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0
    return {"kl": round(float(each.mean()), 6), "kl_error": round(error, 6)}


def against(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """Top-1, its loss against dense, and the standard error of that loss over the images, paired; as fractions."""
    lost = dense - pruned
    error = float(lost.std() / len(lost) ** 0.5) if len(lost) > 1 else 0.0
    return {"top1": float(pruned.mean()), "dense_top1": float(dense.mean()),
            "loss": round(float(lost.mean()), 6), "loss_error": round(error, 6)}  # fmt: skip


KEYS = ("model", "split", "images", "method", "pattern", "asked", "calibration_images")
"""Columns that identify a row."""


SHRINK_KEYS = ("model", "split", "images", "method", "mlp", "heads", "calibration_images")
"""The same, of smaller models."""


def smaller(
    dense: nn.Module, shares: str, calibration: Tensor | None, dense_hits: Tensor, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Shrink a copy by "mlp" or "mlp+heads" shares and score it."""
    mlp, heads = [*map(float, shares.split("+")), 0.0][:2]
    model = copy.deepcopy(dense)
    start = time.process_time()
    plan = shrink_(model, mlp, heads, calibration)
    seconds = time.process_time() - start
    before, after = plan.parameters
    row = {"mlp": mlp, "heads": heads, "parameters": before, "parameters_left": after}
    row |= against(dense_hits, hits(logits_of(model, images), labels))
    return {**row, "calibration_images": plan.calibration_images, "shrink_cpu_s": round(seconds, 2)}


def timed(
    path: Path, model: nn.Module, example: Tensor, cases: Sequence[tuple[str, float | str]], dtype: torch.dtype
) -> PatternTimes:
    """The times in a file; measured and written if it is not there, of all patterns of the cases."""
    if path.exists():
        return PatternTimes.load(path)
    patterns = list(dict.fromkeys(name for pattern, _ in cases for name in pattern.split("+")))
    found = time_patterns(model, example, patterns, dtype=dtype)
    found.save(path)
    print(found, flush=True)
    return found


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
    parser.add_argument("--times", type=Path, help="JSON of measured times of patterns; written if it is not there")
    parser.add_argument("--pack", action="store_true", help="also pack each model and time it against the best dense")
    parser.add_argument("--batch", type=int, default=8, help="images of --times and --pack")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of --times and --pack")
    parser.add_argument("--shrink", nargs="+", help="mlp or mlp+heads shares to remove; no methods and cases then")
    parser.add_argument("--by", nargs="+", default=["lstsq", "norms"], choices=("lstsq", "norms"), help="with --shrink")
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

    dense_logits = logits_of(dense, images)
    dense_hits = hits(dense_logits, labels)
    print(f"dense: {float(dense_hits.mean()):.4f} on {len(labels)} {args.split} images", flush=True)
    if args.shrink:
        for shares in args.shrink:
            for by in args.by:
                row = {"model": args.name, "split": args.split, "images": len(labels), "method": by}
                row |= smaller(dense, shares, calibration if by == "lstsq" else None, dense_hits, images, labels)
                if args.out:
                    write_rows(args.out, [stamped(row)], SHRINK_KEYS)
                print(Table(list(row), [list(row.values())]).to_text(), flush=True)
        return
    cases: list[tuple[str, float | str]] = [(args.pattern, sparsity) for sparsity in args.sparsities]
    if args.cases:
        named = [case.split("=") for case in args.cases]
        cases = [(pattern, goal if goal.endswith("x") else float(goal)) for pattern, goal in named]
    dtype = DTYPES[0] if args.dtype == "float32" else DTYPES[1]
    times = timed(args.times, dense, images[: args.batch], cases, dtype) if args.times else None
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for pattern, goal in cases:
            asked = config(method, goal, pattern)
            model = copy.deepcopy(dense)
            start = time.process_time()
            needs = asked.resolve(calibrated=True).needs_calibration
            given = times if asked.mixed else None
            plan = prune_(model, asked, calibration=calibration if needs else None, timings=given)
            seconds = time.process_time() - start
            plan.verify(model)
            logits = logits_of(model, images)
            found = against(dense_hits, hits(logits, labels))
            done = plan.config
            row = {"model": args.name, "split": args.split, "images": len(labels), "method": method}
            row |= {"budget": done.budget, "score": done.score, "repair": done.repair, "pattern": pattern}
            row |= {"asked": goal, "sparsity": plan.sparsity}
            row |= {"sparsity_prunable": plan.prunable.sparsity, "sparsity_all": plan.parameters.sparsity}
            row |= {**found, **divergence(dense_logits, logits), "calibration_images": plan.calibration_images}
            row |= {"prune_cpu_s": round(seconds, 2), "linear_speedup": None, "packed_speedup": None, "dtype": None}
            if times is not None:
                row |= {"linear_speedup": round(linear_speedup(plan, times), 4), "dtype": times.dtype}
            if args.pack:
                _, (whole, *_) = packed_copy(model, images[: args.batch], dtype=dtype)
                row |= {"packed_speedup": round(whole.speedup, 4), "dtype": args.dtype}
            rows.append(row)
            if args.out:
                write_rows(args.out, [stamped(row)], KEYS)
            lost = (
                f"top-1 {found['top1']:.4f}, {100 * found['loss']:.1f} +- {100 * found['loss_error']:.1f} points lost"
            )
            fast = "" if times is None else f", linears {row['linear_speedup']:.2f}x"
            print(f"{method:20} {pattern:12} {goal}  {lost}, KL {row['kl']:.4f} +- {row['kl_error']:.4f}{fast}, "
                  f"pruned in {seconds:.1f} s", flush=True)  # fmt: skip
    print(Table(list(rows[0]), [list(row.values()) for row in rows]).to_text())


if __name__ == "__main__":
    main()
