"""Skips what this process or machine cannot run, with the reason; repairs the interpreter where it is used."""

import gc
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def interpreted() -> bool:
    """Whether @triton.jit functions of this process run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if interpreted():
        from tests.gpu import interpreter

        interpreter.install()


def pytest_report_header() -> str:
    if not torch.cuda.is_available():
        return "gpu: no CUDA device"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    memory = f"{free:.0f} of {total:.0f} GiB free"
    return f"gpu: {name}, compute capability {major}.{minor}, {memory}, torch {torch.__version__}"


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("-m") in ("interpreted", "compiled"):
        gc.collect()
        gc.freeze()  # what was imported stays: a quarter of these tests' time went into looking at it again


@pytest.hookimpl(trylast=True)  # of what -m and -k leave, shards take equal parts
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := os.environ.get("RMTKERN_GPU_SHARD"):  # such as 2/8: every eighth test, from the second one
        first, _, step = shard.partition("/")
        here = [item for item in items if item.path.is_relative_to(HERE)]
        mine = set(here[int(first) - 1 :: int(step)])
        config.hook.pytest_deselected(items=[item for item in here if item not in mine])
        items[:] = [item for item in items if item in mine or item not in here]
    no_device = pytest.mark.skip(reason="no CUDA device: run on a machine with a GPU")
    on_device = pytest.mark.skip(reason="TRITON_INTERPRET=1 replaces the device: unset it")
    not_interpreted = pytest.mark.skip(reason="needs TRITON_INTERPRET=1: run make gpu-static")
    is_interpreted = pytest.mark.skip(reason="needs Triton's compiler, which TRITON_INTERPRET=1 replaces")
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(no_device)
            elif interpreted():
                item.add_marker(on_device)
        if item.get_closest_marker("interpreted") and not interpreted():
            item.add_marker(not_interpreted)
        if item.get_closest_marker("compiled") and interpreted():
            item.add_marker(is_interpreted)
