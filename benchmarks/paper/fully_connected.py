"""C3, C5: fully connected networks on Fashion-MNIST, trained with and without Marchenko-Pastur pruning.

    python -m benchmarks.paper.fully_connected --data /usr/share/datasets/fashion-mnist [--network He] [--compress]

One row per training in the CSV; the claim is none < (regularised, MP alone) < MP + regularised, tested over images and
seeds (ordering.py). The paper's rows are of width 3000, 100 epochs and 60,000 images, from an initialisation that it
does not name. Its penalties of 1e-6 are made stronger here by as much as the training is shorter (--strength). Network
"He, ReLU at the end" is one in which classes die: those whose output is never above zero get no gradient.

Noise is added to the weights of each network (C5). With --compress each is also made as small as it gets without a loss
that the last training images, which are held out for that, would show (compression.py); these rows go into a second
file. A row is written as soon as it is known, and one that the file has is not run again.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import hits, logits_of, pack_hits, unpack_hits
from benchmarks.paper.compression import RECIPES, TUNING, compressed, tuned
from benchmarks.paper.ordering import Difference, compare, decide
from benchmarks.record import find_row, stamped, write_rows
from rmtkern.demo.train import accuracy, read_idx
from rmtkern.models import prunable_weights
from rmtkern.tables import Table
from rmtkern.training.loop import finetune_

NETWORKS = ("default", "He", "He, ReLU at the end")
"""PyTorch's initialisation; He's; and that with a ReLU behind the last layer too."""
TRAININGS = {"none": (False, 0, 0), "MP": (True, 0, 0), "L1 + L2": (False, 1, 1), "MP + L1 + L2": (True, 1, 1),
             "MP + L2": (True, 0, 1)}  # fmt: skip
"""Name -> MP pruning; strengths of L1 and L2 in units of --strength."""
PUBLISHED = {"none": (78.03, 71.64), "MP": (88.12, 81.22), "L1 + L2": (87.57, 81.70), "MP + L1 + L2": (99.82, 90.53),
             "MP + L2": (99.98, 90.16)}  # fmt: skip
"""Name -> train and test top-1 [%] at width 3000 after 100 epochs."""
FALL = 0.96**25
"""The learning rate at the end of the paper's training over that at its start."""
NOISE = (0.002, 0.005, 0.01)
"""Standard deviations of the noise that C5 adds to every weight but the last layer's."""
ORDER = [("none", "MP"), ("none", "L1 + L2"), ("MP", "MP + L1 + L2"), ("L1 + L2", "MP + L1 + L2")]
KEYS = ("network", "training", "width", "epochs", "train_images", "batch", "seed", "strength", "cut_every", "cut_gate")
COMPRESSED_KEYS = (*KEYS, "recipe", "held_out", "max_drop", "tuning_lr")

Data = dict[str, tuple[Tensor, Tensor]]
"""Images [B, 784] in [0, 1] and labels [B] of "train", "held out" and "test"."""


