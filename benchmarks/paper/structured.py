"""T11, T12: n:m patterns by what their groups cost, against brute force; and what merging tokens saves."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import timm
import torch

from benchmarks.paper.finding import Finding
from rmtkern.macs import count_macs
from rmtkern.pruning.cast import cast_mask
from rmtkern.token_merging import bipartite_merge, merge_tokens_

__all__ = ["t11", "t12"]


def _group_costs(matrix: np.ndarray, moment: np.ndarray, gone: np.ndarray, m: int) -> np.ndarray:
    """r^T C_g r of every row and group, [N, K / m]: r are the removed weights, C_g the group's second moments."""
    removed = (matrix * gone).reshape(len(matrix), -1, m)
    blocks = np.stack([moment[g : g + m, g : g + m] for g in range(0, len(moment), m)])
    return np.einsum("nga,gab,ngb->ng", removed, blocks, removed)


def _brute(matrix: np.ndarray, moment: np.ndarray, n: int, m: int) -> np.ndarray:
    """The least of those costs over all patterns that keep n of m, one by one."""
    least = np.full((len(matrix), matrix.shape[1] // m), np.inf)
    for goes in combinations(range(m), m - n):
        gone = np.zeros(matrix.shape, bool)
        gone.reshape(len(matrix), -1, m)[:, :, list(goes)] = True
        least = np.minimum(least, _group_costs(matrix, moment, gone, m))
    return least


def t11(seed: int = 0) -> Iterator[Finding]:
    """CAST's pattern is the best of all in each group, so never worse than magnitude's there; outputs only usually."""
    rng = np.random.default_rng(seed)
    size, draws = 64, 20
    for n, m in ((2, 4), (4, 8)):
        excess, ratios, better = 0.0, [], 0
        for _ in range(draws):
            matrix = rng.standard_normal((size, size))
            inputs = rng.standard_normal((256, 24)) @ rng.standard_normal((24, size)) + rng.standard_normal((256, size))
            moment = inputs.T @ inputs / len(inputs)
            weight, none = torch.tensor(matrix), torch.zeros(size, size, dtype=torch.bool)
            gone = cast_mask(weight, torch.tensor(moment), none, torch.zeros(1), "n:m", {"n": n, "m": m}).numpy()
            smallest = np.argsort(np.abs(matrix).reshape(size, -1, m), -1)[:, :, : m - n]
            magnitude = np.zeros((size, size // m, m), bool)
            np.put_along_axis(magnitude, smallest, True, -1)
            magnitude = magnitude.reshape(size, size)
            costs, best = _group_costs(matrix, moment, gone, m), _brute(matrix, moment, n, m)
            excess = max(excess, float(((costs - best) / best).max()))
            ratios.append(float(costs.sum() / _group_costs(matrix, moment, magnitude, m).sum()))
            errors = [float((((matrix * mask) @ inputs.T) ** 2).sum()) for mask in (gone, magnitude)]
            better += errors[0] < errors[1]
        setting = f"{n}:{m}, {size}x{size}"
        yield Finding("T11", "largest excess over brute force in a group", setting, excess, None, 1e-9)
        yield Finding("T11", "sum of the groups' costs over magnitude's, largest", setting, max(ratios), 0, 1)
        yield Finding("T11", "share of draws with a smaller output error", setting, better / draws, 0.5, 1)


def t12(seed: int = 0) -> Iterator[Finding]:
    """Merging 8 tokens in every block saves a quarter of ViT-B's products, and half of ViT-L's 24 blocks; none is lost.

    The papers print 22.81 % for ViT-B, as if every MLP saw the tokens before merging, and about as much for ViT-L.
    """
    for name, low, high, published in (
        ("vit_base_patch16_224", 25.385, 25.395, 22.81), ("vit_large_patch16_224", 49.65, 49.75, 22.8)
    ):  # fmt: skip
        with torch.device("meta"):
            model, image = timm.create_model(name), torch.zeros(1, 3, 224, 224)
        before = count_macs(model, image)
        merge_tokens_(model, 8)
        after = count_macs(model, image)
        # not the search for similar tokens, which the papers do not count
        counts = [report.total - report.of("other")[0] for report in (before, after)]
        yield Finding("T12", "products saved [%]", f"{name}, 8 a block", 100 * (1 - counts[1] / counts[0]), low, high,
                      published)  # fmt: skip
    x, sizes = torch.randn(2, 197, 16, generator=torch.Generator().manual_seed(seed)), None
    mean = x.mean(1)
    for _ in range(12):
        x, sizes, _ = bipartite_merge(x, sizes, x, 8, 1)
    assert sizes is not None
    setting = "12 times 8 of 197"
    yield Finding("T12", "tokens that the merged ones stand for", setting, float(sizes.sum()) / len(x), 197, 197, 197)
    off = float(((x * sizes[..., None]).sum(1) / 197 - mean).abs().max())
    yield Finding("T12", "error of the weighted mean over tokens", setting, off, None, 1e-5)
