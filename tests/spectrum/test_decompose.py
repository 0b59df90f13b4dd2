"""Decompositions against LAPACK in float64, on every namespace that runs here."""

import array_api_strict
import numpy as np
import pytest
import torch

from rmtkern.spectrum import decompose
from rmtkern.spectrum.decompose import randomized_svd, singular_values, svd
from rmtkern.spectrum.fit import fit_singular_values


def spiked(rng, shape, spikes, dtype=np.float32):
    """Noise of unit variance plus planted singular values."""
    noise = rng.standard_normal(shape)
    u = np.linalg.qr(rng.standard_normal((shape[0], len(spikes))))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], len(spikes))))[0]
    return (noise + (u * np.asarray(spikes)) @ v.T).astype(dtype)


@pytest.mark.parametrize("shape", [(96, 96), (64, 200), (200, 64)])
@pytest.mark.parametrize("spike", [0.0, 1e2, 1e4, 1e8])
def test_edges_equal_float64_svd(shape, spike, rng):
    batch = np.stack([spiked(rng, shape, [spike]) for _ in range(2)])
    found = singular_values(batch)
    for matrix, values in zip(batch, found, strict=True):
        exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        edge = fit_singular_values(exact, shape).sigma_plus
        assert fit_singular_values(values, shape).sigma_plus == pytest.approx(edge, rel=1e-6)
        assert values[0] == pytest.approx(exact[0], rel=1e-6)


@pytest.mark.parametrize("solver", ["scipy", "numpy"])
@pytest.mark.parametrize(("shape", "reach"), [((200, 200), 11.0), ((64, 64), 5.0), ((192, 768), 14.0)])
def test_many_spikes_near_the_float32_limit(solver, shape, reach, rng, monkeypatch):
    """Both eigensolvers, at the largest spread that still takes the float32 route."""
    if solver == "numpy":
        monkeypatch.setattr(decompose, "_numpy_solver", lambda: np.linalg.eigvalsh)
    else:
        pytest.importorskip("scipy")
    edge = shape[0] ** 0.5 + shape[1] ** 0.5
    matrix = spiked(rng, shape, np.linspace(1.5, reach, 20) * edge)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found = fit_singular_values(singular_values([matrix])[0], shape)
    assert found.sigma_plus == pytest.approx(fit_singular_values(exact, shape).sigma_plus, rel=1e-6)
    assert found.n_spikes == fit_singular_values(exact, shape).n_spikes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_extreme_scales_neither_underflow_nor_overflow(factor, dtype, rng):
    matrix = rng.standard_normal((20, 30))
    exact = np.linalg.svd(matrix, compute_uv=False)
    # float32 route: eigenvalues to eps s_1^2, so values to eps s_1 / s_p of themselves
    np.testing.assert_allclose(singular_values([(matrix * factor).astype(dtype)])[0], exact * factor, rtol=1e-5)


def test_a_batch_equals_a_list_on_every_namespace(rng):
    batch = rng.standard_normal((3, 20, 30))
    expected = singular_values(batch)
    for convert in (list, torch.from_numpy, array_api_strict.asarray):
        np.testing.assert_allclose(singular_values(convert(batch)), expected, rtol=1e-10)


def test_matrices_with_one_shorter_side_are_one_batch(rng):
    """As qkv, proj, fc1 and fc2 of a ViT are; each takes the route that its own spread asks for."""
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
    matrices = [spiked(rng, shape, [spike]) for shape, spike in zip(shapes, (0.0, 1e3, 1e7, 30.0), strict=True)]
    for found, matrix in zip(singular_values(matrices), matrices, strict=True):
        exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        assert found.shape == (32,)
        np.testing.assert_allclose(found, exact, rtol=2e-5)
        np.testing.assert_allclose(found, singular_values([matrix])[0], rtol=1e-6)


def test_rounding_noise_of_a_low_rank_matrix_is_zero(rng):
    matrix = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 80))
    values = singular_values([matrix])[0]
    assert np.count_nonzero(values) == 5
    assert fit_singular_values(values, (60, 80)).flags == ("no_bulk",)


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30)])
def test_svd_recomposes_and_is_orthonormal(shape, rng):
    for matrix in (spiked(rng, shape, [100.0]), np.outer(np.ones(shape[0]), np.ones(shape[1])), np.zeros(shape)):
        u, s, vh = svd(matrix)
        assert np.all(np.diff(s) <= 1e-12 * (1 + s[0]))
        np.testing.assert_allclose((u * s) @ vh, matrix, atol=1e-9 * (1 + s[0]))
        np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-9)
        np.testing.assert_allclose(vh @ vh.T, np.eye(len(s)), atol=1e-9)


