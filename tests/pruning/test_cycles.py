"""The pruning loop against plain NumPy written from docs/math.md, in float64 so that no rounding can flip an order."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning import cycles
from rmtkern.pruning.cycles import make_masks, matrices
from rmtkern.pruning.plan import PruneConfig
from rmtkern.spectrum.fit import fit_spectra


def quiet(found):
    return fit_spectra(found, show_progress=False)


def run(model, **fields):
    config = PruneConfig(targets=("all",), **fields).resolve(calibrated=False)
    weights = prunable_weights(model, "all")
    fits = quiet(matrices(weights)) if config.needs_fits else {}
    found = make_masks(weights, config, fits, {}, quiet, show_progress=False)
    return [(one.mask(), weight.as_matrix().masked_fill(one.mask(), 0) if one.values is None else one.matrix())
            for weight, one in zip(weights, found, strict=True)]  # fmt: skip


def model(*shapes, dtype=torch.float64):
    """Layers of different scale, noise plus a few spikes, named like the layers of a ViT."""
    parts = {}
    for i, (rows, columns) in enumerate(shapes):
        spikes = torch.randn(rows, 2, dtype=torch.float64) @ torch.randn(2, columns, dtype=torch.float64)
        linear = nn.Linear(columns, rows, dtype=dtype)
        linear.weight.data.copy_((torch.randn(rows, columns, dtype=torch.float64) + 0.3 * spikes) * 0.02 * (i + 1))
        parts[("attn", "mlp", "rest")[i % 3] + f"_{i}"] = nn.ModuleDict({("qkv", "fc1", "x")[i % 3]: linear})
    return nn.ModuleDict(parts)


SHAPES = ((60, 20), (80, 40), (30, 50), (36, 36))


def smallest(scores, count):
    """Boolean masks of the `count` smallest entries of all arrays together."""
    flat = np.concatenate([score.ravel() for score in scores])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(flat, kind="stable")[:count]] = True
    ends = np.cumsum([score.size for score in scores])[:-1]
    return [part.reshape(score.shape) for part, score in zip(np.split(chosen, ends), scores, strict=True)]


@pytest.mark.parametrize("sparsity, beta, vanish", [
    (0.15, (0, 0, 0), 1), (0.3, (1, 1, 1), 0.5), (0.5, (1.25, 1.25, 1.25), 0.7), (0.65, (1, 2, 1.5), 0.85),
    (0.9, (0, 0, 0), 1),
])  # fmt: skip
def test_seb_against_its_formula(sparsity, beta, vanish):
    net = model(*SHAPES)
    arrays = [weight.as_matrix().numpy().copy() for weight in prunable_weights(net, "all")]
    edges = np.array([fit.sigma_plus for fit in quiet({str(i): a for i, a in enumerate(arrays)}).values()])
    z = (edges - edges.mean()) / edges.std()
    weights = np.maximum(0.1, 1 + np.array([beta[i % 3] for i in range(4)]) * (1 - sparsity / vanish) * z)
    scores = [np.abs(array).astype(np.float32) / np.float32(w) for array, w in zip(arrays, weights, strict=True)]
    expected = smallest(scores, round(sparsity * sum(array.size for array in arrays)))
    for (mask, matrix), want, array in zip(run(net, method="seb", sparsity=sparsity), expected, arrays, strict=True):
        assert np.array_equal(mask.numpy(), want)
        assert np.array_equal(matrix.numpy(), np.where(want, 0, array))


def numpy_cycles(arrays, sparsity, z=0.5, shrink=0.0):
    """docs/math.md (16) and (23), trimmed to the exact count, with thresholds in Haar units."""
    arrays = [array.copy() for array in arrays]
    masks = [np.zeros(array.shape, bool) for array in arrays]
    goal, cycle = round(sparsity * sum(array.size for array in arrays)), 0
    while (left := goal - sum(mask.sum() for mask in masks)) > 0:
        cycle += 1
        fits = list(quiet({str(i): array for i, array in enumerate(arrays)}).values())
        targets = [((1 - fit.mu) * fit.gamma) ** (1.5 / cycle) * 0.06 * 1.02**cycle * (~mask).sum()
                   for fit, mask in zip(fits, masks, strict=True)]  # fmt: skip
        if cycle % 2 == 0:
            for array, fit, mask in zip(arrays, fits, masks, strict=True):
                u, s, vh = np.linalg.svd(array, full_matrices=False)
                g = np.maximum(1 / 750, np.maximum(0, 1 - s / fit.sigma_plus) ** 30) * z * 1.02**cycle
                u[np.abs(u) < g / np.sqrt(len(u))] = 0
                vh[np.abs(vh) < g[:, None] / np.sqrt(vh.shape[1])] = 0
                array[:] = np.where(mask, 0, (u * s) @ vh)
        keys = []
        for array, mask, target in zip(arrays, masks, targets, strict=True):
            key = np.full(array.size, np.inf)
            open_ = np.flatnonzero(~mask.ravel())
            order = open_[np.argsort(np.abs(array.ravel()[open_]).astype(np.float32), kind="stable")]
            key[order] = (np.arange(len(order)) + 0.5) / target
            keys.append(key.reshape(array.shape))
        for mask, more, array in zip(masks, smallest(keys, min(left, round(sum(targets)))), arrays, strict=True):
            mask |= more
            array[mask] = 0
        for array, fit, mask in zip(arrays, fits, masks, strict=True):
            g = 5e-7 / (1 + 1e4 * fit.mu / cycle)
            less = np.abs(array) - shrink * 2.5e-8 * (4000 + 1000 * cycle) * g / (g + 1e-8)
            array[:] = np.where(~mask & (less > 0), np.sign(array) * less, array)
    return masks, arrays, cycle


@pytest.mark.parametrize("sparsity, shrink", [(0.05, 0), (0.4, 0), (0.7, 0), (0.05, 1), (0.4, 3), (0.4, 30)])
def test_rmt_cycles_against_plain_numpy(sparsity, shrink):
    net = model(*SHAPES)
    arrays = [weight.as_matrix().numpy() for weight in prunable_weights(net, "all")]
    masks, matrices_, cycles = numpy_cycles(arrays, sparsity, shrink=shrink)
    assert cycles >= (2 if sparsity > 0.1 else 1)  # 0.0612 of what is left at most in the first
    found = run(net, method="rmt", sparsity=sparsity, soft_threshold=shrink)
    for (mask, matrix), want, array in zip(found, masks, matrices_, strict=True):
        assert np.array_equal(mask.numpy(), want)
        np.testing.assert_allclose(matrix.numpy(), array, atol=1e-12)  # two different SVD drivers, float64


def test_rmt_changes_only_survivors_and_never_revives_a_zero():
    net = model(*SHAPES, dtype=torch.float32)
    first = prunable_weights(net, "all")[0]
    first.parameter.data[:, 3] = 0
    before = first.as_matrix().clone()
    mask, matrix = run(net, method="rmt", sparsity=0.5)[0]
    assert mask[:, 3].all()
    assert torch.equal(matrix == 0, mask)
    assert not torch.equal(matrix[~mask], before[~mask])
    assert (matrix - before)[~mask].norm() < 0.1 * before.norm()


def test_legacy_takes_the_published_spectra_thresholds_and_shrinking():
    net = model((96, 96), (96, 64), dtype=torch.float32)
    options = {"method": "rmt", "sparsity": 0.1, "legacy": True}  # two cycles, the second with thresholds
    weights = prunable_weights(net, "all")
    published = fit_spectra(matrices(weights), legacy=True, show_progress=False)
    assert any(published[name].mu != fit.mu for name, fit in quiet(matrices(weights)).items())
    assert prune_(copy.deepcopy(net), 0.1, "rmt", targets="all", legacy=True).fits == published
    plain, stage = run(net, **options), run(net, **options, soft_threshold=1.0)
    for (_, before), (mask, after) in zip(plain, stage, strict=True):
        kept = ~mask & (before != 0)
        assert float(after[kept].abs().sum()) < float(before[kept].abs().sum())
    masks = [mask for mask, _ in run(net, **{**options, "legacy": False})]
    assert any(not torch.equal(mask, other) for (mask, _), other in zip(plain, masks, strict=True))


def test_legacy_theta_sparsifies_otherwise():
    net = model((96, 96), (96, 96), dtype=torch.float32)
    (_, haar), _ = run(net, method="rmt", sparsity=0.3)
    (mask, legacy), _ = run(net, method="rmt", sparsity=0.3, theta="legacy")
    assert not torch.equal(haar, legacy)
    assert torch.equal(legacy == 0, mask)


def test_haar_step_before_pruning():
    net = model(*SHAPES, dtype=torch.float32)
    plain, cleaned = (run(net, method="seb", sparsity=0.5, haar=haar) for haar in (0.0, 0.5))
    assert sum(int(mask.sum()) for mask, _ in cleaned) == sum(int(mask.sum()) for mask, _ in plain)
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(plain, cleaned, strict=True))
    for mask, matrix in cleaned:
        assert torch.equal(matrix == 0, mask)


@pytest.mark.parametrize(
    "options", [{"method": "uniform", "haar": 1.0}, {"method": "rmt"}, {"method": "rmt", "theta": "legacy"}]
)
def test_blocks_of_one_shape_together_are_as_each_alone(options, monkeypatch):
    """As on a GPU: the same decisions and values, whichever weights share a batch."""
    torch.manual_seed(3)
    net = model((40, 30), (40, 30), (30, 30), (40, 30), (6, 5))  # the last is too small for a fit
    alone = run(net, sparsity=0.5, **options)
    asked = []

    def together(weights, values):
        asked.append(len(values))
        return [[0, 1, 3], [2], [4]]

    monkeypatch.setattr(cycles, "_groups", together)
    for (mask, value), (other, again) in zip(alone, run(net, sparsity=0.5, **options), strict=True):
        assert torch.equal(mask, other)
        torch.testing.assert_close(value, again, rtol=1e-9, atol=1e-12)
    assert asked and set(asked) == {5}


def test_only_a_gpu_computes_weights_together(monkeypatch):
    def there(n, k, blocks=1, device="cuda"):
        value = SimpleNamespace(shape=(n, k), dtype=torch.float32, device=torch.device(device))
        return SimpleNamespace(blocks=lambda: range(blocks)), value

    def groups(*pairs):
        return cycles._groups(*zip(*pairs, strict=True))

    assert groups(there(8, 4), there(8, 4), there(4, 8), there(8, 4, 2), there(8, 4)) == [[0, 1, 4], [2], [3]]
    assert groups(there(8, 4, device="cpu"), there(8, 4, device="cpu")) == [[0], [1]]
    monkeypatch.setattr(cycles, "_TOGETHER", 2 * 8 * (4 * 8 * 4 + 3 * 4 * 4))
    assert groups(*[there(8, 4)] * 5) == [[0, 1], [2, 3], [4]]


def test_tiny_and_depthwise_layers_are_neutral():
    net = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict({"fc1": nn.Linear(40, 60), "fc2": nn.Linear(60, 40)}),
            "tiny": nn.Linear(3, 3),
            "depthwise": nn.Conv2d(64, 64, 5, groups=64),
            "grouped": nn.Conv2d(64, 96, 3, groups=2),
        }
    )
    weights = prunable_weights(net, "all")
    assert list(matrices(weights)) == [
        "mlp.fc1.weight", "mlp.fc2.weight", "tiny.weight", "grouped.weight[group 0]", "grouped.weight[group 1]",
    ]  # fmt: skip
    for method in ("seb", "rmt"):
        masks = run(net, method=method, sparsity=0.5)
        assert sum(int(mask.sum()) for mask, _ in masks) == round(0.5 * sum(mask.numel() for mask, _ in masks))


@pytest.mark.parametrize("method", ["magnitude", "uniform", "random", "seb", "rmt"])
@pytest.mark.parametrize("pattern, sparsity", [("2:4", 0.5), ("1:4", 0.75), ("7:10", 0.3)])
def test_n_of_m_is_exact_in_every_group(method, pattern, sparsity):
    net = model((20, 40), (24, 20), (12, 60))
    n, m = map(int, pattern.split(":"))
    for mask, matrix in run(net, method=method, pattern=pattern, sparsity=sparsity):
        assert ((matrix.reshape(len(matrix), -1, m) != 0).sum(-1) == n).all()
        assert torch.equal(matrix == 0, mask)


def test_n_of_m_keeps_the_zeros_it_finds():
    net = model((20, 40))
    (weight,) = prunable_weights(net, "all")
    weight.parameter.data[3, :4] = 0
    ((mask, _),) = run(net, method="magnitude", pattern="2:4")
    groups = mask.reshape(20, -1, 4).sum(-1)
    assert groups[3, 0] == 4 and int(groups.sum()) == 2 * groups.numel() + 2


def test_more_zeros_than_asked_are_refused():
    net = model((20, 40))
    prunable_weights(net, "all")[0].parameter.data[:10] = 0
    with pytest.raises(ValueError, match=r"sparsity 0.3 asks for 240 zeros, but 400 of 800 selected weights are zero"):
        run(net, method="magnitude", sparsity=0.3)
    ((mask, _),) = run(net, method="magnitude", sparsity=0.5)
    assert mask[:10].all() and not mask[10:].any()
