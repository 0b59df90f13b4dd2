"""C3, C5: fully connected networks on Fashion-MNIST, trained with and without Marchenko-Pastur pruning.

    python -m benchmarks.paper.fully_connected --data /usr/share/datasets/fashion-mnist [--width 600] [--epochs 16]

One row per training in the CSV; the claim is none < (regularised, MP alone) < MP + regularised. The paper's rows are of
width 3000 and 100 epochs, from an initialisation that it does not name; a He-initialised baseline stands beside them.
Afterwards each network is made as small as it gets without a loss that the last training images, which are held out for
that, would show (compression.py), and scored with noise on its weights (C5). A row is written as soon as it is known,
and one that the file has is not run again.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import against, hits_of
from benchmarks.paper.compression import compress, numbers
from benchmarks.record import has_row, read_rows, stamped, write_rows
from rmtkern.demo.train import accuracy, read_idx
from rmtkern.models import prunable_weights
from rmtkern.tables import Table
from rmtkern.training.loop import finetune_

REGULARISED = {"regulariser": "l1", "strength": 1e-6, "weight_decay": 2e-6}  # decay of SGD is L2 at half its factor
L2 = {"weight_decay": 2e-6}
RUNS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "none": ("default", False, {}),
    "MP": ("default", True, {}),
    "L1 + L2": ("default", False, REGULARISED),
    "MP + L1 + L2": ("default", True, REGULARISED),
    "MP + L2": ("default", True, L2),
    "He, none": ("he", False, {}),
    "He, MP + L1 + L2": ("he", True, REGULARISED),
}
"""Name -> initialisation, MP pruning, options of finetune_."""
PUBLISHED = {"none": (78.03, 71.64), "MP": (88.12, 81.22), "L1 + L2": (87.57, 81.70), "MP + L1 + L2": (99.82, 90.53),
             "MP + L2": (99.98, 90.16)}  # fmt: skip
"""Name -> train and test top-1 [%] at width 3000 after 100 epochs."""
EVERY = 4
NOISE = (0.002, 0.005, 0.01)
"""Standard deviations of the noise that C5 adds to every weight but the last layer's."""
ORDER = [("none", "MP"), ("none", "L1 + L2"), ("MP", "MP + L1 + L2"), ("L1 + L2", "MP + L1 + L2")]
KEYS = ("training", "width", "epochs", "train_images", "batch", "seed", "cut_gate")


def network(width: int, initialisation: str, seed: int) -> nn.Sequential:
    """[784, w, w, w, w, w / 6, 10] with ReLU, as the paper's 3000 and 500; "default" is PyTorch's initialisation."""
    torch.manual_seed(seed)
    sizes = [784, width, width, width, width, max(10, width // 6), 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        if initialisation == "he":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [B, 784] in [0, 1] and labels [B] of "train" or "t10k"."""
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, 784).astype(np.float32))
    return images / 255, torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64))


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


