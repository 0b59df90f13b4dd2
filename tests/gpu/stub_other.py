"""Calls the real wrappers of sparsify and masked_linear for an architecture on the stub driver and prints the launches.

Run as a program, as stub_driver.py is: Triton caches by device, so one architecture for each process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import driver

from tests.gpu.stub_driver import StubDriver


def main(arch: int) -> None:
    """Print {what was called: its launches} as JSON."""
    stub = StubDriver(arch)
    driver.set_active(stub)
    from rmtkern.layouts import triton_masked
    from rmtkern.spectrum import triton_sparsify

    found: dict[str, list[dict[str, Any]]] = {}

    def record(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        stub.launches.clear()
        function(*args, **options)
        found[name] = [dict(launch) for launch in stub.launches]

    for n, k, dtype in ((304, 192, torch.float32), (192, 300, torch.float32), (192, 300, torch.bfloat16)):
        r = min(n, k)
        s = torch.ones(2, r)
        factors = (torch.ones(2, n, r), s, torch.ones(2, r, k), s, s)
        name = f"{n}x{k} {dtype}"
        record(f"threshold {name}", triton_sparsify.launch, *factors, threshold=torch.ones(2), zeros=None, dtype=dtype)
        none = torch.zeros(1, dtype=torch.int64)  # nothing runs, so that no histogram has an entry to find
        record(f"zeros {name}", triton_sparsify.launch, *factors, threshold=None, zeros=none, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16):
        x, w, row = torch.ones(300, 64, dtype=dtype), torch.ones(80, 64, dtype=dtype), torch.ones(80, dtype=dtype)
        threshold, grad = torch.tensor(0.5), torch.ones(300, 80, dtype=dtype)
        for activation in (None, "gelu"):
            name, keep, needed = f"{activation} {dtype}", activation is not None, (True, True, True)
            record(f"forward {name}", triton_masked.forward, x, w, threshold, row, activation, keep)
            record(f"backward {name}", triton_masked.backward, grad, grad, x, w, threshold, activation, needed)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
