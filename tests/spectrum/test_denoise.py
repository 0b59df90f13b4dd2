"""Singular-vector sparsification, shrinkage, truncation and split; test vectors worked out by hand."""

import numpy as np
import pytest
import torch

from rmtkern.spectrum import denoise
from tests.spectrum.test_decompose import spiked


def test_threshold_rule_against_a_plain_loop(rng):
    weight = spiked(rng, (50, 30), [40.0], np.float64)
    edge, theta = 50**0.5 + 30**0.5, 0.4
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    expected = np.zeros_like(weight)
    for i in range(30):
        limit = theta * max(1 / 750, max(0.0, 1 - s[i] / edge) ** 30)
        left = np.where(np.abs(u[:, i]) < limit, 0, u[:, i])
        right = np.where(np.abs(vh[i]) < limit, 0, vh[i])
        expected += s[i] * np.outer(left, right)
    found = denoise.sparsify_singular_vectors(weight, edge, theta)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.linalg.norm(found - weight) > 1e-3  # it did something


def test_haar_rule_against_a_plain_loop(rng):
    weight = spiked(rng, (40, 60), [60.0], np.float64)
    edge = 40**0.5 + 60**0.5
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    expected = np.zeros_like(weight)
    for i in range(40):
        g = 0.5 * 1.2 * (1 - s[i] / edge) ** 3 if s[i] < edge else 0.0
        left = np.where(np.abs(u[:, i]) < g / 40**0.5, 0, u[:, i])
        right = np.where(np.abs(vh[i]) < g / 60**0.5, 0, vh[i])
        expected += s[i] * np.outer(left, right)
    found = denoise.sparsify_haar(weight, edge, z=0.5, scale=1.2)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_batch_is_its_matrices(rng):
    batch = np.stack([spiked(rng, (20, 30), [spike], np.float64) for spike in (0.0, 40.0, 1e4)])
    edges = [8.0, 10.0, 12.0]
    for kind in (np.asarray, torch.from_numpy):
        found = denoise.sparsify_haar(kind(batch), edges, scale=[0.5, 1.0, 2.0])
        legacy = denoise.sparsify_singular_vectors(kind(batch), edges, 0.3)
        assert found.shape == legacy.shape == (3, 20, 30) and type(found) is type(kind(batch))
        for index, (edge, scale) in enumerate(zip(edges, (0.5, 1.0, 2.0), strict=True)):
            one = denoise.sparsify_haar(batch[index], edge, scale=scale)
            np.testing.assert_allclose(np.asarray(found[index]), one, atol=1e-9 * np.abs(one).max())
            one = denoise.sparsify_singular_vectors(batch[index], edge, 0.3)
            np.testing.assert_allclose(np.asarray(legacy[index]), one, atol=1e-9 * np.abs(one).max())
    with pytest.raises(ValueError, match="scale: expected one number or one for each of 3 matrices, got 2"):
        denoise.sparsify_haar(batch, edges, scale=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"expected a matrix \[N, K\] or a batch \[B, N, K\], got shape \(20,\)"):
        denoise.sparsify_haar(batch[0, :, 0], 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_that_stay_tensors_are_recomposed_by_sparsify(dtype, rng, monkeypatch):
    """As on a GPU, where torch computes: the same matrix to the rounding of float32, in the dtype of the weight."""
    weight = torch.from_numpy(spiked(rng, (20, 30), [40.0], np.float64)).to(dtype)
    expected = denoise.sparsify_haar(weight, 10.0), denoise.sparsify_singular_vectors(weight, 10.0, 0.3)
    calls = []
    monkeypatch.setattr(denoise, "as_computable", lambda w, name: w.float() if dtype == torch.bfloat16 else w)
    monkeypatch.setattr("rmtkern.spectrum.decompose.as_computable", lambda array: array)
    kernel = denoise.sparsify
    monkeypatch.setattr(denoise, "sparsify", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    found = denoise.sparsify_haar(weight, 10.0), denoise.sparsify_singular_vectors(weight, 10.0, 0.3)
    assert len(calls) == (0 if dtype == torch.float64 else 2)
    for one, wanted in zip(found, expected, strict=True):
        assert one.dtype == dtype
        rtol = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(one, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def test_haar_coordinates_are_gaussian(rng):
    """T10: singular vectors of noise have entries N(0, 1/N); max |u| is about sqrt(2 log(2N) / N)."""
    size = 384
    u = np.linalg.svd(rng.standard_normal((size, size)))[0]
    assert np.std(u) * size**0.5 == pytest.approx(1.0, abs=1e-4)  # exact but for the mean
    assert np.mean(np.abs(u) * size**0.5 < 0.5) == pytest.approx(0.3829, abs=0.005)  # P(|N(0,1)| < 1/2)
    largest = np.abs(u).max(axis=0)
    # the leading order; at this size the mean of the maximum is 13 % below it (log log corrections)
    assert 0.8 < np.mean(largest) / (2 * np.log(2 * size) / size) ** 0.5 < 1.0


def test_perturbation_is_bounded(rng):
    weight, edge, theta = rng.standard_normal((40, 40)), 2 * 40**0.5, 0.05
    u, s, vh = np.linalg.svd(weight)
    limit = theta * np.maximum(1 / 750, np.maximum(0, 1 - s / edge) ** 30)
    du = np.linalg.norm(np.where(np.abs(u) < limit, u, 0), axis=0)
    dv = np.linalg.norm(np.where(np.abs(vh) < limit[:, None], vh, 0), axis=1)
    moved = np.linalg.norm(denoise.sparsify_singular_vectors(weight, edge, theta) - weight)
    assert moved <= np.sum(s * (du + dv + du * dv)) + 1e-9


def test_debias_and_shrink_vectors():
    # c = 1/4, unit noise: planted theta, observed y, optimal eta(y)
    shape, sigma2 = (100, 400), 1 / 400
    planted = np.array([0.8, 1.0, 1.5, 2.0])
    observed = np.array([1.510174, 1.581139, 1.900292, 2.304886])
    eta = np.array([0.165130, 0.474342, 1.125558, 1.708327])
    np.testing.assert_allclose(denoise.debias_singular_values(observed, shape, sigma2), planted, atol=2e-5)
    np.testing.assert_allclose(denoise.shrink_singular_values(observed, shape, sigma2), eta, atol=2e-5)
    for function in (denoise.debias_singular_values, denoise.shrink_singular_values):
        assert function([1.5, 0.3, 0.0], shape, sigma2).tolist() == [0, 0, 0]  # at or below 1 + sqrt c
    # square: the inverse of theta + 1/theta
    np.testing.assert_allclose(denoise.debias_singular_values([2.5], (50, 50), 1 / 50), [2.0], rtol=1e-12)
    # Gavish & Donoho: 4 / sqrt 3 for square matrices
    assert denoise.hard_threshold((50, 50), 1 / 50) == pytest.approx(4 / 3**0.5)


@pytest.mark.parametrize("kind", ["frobenius", "debias", "hard"])
def test_shrink_recovers_a_planted_matrix(kind, rng):
    planted = np.outer(*(v / np.linalg.norm(v) for v in (rng.standard_normal(200), rng.standard_normal(300)))) * 120.0
    noisy = planted + rng.standard_normal((200, 300))
    clean = denoise.shrink(noisy, 1.0, kind)
    assert np.linalg.norm(clean - planted) < 0.1 * np.linalg.norm(noisy - planted)


def test_truncate_is_the_nearest_of_that_rank(rng):
    weight = rng.standard_normal((20, 30))
    s = np.linalg.svd(weight, compute_uv=False)
    for rank in (0, 1, 7, 20):
        found = denoise.truncate(weight, rank)
        assert np.linalg.norm(weight - found) == pytest.approx(np.linalg.norm(s[rank:]), abs=1e-9)


def test_split_keeps_spikes_and_counts(rng):
    weight = spiked(rng, (200, 100), [80.0, 60.0], np.float64)
    edge = 200**0.5 + 100**0.5
    b, a = denoise.split(weight, edge, 0.3)
    assert b.shape == (200, int(98 * 0.3) + 2) and a.shape == (31, 100)
    s = np.linalg.svd(weight, compute_uv=False)
    assert np.linalg.norm(weight - b @ a, 2) == pytest.approx(s[31], rel=1e-6)
    np.testing.assert_allclose(np.sum(b * b, axis=0), s[:31], rtol=1e-6)  # both factors carry sqrt(S)
    assert denoise.split(weight, edge, 1.0) is None  # 300 * 100 >= 200 * 100
    assert denoise.split(weight, edge, 0.0, min_dim=5)[0].shape == (200, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kind_and_dtype_are_kept(dtype, rng):
    weight = torch.from_numpy(rng.standard_normal((30, 20))).to(dtype)
    for found in (
        denoise.sparsify_haar(weight, 10.0),
        denoise.sparsify_singular_vectors(weight, 10.0, 0.1),
        denoise.shrink(weight, 0.5),
        denoise.truncate(weight, 3),
        *denoise.split(weight, 10.0, 0.1),
    ):
        assert isinstance(found, torch.Tensor) and found.dtype == dtype


@pytest.mark.parametrize("cycle, mu, published", [
    (1, 0.01, 4.2e-5), (1, 0.05, 1.2e-5), (10, 0.01, 2.9e-4), (10, 0.05, 1.7e-4), (10, 0.2, 7e-5), (30, 0.2, 3.6e-4),
])  # fmt: skip
def test_legacy_shrinkage_values(cycle, mu, published):
    """What AdamW really does there is in the paper's experiment T14; these are its published amounts, two digits."""
    assert denoise.legacy_shrinkage(cycle, mu) == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize("cycle, mu", [(0, 0.1), (1, -0.1), (1, 1.1)])
def test_legacy_shrinkage_refuses(cycle, mu):
    with pytest.raises(ValueError, match="need cycle >= 1 and mu in"):
        denoise.legacy_shrinkage(cycle, mu)


@pytest.mark.parametrize("mu", [0.0, 0.01, 0.2])
def test_the_legacy_stage_is_what_adamw_does(mu):
    weight = torch.nn.Parameter(torch.tensor([[0.9, -0.02, 0.3], [-2.0, 5e-6, 0.0]], dtype=torch.float64))
    start, h = weight.detach().clone(), 1 / (1 + 1e4 * mu)
    optimiser = torch.optim.AdamW([weight], lr=5e-8, weight_decay=2e-7)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5000)
    for _ in range(5000):
        optimiser.zero_grad()
        norm = torch.linalg.vector_norm(weight)
        (5e-7 * weight.abs().sum() + 2e-7 * weight.square().sum() + 1e-6 * h * norm).backward()
        weight.grad *= h * (start != 0)
        optimiser.step()
        schedule.step()
    found = denoise.legacy_stage(start, 1, mu)
    far = start.abs() > 1e-3
    shrunk, wanted = start.abs() - found.abs(), start.abs() - weight.detach().abs()
    torch.testing.assert_close(shrunk[far], wanted[far], rtol=2e-3, atol=0)
    spread = float(shrunk[far].max() / shrunk[far].min())
    assert spread > 1.01 or mu == 0  # larger entries shrink more, as one soft threshold does not
    assert found[1, 1] <= weight[1, 1].abs() + 1e-7 and found[1, 2] == 0
    assert float(shrunk[0, 1]) == pytest.approx(denoise.legacy_shrinkage(1, mu), rel=0.03)
    with pytest.raises(ValueError, match="need cycle >= 1, mu in"):
        denoise.legacy_stage(start, 0, mu)
    assert not denoise.legacy_stage(start * 0, 1, mu).any()


def test_legacy_theta_values():
    assert denoise.legacy_theta(2, (768, 768)) == pytest.approx(0.414, abs=1e-3)
    assert denoise.legacy_theta(34, (3072, 768)) == pytest.approx(3.12, abs=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: denoise.sparsify_haar(w, 0.0), "sigma_plus must be a positive"),
        (lambda w: denoise.sparsify_haar(w, 1.0, z=-1), "need z >= 0"),
        (lambda w: denoise.sparsify_singular_vectors(w, 1.0, -1.0), "need theta >= 0"),
        (lambda w: denoise.shrink(w, 1.0, "soft"), "unknown shrinkage 'soft'"),
        (lambda w: denoise.shrink(w, 0.0), "sigma2 must be a positive"),
        (lambda w: denoise.truncate(w, 9), r"rank must lie in 0\.\.3"),
        (lambda w: denoise.split(w, 1.0, 2.0), "need ratio in"),
        (lambda w: denoise.truncate(w * np.nan, 1), "W has NaN or Inf"),
        (lambda w: denoise.sparsify_haar(w[0], 1.0), "expected a matrix"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.eye(3))


def test_whole_numbers_are_refused():
    """The result would be rounded back to them."""
    for call in (denoise.truncate, denoise.shrink, denoise.sparsify_haar):
        with pytest.raises(TypeError, match=r"W: expected floating point, .* got int64; convert it"):
            call(np.eye(3, dtype=np.int64), 1)
