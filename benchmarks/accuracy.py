"""Accuracy against sparsity of the pruning methods on a real model: one CSV row per method and sparsity.

    python -m benchmarks.accuracy --path DIR --model module:function --images module:function

DIR is put on the import path. The model function takes nothing and returns a classifier; the images function takes
(split, limit) and returns (images [B, C, H, W], labels [B]). Methods are presets, or budget+score+repair such as
uniform+activation+obs (without a repair: none), each with options behind it or not: /permute (channels change places
inside blocks), /residual (those of the residual stream too), or such as rmt/soft_threshold=1/theta=legacy. Seed 0
calibrates on the first training images, any other on others. With --times FILE (measured if it is not there), rows say
how fast the linears of each plan are by these times, and a case may name several patterns to choose among and the
speed-up to reach, such as unstructured+1x2+4x2=1.4x; with --pack, each row's model is packed and timed whole. With
--shrink, rows are of smaller dense models instead: shares of hidden features and heads that go, such as 0.3 or
0.3+0.17, chosen by calibration ("lstsq") or by norms. Choose on --split train (held-out from calibration), report on
--split val. Every row is written as soon as it is known, and one that the file has is not run again.
"""

import argparse
import base64
import copy
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.record import has_row, stamped, write_rows
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


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "permute": ("permute", lambda _: BLOCKS),
    "residual": ("permute", lambda _: True),
    "alpha_regime": ("alpha_regime", lambda _: True),
    "haar": ("haar", float),
    "soft_threshold": ("soft_threshold", float),
    "theta": ("theta", str),
    "legacy": ("legacy", lambda _: True),
    "spikes": ("spikes", float),
}
"""What may stand behind a method -> field of PruneConfig, and its value from what stands behind "="."""


def config(method: str, goal: float | str, pattern: str) -> PruneConfig:
    """A preset by name, or budget+score, or budget+score+repair, with options behind it.

    Args:
        method: such as "sensitivity", "row+activation+obs/permute" or "seb/haar=0.5".
        goal: a sparsity, or with several patterns a speed-up such as "1.4x".
        pattern: one, or several with + between.
    """
    name, *given = method.split("/")
    fields: dict[str, Any] = {"permute": False, "pattern": pattern if "+" not in pattern else tuple(pattern.split("+"))}
    fields |= {"linear_speedup": float(goal[:-1])} if isinstance(goal, str) else {"sparsity": goal}
    for option in given:
        word, _, value = option.partition("=")
        if word not in OPTIONS:
            raise SystemExit(f"unknown option {word!r} of method {method!r}; expected one of {', '.join(OPTIONS)}")
        field, read = OPTIONS[word]
        fields[field] = read(value)
    if "+" in name:
        budget, score, repair = [*name.split("+"), "none"][:3]
        return PruneConfig(method="magnitude", budget=budget, score=score, repair=repair, **fields)
    return PruneConfig(method=name, **fields)


def calibration_images(train: Tensor, count: int, seed: int, scored: int = 0) -> Tensor:
    """The rows of `train` that calibrate: the first `count` for seed 0, the last for 1, those before them for 2, ...

    Args:
        train: images or labels, [B, ...].
        count: how many, >= 1.
        seed: >= 0.
        scored: rows behind the first `count` that are scored on, and not to be calibrated on.
    """
    if count * (seed + 1) + scored > len(train):
        raise SystemExit(
            f"seed {seed}: {len(train)} training images are too few for {count} of its own; take a lower one"
        )
    end = count if seed == 0 else len(train) - (seed - 1) * count
    return train[end - count : end]


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


def hits_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """`hits` of a model."""
    return hits(logits_of(model, images), labels)


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


def pack_hits(found: Tensor) -> str:
    """Which images were classified right as text, 6 images a character, so that rows can be compared image by image."""
    return base64.b64encode(np.packbits(found.numpy().astype(bool))).decode()