def test_svd_of_a_batch_is_that_of_its_matrices(rng):
    # the second has rank 3, so that its small vectors are LAPACK's
    low = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 30))
    batch = np.stack([spiked(rng, (20, 30), [50.0], np.float64), low, np.zeros((20, 30))])
    for convert in NAMESPACES.values():
        u, s, vh = (np.asarray(part) for part in svd(convert(batch)))
        assert u.shape == (3, 20, 20) and s.shape == (3, 20) and vh.shape == (3, 20, 30)
        np.testing.assert_allclose((u * s[:, None]) @ vh, batch, atol=1e-9 * s[0, 0])
        for index, matrix in enumerate(batch):
            np.testing.assert_allclose(s[index], np.linalg.svd(matrix, compute_uv=False), atol=1e-9 * s[0, 0])
            np.testing.assert_allclose(u[index].T @ u[index], np.eye(20), atol=1e-9)
    turned = svd(np.swapaxes(batch, 1, 2))
    np.testing.assert_allclose((turned[0] * turned[1][:, None]) @ turned[2], np.swapaxes(batch, 1, 2), atol=1e-8)


@pytest.mark.parametrize("side", [4, 40])
def test_eigenproblems_of_another_library_through_torch(side, rng, monkeypatch):
    """What CuPy's larger eigenproblems take, here with NumPy in its place."""
    monkeypatch.setattr(decompose, "shares_with_torch", lambda array: True)
    monkeypatch.setattr(decompose, "is_numpy_array", lambda array: False)
    batch = rng.standard_normal((3, side, side + 5))
    expected = np.linalg.svd(batch, compute_uv=False)
    used = []
    through = decompose.through_torch
    monkeypatch.setattr(decompose, "through_torch", lambda name, array: used.append(name) or through(name, array))
    np.testing.assert_allclose(singular_values(batch), expected, rtol=1e-8)
    u, s, vh = svd(batch)
    np.testing.assert_allclose((u * s[:, None]) @ vh, batch, atol=1e-10)
    assert isinstance(u, np.ndarray) and used == ([] if side <= 32 else ["eigvalsh", "eigh"])
    np.testing.assert_allclose(randomized_svd(batch, 2, oversample=side)[1], expected[:, :2], rtol=1e-10)


NAMESPACES = {
    "numpy": lambda a: a,
    "torch": torch.from_numpy,
    "array_api_strict": array_api_strict.asarray,
}


@pytest.mark.parametrize("kind", NAMESPACES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(120, 80), (60, 150)])
def test_randomized_svd_recovers_the_leading_triples(kind, dtype, shape, rng):
    # spikes well above the edge sqrt(120) + sqrt(80) = 19.9
    batch = np.stack([spiked(rng, shape, [90.0, 60.0, 40.0], dtype) for _ in range(3)])
    u, s, vh = (np.asarray(part) for part in randomized_svd(NAMESPACES[kind](batch), 3))
    assert u.dtype == dtype and u.shape == (3, shape[0], 3) and vh.shape == (3, 3, shape[1])
    eps = np.finfo(dtype).eps
    for matrix, left, values, right in zip(batch, u, s, vh, strict=True):
        exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        # power iteration leaves (s_12 / s_3)^(2 * 9), below 1e-4 here, squared in the values
        np.testing.assert_allclose(values, exact[:3], rtol=1e-4)
        np.testing.assert_allclose(left.T @ left, np.eye(3), atol=200 * eps)
        np.testing.assert_allclose(right @ right.T, np.eye(3), atol=200 * eps)
        residual = np.linalg.norm(matrix - (left * values) @ right, 2)
        assert residual == pytest.approx(exact[3], rel=1e-3)


def test_randomized_svd_of_rank_deficient_and_zero_matrices():
    batch = np.stack([np.outer(np.arange(1.0, 31), np.ones(20)), np.zeros((30, 20))])
    u, s, vh = randomized_svd(batch, 5)
    assert s[0, 0] == pytest.approx(np.linalg.norm(batch[0]), rel=1e-10)
    assert np.all(s[0, 1:] < 1e-5 * s[0, 0]) and np.all(s[1] == 0)
    np.testing.assert_allclose((u[0] * s[0]) @ vh[0], batch[0], atol=1e-5 * s[0, 0])
    assert np.all(np.isfinite(u)) and np.all(np.isfinite(vh))


def test_randomized_svd_is_deterministic_and_scales(rng):
    batch = spiked(rng, (50, 40), [60.0])[None]
    first = randomized_svd(batch, 2, seed=3)[1]
    assert np.array_equal(first, randomized_svd(batch, 2, seed=3)[1])
    np.testing.assert_allclose(randomized_svd(batch * np.float32(1e-6), 2, seed=3)[1], first * 1e-6, rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected \[B, N, K\]"):
        singular_values(np.ones((3, 3)))
    with pytest.raises(ValueError, match="matrices with one shorter side, got shapes"):
        singular_values([np.ones((3, 3)), np.ones((4, 4))])
    with pytest.raises(ValueError, match=r"expected \[N, K\]"):
        svd(np.ones(3))
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.3"):
        randomized_svd(np.ones((1, 3, 4)), 4)
    with pytest.raises(TypeError, match="expected a NumPy, CuPy or torch array, got list"):
        singular_values([[1.0]])
