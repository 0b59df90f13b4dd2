"""T7: every proof about a pruned network holds: paths, margins, masks, restored parts and several layers."""

import copy
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper.finding import Finding
from rmtkern.certificates import certify

__all__ = ["t7"]

SIZES, SAMPLES, DRAWS = (784, 256, 256, 10), 500, 12
ROUNDING = 1e-9


def _network(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A float64 network trained for a few steps to tell ten noisy patterns apart, and its images and labels."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).double()
    labels = torch.arange(SAMPLES) % 10
    images = torch.rand(10, SIZES[0], dtype=torch.float64)[labels] + torch.rand(SAMPLES, SIZES[0], dtype=torch.float64)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimiser.step()
    return net.eval(), images, labels


def _loss(net: nn.Module, images: Tensor, labels: Tensor, l2: float, l1: float) -> tuple[float, float]:
    """Cross-entropy, and with the penalties of the weights."""
    with torch.no_grad():
        entropy = float(nn.functional.cross_entropy(net(images), labels))
        weights = [parameter for parameter in net.parameters() if parameter.ndim == 2]
        return entropy, entropy + sum(l2 * float((w**2).sum()) + l1 * float(w.abs().sum()) for w in weights)


def t7(seed: int = 0) -> Iterator[Finding]:
    """Random masks in one layer or all, taken away by half or whole: no proof is broken, and how much it is above."""
    rng = np.random.default_rng(seed)
    dense, images, labels = _network(seed)
    l2 = l1 = 1e-4
    with torch.no_grad():
        logits = dense(images)
    entropy, objective = _loss(dense, images, labels, l2, l1)
    right = float((logits.argmax(1) == labels).double().mean())
    broken = proofs = 0
    slacks: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        pruned, theta = copy.deepcopy(dense), (0.0, 0.5)[draw % 2]
        linears = [layer for layer in pruned if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer in linears if draw % 4 == 3 else [linears[draw % 3]]:
                gone = torch.from_numpy(rng.random(tuple(layer.weight.shape)) < rng.choice([0.01, 0.1, 0.5]))
                layer.weight[gone] *= theta
            after = pruned(images)
        moved, spread = (after - logits).abs().amax(1), (after - logits).amax(1) - (after - logits).amin(1)
        kept = float((after.argmax(1) == logits.argmax(1)).double().mean())
        accuracy = float((after.argmax(1) == labels).double().mean())
        entropy_after, objective_after = _loss(pruned, images, labels, l2, l1)
        found = certify(pruned, dense, (images, labels), l2=l2, l1=l1, show_progress=False)
        for bound in found.bounds:
            truth = float((spread if bound.name.endswith("osc") else moved).mean())
            claims = [
                (truth, bound.logit), (abs(entropy_after - entropy), bound.loss), (bound.certified, kept),
                (abs(accuracy - right), bound.accuracy), (objective_after - objective, bound.objective),
            ]  # fmt: skip
            proofs += len(claims)
            broken += sum(high is None or low > high + ROUNDING for low, high in claims)
            slacks.setdefault(bound.name, []).append(bound.logit / truth)
    setting = f"{DRAWS} masks, {SAMPLES} samples"
    yield Finding("T7", "broken inequalities", f"{setting}, {proofs} inequalities", broken, 0, 0)
    for name, values in slacks.items():
        yield Finding("T7", f"bound of the logits over the truth, mean: {name}", setting, float(np.mean(values)),
                      1 - ROUNDING, None)  # fmt: skip