def train(
    name: str,
    data: dict[str, tuple[Tensor, Tensor]],
    width: int,
    epochs: int,
    seed: int,
    gate: float,
    batch: int,
    max_drop: float,
) -> dict[str, Any]:
    """One row: train a network and score its last state; nothing is chosen by the test images."""
    initialisation, pruned, options = RUNS[name]
    model = network(width, initialisation, seed)
    options = {"weight_decay": 0.0, **options}
    if pruned:
        options |= {"cut_every": EVERY, "cut_until": 2 * epochs, "cut_gate": gate}
    start = time.perf_counter()
    report = finetune_(
        model, None, data["train"], epochs=epochs, optimizer="sgd", momentum=0.9, lr=0.01, warmup=0.0,
        floor=0.96 ** (epochs // EVERY), clip=None, batch_size=batch, label_smoothing=0.0, holdout=0.0, seed=seed,
        show_progress=False, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    weights = sum(weight.parameter.numel() for weight in prunable_weights(model, "all"))
    small = compress(model, data["held out"], max_drop=max_drop)
    lost = against(hits_of(model, *data["t10k"]), hits_of(small, *data["t10k"]))
    published = PUBLISHED.get(name, (None, None))
    model.eval()
    return {
        "training": name, "width": width, "epochs": epochs, "seed": seed, "cut_gate": gate if pruned else "",
        "batch": batch, "train_images": len(data["train"][1]),
        "train_top1": round(100 * accuracy(model, *data["train"]), 2),
        "test_top1": round(100 * accuracy(model, *data["t10k"]), 2),
        "loss": report.epochs[-1].loss, "stopped": report.stopped or "",
        "cut_values": sum(row.cut or 0 for row in report.epochs),
        "weights": weights, "seconds": round(seconds, 1), "held_out": len(data["held out"][1]),
        "max_drop": max_drop,
        "numbers": sum(parameter.numel() for parameter in model.parameters()), "small_numbers": numbers(small),
        "small_test_top1": round(100 * lost["top1"], 2),
        **with_noise(model, data["t10k"], seed),
        "small_loss": round(100 * lost["loss"], 2), "small_loss_error": round(100 * lost["loss_error"], 2),
        "published_train_top1": published[0], "published_test_top1": published[1],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run, store after every row, print; exits with 1 if the ordering of the test accuracies is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainings", nargs="*", metavar="TRAINING", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="four idx files")
    parser.add_argument("--width", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=16, help=f"a multiple of {EVERY} ends with a cut")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, help="train on the first so many images only")
    parser.add_argument("--held-out", type=int, default=5000, help="the last so many say how small a network may get")
    parser.add_argument("--max-drop", type=float, default=0.005, help="top-1 that it may lose on them; default: about "
                        "the standard error on 5,000 images")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n - 1")
    parser.add_argument("--gate", type=float, default=0.1, help="largest fit error of a matrix that is cut; 1: all are")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.trainings if name not in RUNS]:
        parser.error(f"unknown training {unknown[0]!r}; known: {', '.join(RUNS)}")
    data = {part: read(args.data, part) for part in ("train", "t10k")}
    images, labels = data["train"]
    data["held out"] = images[-args.held_out :], labels[-args.held_out :]
    data["train"] = images[: -args.held_out][: args.images], labels[: -args.held_out][: args.images]
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for name in args.trainings or RUNS:
            asked = {"training": name, "width": args.width, "epochs": args.epochs, "batch": args.batch, "seed": seed,
                     "train_images": len(data["train"][1]), "cut_gate": args.gate if RUNS[name][1] else ""}  # fmt: skip
            if args.out and has_row(args.out, asked, KEYS):
                rows += [row for row in read_rows(args.out) if all(row[key] == str(asked[key]) for key in KEYS)]
                continue
            rows.append(train(name, data, args.width, args.epochs, seed, args.gate, args.batch, args.max_drop))
            print(f"{name}: test {rows[-1]['test_top1']} %, {rows[-1]['seconds']} s", flush=True)
            if args.out:
                write_rows(args.out, [stamped(rows[-1])], KEYS)
    shown = ("training", "seed", "train_top1", "test_top1", "cut_values", "numbers", "small_numbers", "small_test_top1",
             "published_test_top1")  # fmt: skip
    print(Table(shown, [[row[key] for key in shown] for row in rows]).to_text())
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["training"], []).append(float(row["test_top1"]))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    holds = {f"{low} < {high}": means[low] < means[high] for low, high in ORDER if low in means and high in means}
    print("\n".join(f"{claim}: {'holds' if held else 'does not hold'}" for claim, held in holds.items()))
    share, count = max(means.values()) / 100, len(data["t10k"][1])
    error = 100 * (2 * share * (1 - share) / count) ** 0.5
    print(f"one standard error of a difference on {count} images is about {error:.2f} points, for one seed each")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