def unpack_hits(text: str, images: int) -> np.ndarray:
    """The inverse of `pack_hits`: float64 [images]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:images].astype(float)


KEYS = ("model", "split", "images", "method", "pattern", "asked", "calibration_images", "calibration_seed")
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


def pruned(
    dense: nn.Module,
    asked: PruneConfig,
    calibration: Any,
    dense_logits: Tensor,
    images: Tensor,
    labels: Tensor,
    times: PatternTimes | None,
    pack: tuple[Tensor, torch.dtype] | None,
) -> dict[str, Any]:
    """Prune a copy and score it; by `times` and `pack` (an example and a dtype) also say how fast it is."""
    model = copy.deepcopy(dense)
    start = time.process_time()
    needs = asked.resolve(calibrated=True).needs_calibration
    plan = prune_(model, asked, calibration=calibration if needs else None, timings=times if asked.mixed else None)
    seconds = time.process_time() - start
    plan.verify(model)
    logits = logits_of(model, images)
    found = hits(logits, labels)
    done = plan.config
    row = {
        "budget": done.budget, "score": done.score, "repair": done.repair, "sparsity": plan.sparsity,
        "sparsity_prunable": plan.prunable.sparsity, "sparsity_all": plan.parameters.sparsity,
        "tried": " ".join(f"{name}={change:.4g}" for name, change in plan.budgets.items()),
        **against(hits(dense_logits, labels), found), **divergence(dense_logits, logits), "hits": pack_hits(found),
        "prune_cpu_s": round(seconds, 2), "linear_speedup": None, "packed_speedup": None, "dtype": None,
    }  # fmt: skip
    if times is not None:
        row |= {"linear_speedup": round(linear_speedup(plan, times), 4), "dtype": times.dtype}
    if pack is not None:
        _, (whole, *_) = packed_copy(model, pack[0], dtype=pack[1])
        row |= {"packed_speedup": round(whole.speedup, 4), "dtype": str(pack[1]).removeprefix("torch.")}
    return row


def score_dense(dense: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """`logits_of` the dense model; its top-1 is printed."""
    logits = logits_of(dense, images)
    print(f"dense: {float(hits(logits, labels).mean()):.4f} on {len(labels)} images", flush=True)
    return logits


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
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="which training images calibrate")
    parser.add_argument("--again", action="store_true", help="replace the rows that the file has")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args()

    sys.path.insert(0, args.path)
    dense = load(args.model)().eval()
    load_images = load(args.images)
    train = load_images("train", args.calibration if args.seeds == [0] else None)
    skip = args.calibration if args.split == "train" else 0  # never evaluate on what was calibrated on
    images, labels = (part[skip:] for part in load_images(args.split, args.limit + skip))
    scored = len(labels) if args.split == "train" else 0

    base = {"model": args.name, "split": args.split, "images": len(labels)}
    if args.shrink:
        dense_hits = hits(score_dense(dense, images, labels), labels)
        calibration = calibration_images(train[0], args.calibration, args.seeds[0], scored)
        for shares in args.shrink:
            for by in args.by:
                row = {**base, "method": by}
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
    example = images[: args.batch]
    times = timed(args.times, dense, example, cases, dtype) if args.times else None
    left = []
    for seed, method, (pattern, goal) in itertools.product(args.seeds, args.methods, cases):
        request = config(method, goal, pattern)
        needs = request.resolve(calibrated=True).needs_calibration
        row = {**base, "method": method, "pattern": pattern, "asked": goal,
               "calibration_images": args.calibration if needs else 0, "calibration_seed": seed}  # fmt: skip
        if needs or not seed:  # without images nothing depends on the seed
            left += [(row, request)] if args.again or not (args.out and has_row(args.out, row, KEYS)) else []
    print(f"{len(left)} rows to compute", flush=True)
    if not left:
        return
    dense_logits = score_dense(dense, images, labels)
    pack = (example, dtype) if args.pack else None
    rows: list[dict[str, Any]] = []
    for row, request in left:
        data: Any = tuple(calibration_images(part, args.calibration, row["calibration_seed"], scored) for part in train)
        data = data if request.resolve(calibrated=True).needs_labels else data[0]
        row |= pruned(dense, request, data, dense_logits, images, labels, times, pack)
        rows.append(row)
        if args.out:
            write_rows(args.out, [stamped(row)], KEYS)
        what, seconds = f"{row['method']:20} {row['pattern']:12} {row['asked']}", row["prune_cpu_s"]
        lost = f"{100 * row['loss']:.1f} +- {100 * row['loss_error']:.1f} points lost, KL {row['kl']:.4f}"
        fast = "" if times is None else f", linears {row['linear_speedup']:.2f}x"
        print(f"{what}  top-1 {row['top1']:.4f}, {lost}{fast}, pruned in {seconds:.1f} s", flush=True)
    shown = [name for name in rows[0] if name not in ("hits", *base)]
    print(Table(shown, [[row[name] for name in shown] for row in rows]).to_text())


if __name__ == "__main__":
    main()
