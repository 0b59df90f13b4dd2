"""What waits to be written: bits as NumPy packs them, values bit for bit, and as little of both as is said."""

import hashlib

import numpy as np
import pytest
import torch

from rmtkern.pruning.plan import mask_hash
from rmtkern.pruning.pruned import Pruned


@pytest.mark.parametrize("shape", [(3, 5), (8, 16), (1, 1), (7, 9), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_and_values_come_back(shape, dtype):
    for share in (0.0, 0.5, 1.0):
        mask = torch.rand(shape) < share
        matrix = torch.randn(shape).to(dtype)
        matrix[:1, :1] = -0.0  # a zero with a sign is a value like any other where it stays
        one = Pruned.of(mask, matrix)
        assert one.shape == shape and torch.equal(one.mask(), mask)
        expected = matrix.masked_fill(mask, 0)
        assert torch.equal(one.matrix().signbit(), expected.signbit()) and torch.equal(one.matrix(), expected)
        assert one.matrix().dtype == dtype and len(one.values) == int((~mask).sum())
        assert np.array_equal(one.bits.numpy(), np.packbits(mask.numpy()))
        assert hashlib.sha256(one.bits.numpy().tobytes()).hexdigest() == mask_hash(mask)


def test_a_mask_alone_and_views():
    mask = (torch.rand(12, 7) < 0.5).t()
    assert torch.equal(Pruned.of(mask).mask(), mask) and Pruned.of(mask).matrix() is None
    matrix = torch.randn(12, 7).t()
    assert torch.equal(Pruned.of(mask, matrix).matrix(), matrix.masked_fill(mask, 0))
    half = torch.arange(1024 * 1024).reshape(1024, 1024) % 2 == 0
    one = Pruned.of(half, torch.randn(1024, 1024))
    assert one.bits.nbytes + one.values.untyped_storage().nbytes() == (1 / 32 + 1 / 2) * 4 * 2**20
