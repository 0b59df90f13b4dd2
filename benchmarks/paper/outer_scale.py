"""C4: the scale of the outer layers, on which the bound of what removing a random matrix does to the logits depends.

[784, N, N, 10] with ReLU and without biases, L1, SGD, inputs scaled so that the longest has length 0.05. The paper has
N up to 30,000 after 200 epochs, and gives neither the strength of L1 nor the learning rate: both were chosen in trials
on small networks for a tau that falls.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.paper.finding import Finding
from benchmarks.paper.fully_connected import read
from rmtkern.demo.train import accuracy
from rmtkern.training.loop import finetune_

__all__ = ["c4"]

LENGTH, STRENGTH, LR = 0.05, 2e-5, 1.0
PUBLISHED = {500: (2.33, 88.41), 1000: (1.69, 88.48), 2000: (1.47, 88.41)}
"""N -> tau and test top-1 [%] from N(0, 1/N), read from figures."""


def c4(
    seed: int, folder: Path, widths: Sequence[int] = (125, 250, 500), epochs: int = 20, images: int = 8000
) -> Iterator[Finding]:
    """The paper's claim that tau falls as N grows; it needs L1 to have taken the noise out of the outer layers.

    tau = sqrt(2) a_th + a_emp of the longest image s: a_th = |W3|_inf |W1 s|_2 sqrt(log(2 N) / N), the bound's scale,
    and a_emp = |W3|_inf |W1 s|_2 / N^(3/8), the paper's empirical one.

    Args:
        seed: of the weights and of the order of images.
        folder: of Fashion-MNIST.
        widths: N, rising.
        epochs: of training.
        images: first training images that are used.
    """
    x, y = (part[:images] for part in read(folder, "train"))
    scale = LENGTH / float(x.norm(dim=1).max())
    test, labels = read(folder, "t10k")
    before = math.inf
    for width in widths:
        net = _trained(width, width**-0.5, x * scale, y, epochs, seed)
        top1 = 100 * accuracy(net, test * scale, labels)
        theory, empirical = outer_scales(net, scale * x[x.norm(dim=1).argmax()])
        tau = math.sqrt(2) * theory + empirical
        published, published_top1 = PUBLISHED.get(width, (None, None))
        setting = f"N {width}, N(0, 1/N)"
        yield Finding("C4", "tau", setting, tau, 0, before, published)
        yield Finding("C4", "a_th", setting, theory, 0, tau)
        yield Finding("C4", "test top-1 [%]", setting, top1, 70, 100, published_top1)
        before = tau
    net = _trained(widths[0], 1 / widths[0], x * scale, y, epochs, seed)
    top1 = 100 * accuracy(net, test * scale, labels)
    yield Finding("C4", "test top-1 [%]", f"N {widths[0]}, N(0, 1/N^2): L1 is faster than training", top1, 0, 100)


def outer_scales(net: nn.Sequential, image: Tensor) -> tuple[float, float]:
    """a_th and a_emp of [K, N, N, classes] for one image [K]."""
    first, _, middle, _, last = net
    width = middle.weight.shape[0]
    outer = float(last.weight.detach().abs().sum(1).max()) * float((first.weight.detach() @ image).norm())
    return outer * math.sqrt(math.log(2 * width) / width), outer / width**0.375


def _trained(width: int, deviation: float, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    linears = [nn.Linear(a, b, bias=False) for a, b in ((x.shape[1], width), (width, width), (width, 10))]
    for linear in linears:
        nn.init.normal_(linear.weight, std=deviation)
    net = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
    finetune_(
        net, None, (x, y), epochs=epochs, optimizer="sgd", momentum=0.9, lr=LR, warmup=0.0, floor=1.0, clip=None,
        batch_size=64, label_smoothing=0.0, weight_decay=0.0, regulariser="l1", strength=STRENGTH, holdout=0.0,
        seed=seed, show_progress=False,
    )  # fmt: skip
    return net.eval()
