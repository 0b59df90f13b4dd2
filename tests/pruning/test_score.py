"""Scores against their formulas in float64."""

import numpy as np
import pytest
import torch

from rmtkern.pruning.score import CALIBRATED, SCORES


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitude(dtype):
    matrix = torch.randn(5, 7).to(dtype)
    score = SCORES["magnitude"](matrix, None, generator())
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), np.abs(matrix.double().numpy()))


def test_activation_uses_the_moments_of_each_block_of_rows():
    matrix = torch.randn(6, 4)
    moments = torch.rand(3, 4, dtype=torch.float64)
    score = SCORES["activation"](matrix, moments, generator())
    expected = np.abs(matrix.double().numpy()) * np.sqrt(np.repeat(moments.numpy(), 2, axis=0))
    np.testing.assert_allclose(score, expected, rtol=1e-6)  # one float32 product and a rounded square root


def test_activation_needs_moments():
    with pytest.raises(
        ValueError, match="score 'activation' needs the second moments of the inputs; pass calibration="
    ):
        SCORES["activation"](torch.ones(2, 2), None, generator())


def test_random_is_seeded_and_ignores_the_values():
    first, again = (SCORES["random"](torch.full((4, 4), value), None, generator(3)) for value in (1.0, 9.0))
    assert torch.equal(first, again)
    assert not torch.equal(first, SCORES["random"](torch.ones(4, 4), None, generator(4)))
    assert set(CALIBRATED) <= set(SCORES)
