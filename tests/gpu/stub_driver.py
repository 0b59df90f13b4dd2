"""A Triton driver without a device: kernel[grid](...) runs its normal path, compiles, and the launch is recorded.

Run as a program it calls the real wrappers of some layouts for one architecture (Triton caches by device, so one per
process) and prints what each launched, as JSON: `python -m tests.gpu.stub_driver 80 dense block:r=32,c=32`.
"""

import json
import os
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class _Binary:
    """Stands for a loaded kernel and for the device's properties."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 108, "max_num_regs": 65536, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return (0, 0, 0, 0, 1024)

    @staticmethod
    def unload_module(module: Any) -> None:
        return None


class StubDriver(DriverBase):
    """Compiles for `arch` and records (kernel, grid, warps, shared memory) of each launch."""

    utils = _Binary()

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[dict[str, Any]] = []

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Autotuning here: every config is launched once and equally fast."""

        def benchmark(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]

        return benchmark

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def clear_cache(self, cache: Any) -> None:
        return None

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls instead of a compiled launcher."""

        def launch(x: int, y: int, z: int, stream: int, function: int, *_: Any, **__: Any) -> None:
            self.launches.append(
                {"name": metadata.name, "grid": [x, y, z], "warps": metadata.num_warps, "shared": metadata.shared}
            )

        return launch


def call(layout: str, params: dict[str, int]) -> None:
    """Call the op of a layout with and without its optional arguments, and once with tuning."""
    from rmtkern.layouts import LAYOUTS
    from rmtkern.testing import random_sparse

    __import__(f"rmtkern.layouts.{layout}.triton")
    nofm = (params["n"], params["m"]) if "n" in params else None
    for dtype in (torch.bfloat16, torch.float32):
        w = LAYOUTS[layout].pack(random_sparse(80, 64, 0.5, nofm=nofm).to(dtype), **params)
        parts = list(w.gpu_tensors())
        row = torch.ones(80, dtype=dtype)
        x, residual, half = (torch.ones(300, columns, dtype=dtype) for columns in (64, 80, 40))
        torch.ops.rmtkern.triton_linear(layout, x, 80, parts, row, "gelu", residual, row)
        torch.ops.rmtkern.triton_linear(layout, x[:5], 80, parts, None, None, None, None)
        torch.ops.rmtkern.triton_linear(layout, x, 40, parts, row, "silu", half, row[:40], True)
    os.environ["RMTKERN_AUTOTUNE"] = "1"
    torch.ops.rmtkern.triton_linear(layout, x, 80, parts, None, None, None, None)
    del os.environ["RMTKERN_AUTOTUNE"]


def main(arch: int, layouts: list[str]) -> None:
    """Print {layout: its launches}; a layout is its name, or name:param=number,..."""
    stub = StubDriver(arch)
    driver.set_active(stub)
    found = {}
    for layout in layouts:
        name, _, given = layout.partition(":")
        stub.launches = []
        call(name, {key: int(value) for key, _, value in (one.partition("=") for one in given.split(",") if one)})
        found[layout] = stub.launches
    json.dump({"triton": triton.__version__, "launches": found}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
