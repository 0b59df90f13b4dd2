"""Skips what this process or machine cannot run, with the reason; repairs the interpreter where it is used."""

import os

import pytest
import torch


def interpreted() -> bool:
    """Whether @triton.jit functions of this process run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if interpreted():
        from tests.gpu import interpreter

        interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_device = pytest.mark.skip(reason="no CUDA device: run on a machine with a GPU")
    not_interpreted = pytest.mark.skip(reason="needs TRITON_INTERPRET=1: run make gpu-static")
    is_interpreted = pytest.mark.skip(reason="needs Triton's compiler, which TRITON_INTERPRET=1 replaces")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_device)
        if item.get_closest_marker("interpreted") and not interpreted():
            item.add_marker(not_interpreted)
        if item.get_closest_marker("compiled") and interpreted():
            item.add_marker(is_interpreted)
