"""Spectra of tensors on a device, by CuPy in torch's memory and by torch; tests/spectrum tests the array code."""

import copy

import numpy as np
import pytest
import torch

from rmtkern import analyze, prune_
from rmtkern.arrays import as_computable, computing, returned
from rmtkern.spectrum.fit import fit_spectra, spike_vectors
from tests.spectrum.test_decompose import spiked


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["cupy", "torch"])
def test_spectra_on_a_device(route, rng, monkeypatch):
    """Both libraries give NumPy's results for tensors on a GPU, and torch tensors back."""
    if route == "cupy":
        pytest.importorskip("cupy")
    monkeypatch.setenv("RMTKERN_SPECTRA", route)
    shapes = {"qkv": (288, 96), "proj": (96, 96), "fc1": (384, 96), "fc2": (96, 384)}
    host = {name: spiked(rng, shape, [90.0, 70.0]) for name, shape in shapes.items()}
    there = {name: torch.from_numpy(matrix).cuda() for name, matrix in host.items()}
    expected, found = fit_spectra(host), fit_spectra(there)
    for name, fit in found.items():
        assert fit.sigma_plus == pytest.approx(expected[name].sigma_plus, rel=1e-5)
        assert fit.n_spikes == expected[name].n_spikes == 2
    for name, (u, s, vh) in spike_vectors(there, found).items():
        assert all(part.is_cuda for part in (u, s, vh))
        exact = np.linalg.svd(host[name], full_matrices=False)
        np.testing.assert_allclose(s.cpu(), exact[1][:2], rtol=1e-4)
        assert np.all(np.abs(np.sum(u.cpu().numpy() * exact[0][:, :2], axis=0)) > 0.999)
        assert vh.shape == (2, shapes[name][1])


@pytest.mark.gpu
def test_cupy_shares_the_memory_of_torch(monkeypatch):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setenv("RMTKERN_SPECTRA", "cupy")
    tensor = torch.randn(64, 64, device="cuda")
    with computing([tensor]):
        view = as_computable(tensor)
        assert isinstance(view, cupy.ndarray) and view.data.ptr == tensor.data_ptr()
        assert cupy.cuda.get_current_stream().ptr == torch.cuda.current_stream().cuda_stream
        held = torch.cuda.memory_allocated()
        more = cupy.empty(2**20, dtype=cupy.uint8)
        assert torch.cuda.memory_allocated() >= held + 2**20
        back = returned(view + 1, tensor)
        del more
    assert torch.equal(back, tensor + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["cupy", "torch"])
def test_models_on_a_device(route, monkeypatch):
    """Fits and masks of a model there are those of the model here; the step on singular vectors rounds in float32."""
    if route == "cupy":
        pytest.importorskip("cupy")
    monkeypatch.setenv("RMTKERN_SPECTRA", route)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(3)), torch.nn.Linear(96, 384))
    there = copy.deepcopy(model).cuda()
    for name, fit in analyze(there).items():
        assert fit.sigma_plus == pytest.approx(analyze(model)[name].sigma_plus, rel=1e-5)
    for options in ({"method": "seb"}, {"method": "uniform", "haar": 0.5}):
        one, other = copy.deepcopy(model), copy.deepcopy(there)
        plan, again = (prune_(m, 0.5, targets="all", **options) for m in (one, other))
        assert plan.prunable == again.prunable
        for here, far in zip(one.parameters(), other.parameters(), strict=True):
            same = (here == 0) == (far == 0).cpu()
            assert float(same.float().mean()) > 0.999
            torch.testing.assert_close(far.cpu()[same], here[same], rtol=1e-3, atol=1e-5)
