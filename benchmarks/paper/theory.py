"""T5, T6, T8, T9, T10, T14: the theorems' statements on random draws, with how often and how tightly they hold."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.paper.finding import Finding
from rmtkern.spectrum.fit import fit_spectrum

__all__ = ["t5", "t6", "t8", "t9", "t10", "t14"]


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def t5(seed: int = 0) -> Iterator[Finding]:
    """Removing a Gaussian R from the middle of [784, N, N, 10] moves a logit by at most the bound but once in N.

    And |R v|_inf is at most |v|_2 sqrt(2 g / n log(2 n |T| / delta)) for all |T| vectors v with probability 1 - delta.
    """
    rng = np.random.default_rng(seed)
    draws = 200
    for n in (256, 1024):
        w1, w3 = rng.standard_normal((n, 784)) / 28, rng.standard_normal((10, n)) / n**0.5
        s = rng.random(784)
        hidden = _relu(w1 @ s)
        low_rank = np.outer(rng.standard_normal(n), rng.standard_normal(n)) / n
        after = w3 @ _relu(low_rank @ hidden)
        norm = float(np.abs(w3).sum(1).max())
        bound = 2 * math.sqrt(2) * norm * float(np.linalg.norm(w1 @ s)) * math.sqrt(math.log(2 * n) / n)
        moved = []
        for _ in range(draws):
            noise = rng.standard_normal((n, n)) / n**0.5
            moved.append(float(np.abs(w3 @ _relu((low_rank + noise) @ hidden) - after).max()))
        broken = sum(move > bound for move in moved) / draws
        yield Finding("T5", "share of draws over the bound", f"N {n}, {draws} draws", broken, 0, 1 / n)
        yield Finding("T5", "largest change over the bound", f"N {n}", max(moved) / bound, 0, 1)
    n, samples, delta, broken, tightest = 512, 100, 0.05, 0, 0.0
    vectors = rng.standard_normal((n, samples)) * rng.uniform(0.1, 10, samples)
    limits = np.linalg.norm(vectors, axis=0) * math.sqrt(2 / n * math.log(2 * n * samples / delta))
    for _ in range(draws):
        over = np.abs(rng.standard_normal((n, n)) / n**0.5 @ vectors).max(0) / limits
        broken, tightest = broken + bool((over > 1).any()), max(tightest, float(over.max()))
    # delta is a bound on a probability; 200 draws of it spread by 1.5 points
    setting = f"N {n}, {samples} samples, delta {delta}"
    yield Finding("T5", "share of draws with |R v|_inf over its bound of confidence", setting, broken / draws, 0,
                  delta + 0.03)  # fmt: skip
    yield Finding("T5", "largest |R v|_inf over that bound", setting, tightest, 0.7, None)


def t6(seed: int = 0) -> Iterator[Finding]:
    """The regularised loss falls by lambda (1 - theta^2) |R|_F^2 from S + R to S + theta R: the cross term is small."""
    rng = np.random.default_rng(seed)
    n, strength = 2000, 0.01
    left, right = (np.linalg.qr(rng.standard_normal((n, 5)))[0] for _ in range(2))
    s = (left * np.linspace(4.0, 8.0, 5)) @ right.T
    r = rng.standard_normal((n, n)) / n**0.5
    alone, before = strength * float((r**2).sum()), float(((s + r) ** 2).sum())
    for theta in (0.0, 0.5, 0.9):
        drop = strength * (before - float(((s + theta * r) ** 2).sum())) / (1 - theta**2)
        # the cross term 2 <S, R> / (1 + theta) has sd 2 |S|_F / sqrt(N) at theta = 0, here 0.03 % of |R|_F^2
        what = f"drop over {f'(1 - {theta:g}^2) ' if theta else ''}lambda |R|_F^2"
        yield Finding("T6", what, f"N {n}, rank 5", drop / alone, 0.998, 1.002)


def t8(seed: int = 0) -> Iterator[Finding]:
    """Entries above t = sqrt(2 g log(2 N M / delta) / N) are signal: no false one with probability 1 - delta."""
    rng = np.random.default_rng(seed)
    m, n, delta, draws = 1000, 500, 0.05, 200
    t = math.sqrt(2 * math.log(2 * n * m / delta) / n)
    where = rng.random((m, n)) < 0.01
    s = np.where(where, rng.choice([-2.001, 2.001], (m, n)) * t, 0.0)
    false = missed = 0
    for _ in range(draws):
        kept = np.abs(s + rng.standard_normal((m, n)) / n**0.5) > t
        false += bool((kept & ~where).any())
        missed += bool((where & ~kept).any())
    # delta is a bound on a probability; 200 draws of it spread by 1.5 points
    yield Finding("T8", "share of draws with a false entry", f"{m}x{n}, delta {delta}", false / draws, 0, delta + 0.03)
    yield Finding("T8", "share of draws that lose an entry over 2 t", f"{m}x{n}", missed / draws, 0, delta + 0.03)


def t9(seed: int = 0) -> Iterator[Finding]:
    """Training under weight decay takes an injected random part out again: its norm and the bulk edge fall."""
    torch.manual_seed(seed)
    n, decay = 200, 0.05
    net = nn.Sequential(nn.Linear(20, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
    x = torch.randn(512, 20)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], 1)

    def train(steps: int) -> None:
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=decay / 10)
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimiser.step()

    train(600)
    weight = net[2].weight
    noise = torch.randn(n, n) / n**0.5
    with torch.no_grad():
        weight += noise
    before = fit_spectrum(weight.detach().double().numpy())
    train(600)
    after = fit_spectrum(weight.detach().double().numpy())
    left = float((weight.detach() * noise).sum() / noise.square().sum())  # the share of R that is still there
    yield Finding("T9", "share of the injected R that is left", f"N {n}, 600 steps", left, None, 0.9)
    fall = float(after.sigma_plus or 0) / float(before.sigma_plus or 1)
    yield Finding("T9", "bulk edge over that after the injection", f"N {n}", fall, 0, 0.95)


def t10(seed: int = 0) -> Iterator[Finding]:
    """Entries of the singular vectors of noise are N(0, 1/N), and the largest is near sqrt(2 log(2 N) / N)."""
    rng = np.random.default_rng(seed)
    n = 768
    u = np.linalg.svd(rng.standard_normal((n, n)))[0]
    largest = float(np.median(np.abs(u).max(0))) / math.sqrt(2 * math.log(2 * n) / n)
    yield Finding("T10", "largest entry over sqrt(2 log(2N)/N), median", f"N {n}", largest, 0.75, 1.05)
    fourth = float((u**4).mean() * n**2)
    yield Finding("T10", "fourth moment of sqrt(N) u", f"N {n}", fourth, 2.9, 3.05, 3.0)


def t14(seed: int = 0) -> Iterator[Finding]:
    """Training on the regulariser alone is a soft threshold: every weight shrinks by the same amount, or to zero.

    The published stage of cycle i: 5000 + 1000 (i - 1) steps of AdamW at 5e-8, cosine to 0, whose gradient is
    5e-7 sign(w) times a layer's weight h twice, as each gradient is scaled by h again.
    """
    for cycle, mu, published in ((1, 0.01, 4.2e-5), (1, 0.05, 1.2e-5), (10, 0.01, 2.9e-4), (10, 0.2, 7e-5)):
        steps, h = 5000 + 1000 * (cycle - 1), 1 / (1 + 1e4 * mu / cycle)
        weight = nn.Parameter(torch.tensor([0.5, 0.05, -0.2], dtype=torch.float64))
        start = weight.detach().clone()
        optimiser = torch.optim.AdamW([weight], lr=5e-8, weight_decay=2e-7)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            weight.grad = h * 5e-7 * torch.sign(weight.detach())
            optimiser.step()
            schedule.step()
        shrunk = (start.abs() - weight.detach().abs()).tolist()
        setting = f"cycle {cycle}, mu {mu:g}"
        yield Finding("T14", "shrinkage of a weight", setting, shrunk[0], 0.8 * published, 1.25 * published, published)
        spread = (max(shrunk) - min(shrunk)) / max(shrunk)
        yield Finding("T14", "spread of the shrinkage over weights", setting, spread, 0, 0.01)
