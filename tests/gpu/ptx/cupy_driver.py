"""What stands in CuPy's place: RawModule compiles by NVRTC as ever, and what is launched is executed on the CPU.

Needs no triton and no cupy. Source, options, grid, block, shared memory and arguments are those of the code that
launches; tensors are on the CPU and are changed in place.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.gpu import nvrtc
from tests.gpu.ptx.findings import Report
from tests.gpu.ptx.launch import execute
from tests.gpu.ptx.text import parse

__all__ = ["executing_cuda", "ptx_of", "with_cupy"]

Edit = Callable[[str], str]
STATIC = 48 * 1024  # bytes of dynamic shared memory that a kernel may use without having asked


@functools.cache
def ptx_of(code: str, arch: str, options: tuple[str, ...]) -> str:
    """PTX of CUDA C++."""
    return nvrtc.compile_to("PTX", code, arch, options).rstrip(b"\0").decode()


class Kernel:
    """As cupy.RawKernel, of a module."""

    def __init__(self, module: "RawModule", name: str) -> None:
        self.module, self.name = module, name
        self.max_dynamic_shared_size_bytes = STATIC

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int) -> None:
        driver = self.module.driver
        ptx = ptx_of(self.module.code, driver.arch, self.module.options)
        kernel = parse(ptx)
        assert kernel.name == self.name and kernel.threads == (*block, 1, 1)[:3]
        assert len(args) == len(kernel.params) and shared_mem <= self.max_dynamic_shared_size_bytes
        if driver.edit is not None:
            ptx = driver.edit(ptx)
        x, y, z = grid
        given = dict(zip(driver.names, args, strict=True))
        execute(ptx, (x, y, z), given, shared_mem, driver.schedule, driver.report)


class RawModule:
    """As cupy.RawModule."""

    def __init__(self, driver: "Driver", code: str, options: tuple[str, ...]) -> None:
        self.driver, self.code, self.options = driver, code, options

    def get_function(self, name: str) -> Kernel:
        """A kernel of the module."""
        return Kernel(self, name)


class Driver:
    """Args: architecture such as "sm_80"; schedule; what changes the PTX; the parameters' names."""

    def __init__(self, arch: str, schedule: str, edit: Edit | None, names: Sequence[str]) -> None:
        self.arch, self.schedule, self.edit, self.names = arch, schedule, edit, names
        self.report = Report()


@contextmanager
def with_cupy(stand_in: Any, module: str) -> Iterator[ModuleType]:
    """The module, imported with something in cupy's place; as it was afterwards."""
    before = {name: sys.modules.pop(name, None) for name in ("cupy", module)}
    sys.modules["cupy"] = stand_in
    try:
        yield importlib.import_module(module)
    finally:
        for name, was in before.items():
            sys.modules.pop(name, None)
            if was is not None:
                sys.modules[name] = was


@contextmanager
def executing_cuda(arch: str, schedule: str = "forward", edit: Edit | None = None) -> Iterator[Report]:
    """Within it, rmtkern::sparse_product on CPU tensors is executed; gives the report that launches add to.

    Args:
        arch: such as "sm_80".
        schedule: "forward", "reverse" or "lockstep".
        edit: changes the PTX before it is executed, to see that a fault is found.
    """
    from rmtkern.layouts.nofm.sparse_product import ARGUMENTS

    driver = Driver(arch, schedule, edit, ARGUMENTS)
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True),
        RawModule=lambda code, options: RawModule(driver, code, options),
    )
    with (
        with_cupy(cupy, "rmtkern.layouts.nofm.cuda") as module,
        patch.object(module, "_torchs_stream", lambda device: nullcontext()),
        patch.object(module, "_argument", lambda value: 0 if value is None else value),
    ):
        yield driver.report
