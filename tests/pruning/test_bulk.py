"""Cuts of the spectrum below the edge against NumPy float64, from the definition."""

import numpy as np
import pytest
import torch

from rmtkern.pruning.bulk import cut_bulk, share_kept
from rmtkern.spectrum.fit import fit_spectrum


def planted(shape=(40, 60), spikes=3, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(shape) / shape[1] ** 0.5
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], spikes)))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], spikes)))
    return matrix + (u * np.arange(6.0, 6.0 + spikes)) @ v.T


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("keep", [0.98, 0.7, 0.0])
def test_the_smallest_values_below_the_edge_go(shape, keep):
    matrix = planted(shape)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    below = int((s < fit_spectrum(matrix, edge="tw", beta=0.5).sigma_plus).sum())
    assert below == 37
    gone = int(np.floor((1 - keep) * below + 1e-9))
    wanted = (u[:, : 40 - gone] * s[: 40 - gone]) @ vh[: 40 - gone]
    found, count = cut_bulk(torch.from_numpy(matrix), keep)
    assert count == gone
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)  # two float64 decompositions of norm 9


def test_only_values_that_are_not_zero_count_again():
    first, gone = cut_bulk(torch.from_numpy(planted()).float(), 0.8)
    assert gone == 7  # floor(0.2 * 37)
    second, more = cut_bulk(first, 0.8)
    assert second.dtype == torch.float32 and more == 6  # floor(0.2 * 30)
    values = torch.linalg.svdvals(second.double())
    assert int((values > 1e-6 * values[0]).sum()) == 27


def test_nothing_goes_where_the_law_does_not_fit():
    rng = np.random.default_rng(1)
    heavy = torch.from_numpy(rng.standard_normal((40, 60)) * np.exp(2 * rng.standard_normal((40, 1))))
    assert fit_spectrum(heavy.numpy(), edge="tw", beta=0.5).mu > 0.1
    assert cut_bulk(heavy, 0.5) == (heavy, 0)
    assert cut_bulk(heavy, 0.5, gate=1.0)[1] > 0
    for matrix in (torch.rand(10, 60), torch.zeros(40, 60), torch.from_numpy(planted())):
        same, gone = cut_bulk(matrix, 1.0 if gone_is_possible(matrix) else 0.0)
        assert same is matrix and gone == 0


def gone_is_possible(matrix):
    return matrix.shape == (40, 60) and bool(matrix.any())


def test_the_schedule():
    assert [share_kept(epoch, 200) for epoch in (4, 100, 200, 300)] == [0.98, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(("name", "value"), [("keep", -0.1), ("keep", 1.1), ("gate", 2.0), ("gate", float("nan"))])
def test_bad_numbers(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected a number in \[0, 1\], got {value}"):
        cut_bulk(torch.eye(20), **{"keep": 0.5, name: value})