def network(width: int, kind: str, seed: int) -> nn.Sequential:
    """One of NETWORKS: [784, w, w, w, w, w / 6, 10] with ReLU, as the paper's 3000 and 500."""
    torch.manual_seed(seed)
    sizes = [784, width, width, width, width, max(10, width // 6), 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        if kind != "default":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*(layers if kind == "He, ReLU at the end" else layers[:-1]))


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [B, 784] in [0, 1] and labels [B] of "train" or "t10k"."""
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, 784).astype(np.float32))
    return images / 255, torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64))


def read_parts(folder: Path, images: int | None, held_out: int) -> Data:
    """The parts: the last training images are held out, and training sees the first `images` of the others."""
    x, y = read(folder, "train")
    return {"train": (x[:-held_out][:images], y[:-held_out][:images]), "held out": (x[-held_out:], y[-held_out:]),
            "test": read(folder, "t10k")}  # fmt: skip


@torch.no_grad()
def with_noise(model: nn.Module, test: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """C5: test top-1 [%] at each of NOISE, and by how much the squared weights grow, over (weights x deviation^2)."""
    found: dict[str, float] = {}
    weights = prunable_weights(model, "all")[:-1]
    before = [weight.parameter.clone() for weight in weights]
    for deviation in NOISE:
        generator = torch.Generator().manual_seed(seed + 1_000_003)  # other numbers than the initial weights
        grown = count = 0.0
        for weight, value in zip(weights, before, strict=True):
            weight.parameter.copy_(value + deviation * torch.randn(value.shape, generator=generator))
            grown += float((weight.parameter.double().square() - value.double().square()).sum())
            count += value.numel()
        found[f"noise_{deviation:g}_test_top1"] = round(100 * accuracy(model, *test), 2)
    for weight, value in zip(weights, before, strict=True):
        weight.parameter.copy_(value)
    return {**found, "noise_growth": round(grown / (count * deviation**2), 4)}


def train(asked: dict[str, Any], data: Data) -> tuple[nn.Sequential, dict[str, Any]]:
    """A trained network and its row, which is of its last state; nothing is chosen by the test images.

    Args:
        asked: KEYS and their values.
        data: all parts.
    """
    pruned, l1, l2 = TRAININGS[asked["training"]]
    model = network(asked["width"], asked["network"], asked["seed"])
    epochs, strength = asked["epochs"], asked["strength"]
    options: dict[str, Any] = {"weight_decay": 2 * l2 * (strength or 0)}  # decay of SGD is L2 at half its factor
    if l1:
        options |= {"regulariser": "l1", "strength": strength}
    if pruned:
        options |= {"cut_every": asked["cut_every"], "cut_until": 2 * epochs, "cut_gate": asked["cut_gate"]}
    start = time.process_time()
    report = finetune_(
        model, None, data["train"], epochs=epochs, optimizer="sgd", momentum=0.9, lr=0.01, warmup=0.0, floor=FALL,
        clip=None, batch_size=asked["batch"], label_smoothing=0.0, holdout=0.0, seed=asked["seed"], show_progress=False,
        autocast=TUNING.autocast, **options,
    )  # fmt: skip
    seconds = time.process_time() - start
    model.eval()
    images, labels = data["test"]
    logits = logits_of(model, images)
    found = hits(logits, labels)
    published = PUBLISHED[asked["training"]]
    return model, {
        **asked, "train_top1": round(100 * accuracy(model, *data["train"]), 2),
        "test_top1": round(100 * float(found.mean()), 2), "test_images": len(labels),
        "classes": len(logits.argmax(1).unique()), "loss": report.epochs[-1].loss, "stopped": report.stopped or "",
        "cut_values": sum(row.cut or 0 for row in report.epochs),
        "weights": sum(weight.parameter.numel() for weight in prunable_weights(model, "all")),
        "train_cpu_s": round(seconds, 1), **with_noise(model, data["test"], asked["seed"]),
        "published_train_top1": published[0], "published_test_top1": published[1], "hits": pack_hits(found),
    }  # fmt: skip


def scaled_strength(epochs: int, images: int) -> float:
    """What makes L1 and L2 pull on a weight as much as 1e-6 in 100 epochs of 60,000 images does."""
    return float(f"{1e-6 * 100 * 60_000 / (epochs * images):.3g}")


def differences(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Difference]:
    """Of each claim of ORDER for which there are rows, over the seeds that both trainings have."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for row in rows:
        seen = unpack_hits(row["hits"], int(row["test_images"]))
        found.setdefault(row["training"], {})[int(row["seed"])] = seen
    differences_ = {}
    for claim in ORDER:
        first, second = (found.get(name, {}) for name in claim)
        if seeds := sorted(first.keys() & second.keys()):
            differences_[claim] = compare(*(np.stack([one[seed] for seed in seeds]) for one in (first, second)))
    return differences_


def main(argv: Sequence[str] | None = None) -> int:
    """Run, store after every row, print; 1 if the images and seeds do not confirm the ordering."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="*", metavar="TRAINING", help=f"of {', '.join(TRAININGS)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="four idx files")
    parser.add_argument("--network", choices=NETWORKS, default="default")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, help="train on the first so many images only")
    parser.add_argument("--held-out", type=int, default=5000, help="the last so many say how small a network may get")
    parser.add_argument("--strength", type=float, help="of L1 and L2; default: 1e-6, more for shorter trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--every", type=int, default=4, help="epochs between cuts")
    parser.add_argument("--gate", type=float, default=0.1, help="largest fit error of a matrix that is cut; 1: all are")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    parser.add_argument("--compress", nargs="*", choices=tuple(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--max-drop", type=float, default=0.002, help="top-1 on held-out images that may go")
    parser.add_argument("--tuning-lr", type=float, default=0.03, help="peak learning rate after each step; the "
                        f"dense network that the others are compared with has {TUNING.lr:g}")  # fmt: skip
    parser.add_argument("--compressed-out", type=Path, help="CSV file of the compressed networks")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.trainings if name not in TRAININGS]:
        parser.error(f"unknown training {unknown[0]!r}; known: {', '.join(TRAININGS)}")
    data = read_parts(args.data, args.images, args.held_out)
    images = len(data["train"][1])
    strength = args.strength or scaled_strength(args.epochs, images)
    recipes = () if args.compress is None else args.compress or tuple(RECIPES)
    rows: list[dict[str, Any]] = []
    small_rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.trainings or TRAININGS:
            pruned, l1, l2 = TRAININGS[name]
            asked = {
                "network": args.network, "training": name, "width": args.width, "epochs": args.epochs,
                "train_images": images, "batch": args.batch, "seed": seed,
                "strength": strength if l1 or l2 else None, "cut_every": args.every if pruned else None,
                "cut_gate": args.gate if pruned else None,
            }  # fmt: skip
            tuning = replace(TUNING, lr=args.tuning_lr, batch_size=args.batch, seed=seed)
            how = {"held_out": args.held_out, "max_drop": args.max_drop, "tuning_lr": args.tuning_lr}
            wanted = [{**asked, "recipe": recipe, **how} for recipe in recipes]
            missing = [row for row in wanted if not _known(args.compressed_out, row, COMPRESSED_KEYS)]
            small_rows += [_known(args.compressed_out, row, COMPRESSED_KEYS) for row in wanted if row not in missing]
            row = _known(args.out, asked, KEYS)
            if not row or missing:
                model, row = train(asked, data)
                print(f"{name}, seed {seed}: test {row['test_top1']} %, {row['train_cpu_s']} s", flush=True)
                if args.out:
                    write_rows(args.out, [stamped(row)], KEYS)
            rows.append(row)
            if missing:
                control = tuned(model, data["train"], data["held out"], replace(tuning, lr=TUNING.lr))
            for request in missing:
                small = compressed(model, control, data, request["recipe"], args.max_drop, tuning)
                small_rows.append({**request, **small})
                if args.compressed_out:
                    write_rows(args.compressed_out, [stamped(small_rows[-1])], COMPRESSED_KEYS)
    _show(rows, ("training", "seed", "train_top1", "test_top1", "classes", "cut_values", "published_test_top1"))
    if small_rows:
        _show(small_rows, ("training", "seed", "recipe", "numbers", "small_numbers", "tuned_top1", "small_top1"))
    found = differences(rows)
    verdicts = decide(list(found.values()))
    for (low, high), one, verdict in zip(found, found.values(), verdicts, strict=True):
        print(f"{low} < {high}: {verdict}; {one.points:+.2f} points, 95 % interval {one.low:+.2f} to {one.high:+.2f}, "
              f"p {one.p:.2g}, {one.seeds} seed(s)")  # fmt: skip
    return 0 if all(verdict == "holds" for verdict in verdicts) else 1


def _known(path: Path | None, asked: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    return None if path is None else find_row(path, asked, keys)


def _show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    print(Table(columns, [[row[key] for key in columns] for row in rows]).to_text())


if __name__ == "__main__":
    raise SystemExit(main())
