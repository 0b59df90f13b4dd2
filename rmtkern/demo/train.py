"""Train the demo's ViT on Fashion-MNIST and write the weights that the package ships.

    python -m rmtkern.demo.train --data /usr/share/datasets/fashion-mnist --out demo_vit.safetensors

The shipped weights took two calls on two cores: one of 40 minutes, then `--init` of its result, `--peak-lr 1e-3`,
`--seed 1 --epochs 9 --minutes 15`; held-out top-1 91.4 %. The four idx files are Debian's dataset-fashion-mnist (MIT).
Every choice was made on the last 5,000 training images; the 10,000 test images are never read here.
"""

import argparse
import gzip
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rmtkern.demo.model import DemoViT

_log = logging.getLogger(__name__)

HELD_OUT = 5_000
KEEP, KEEP_UNTIL = 25, 0.8  # random tokens per image in the first 80 % of training: twice as fast, and regularising


def parse_idx(raw: bytes, name: str) -> np.ndarray:
    """Array of uint8 in an idx file (the MNIST format); ValueError if it is something else or incomplete."""
    if raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{name}: expected an idx file of unsigned bytes, got magic {raw[:4]!r}")
    dims = raw[3]
    shape = tuple(np.frombuffer(raw, dtype=">u4", count=dims, offset=4).tolist())
    if len(raw) != 4 + 4 * dims + math.prod(shape):
        raise ValueError(f"{name}: an idx file of shape {shape} has other than {len(raw)} bytes; copy it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_idx(path: Path) -> np.ndarray:
    """Array of uint8 stored in a gzipped idx file."""
    return parse_idx(gzip.decompress(path.read_bytes()), path.name)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip and shift by up to 2 pixels, per image; images are [B, 1, 28, 28]."""
    batch = images.shape[0]
    flip = torch.rand(batch, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2))
    top, left = torch.randint(0, 5, (2, batch), generator=generator)
    rows = top[:, None] + torch.arange(28)
    cols = left[:, None] + torch.arange(28)
    return padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], cols[:, None, :]][:, None]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in [0, 1]."""
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return hits / len(labels)


def train(
    data: Path, out: Path, epochs: int, batch: int, peak_lr: float, seed: int, minutes: float, init: Path | None = None
) -> None:
    """Train with Muon (hidden matrices) and AdamW (the rest), cosine schedule, bf16 autocast.

    The schedule ends after `epochs` or `minutes`, whichever is first.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(read_idx(data / "train-images-idx3-ubyte.gz").copy())[:, None].float() / 255
    labels = torch.from_numpy(read_idx(data / "train-labels-idx1-ubyte.gz").astype(np.int64))
    fit_x, fit_y, held_x, held_y = images[:-HELD_OUT], labels[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:]
    model = DemoViT()
    if init is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(init).items()})
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=peak_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    steps = epochs * (len(fit_y) // batch)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1.0:
        for index in torch.randperm(len(fit_y), generator=generator)[: len(fit_y) // batch * batch].split(batch):
            done = max(step / steps, (time.monotonic() - start) / (60 * minutes))
            if done >= 1.0:
                break
            lr = peak_lr * min(1.0, done / 0.05) * (0.5 + 0.5 * math.cos(math.pi * done))
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
            with torch.autocast("cpu", torch.bfloat16):
                tokens = model.embed(augment(fit_x[index], generator))
                if done < KEEP_UNTIL:
                    tokens = tokens[:, torch.randperm(tokens.shape[1], generator=generator)[:KEEP].sort().values]
                logits = model.classify(tokens)
            loss = F.cross_entropy(logits.float(), fit_y[index], label_smoothing=0.05)
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            if step % 100 == 0:
                seconds = time.monotonic() - start
                _log.info("step %d done %.3f loss %.4f %.0f s", step, done, loss.item(), seconds)
        _log.info("step %d held-out top-1 %.4f", step, accuracy(model.eval(), held_x, held_y))
        model.train()
        save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, out)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("demo_vit.safetensors"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from these weights, with a schedule of its own")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop here even if epochs are left")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(args.data, args.out, args.epochs, args.batch, args.peak_lr, args.seed, args.minutes, args.init)


if __name__ == "__main__":
    main()
