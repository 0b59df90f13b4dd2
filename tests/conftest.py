"""Seeds and the default thread count: a test depends on no other test and on no terminal."""

import numpy as np
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--soak-seconds", type=float, default=300, help="length of each slow soak test; default: 300")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
