"""Executes one launch: a kernel's PTX, a grid and arguments, block by block group, and reports what came of it."""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from tests.gpu.ptx.findings import Launch, Report
from tests.gpu.ptx.global_memory import GlobalMemory
from tests.gpu.ptx.instructions import build
from tests.gpu.ptx.machine import Machine
from tests.gpu.ptx.moment import Moment
from tests.gpu.ptx.tensor_map import MappedTensor, TensorMap
from tests.gpu.ptx.text import parse

__all__ = ["execute", "without"]

_parsed = functools.lru_cache(maxsize=8)(parse)
TOGETHER = 8192  # threads that a machine runs at most, unless one block has more


def execute(
    ptx: str,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Any],
    shared_bytes: int = 0,
    schedule: str = "forward",
    report: Report | None = None,
) -> Report:
    """Run a kernel on the CPU; tensors are changed in place.

    Args:
        ptx: a module with one kernel.
        grid: blocks in x, y, z.
        arguments: name -> CPU tensor, TensorMap or number, for the parameters in order; those that follow are 0.
        shared_bytes: dynamic shared memory of a block.
        schedule: "forward", "reverse" or "lockstep" (machine.py).
        report: to add to.

    Returns:
        The report, with this launch and the findings.

    Raises:
        PtxError: the kernel cannot be executed: out of bounds, misaligned, unknown instruction, deadlock.
    """
    kernel = _parsed(ptx)
    report = Report() if report is None else report
    moment = Moment(kernel, report)
    maps = {name: value for name, value in arguments.items() if isinstance(value, TensorMap)}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    memory = GlobalMemory(moment, tensors | {name: value.tensor for name, value in maps.items()})
    if len(arguments) > len(kernel.params):
        raise ValueError(f"{kernel.name} has {len(kernel.params)} parameters, got {len(arguments)} arguments")
    values = [memory.address.get(name, value) for name, value in arguments.items()]
    for i, name in enumerate(arguments):
        if name in maps:
            values[i] = MappedTensor(maps[name], values[i])
    names = [name for name, _ in kernel.params]
    params = dict(zip(names, values + [0] * (len(names) - len(values)), strict=True))
    launch = Launch(kernel.name, grid)
    report.launches.append(launch)
    blocks = np.array([(x, y, z) for z, y, x in itertools.product(*(range(size) for size in reversed(grid)))])
    together = max(1, TOGETHER // int(np.prod(kernel.threads)))
    for first in range(0, len(blocks), together):
        some = blocks[first : first + together]
        machine = Machine(moment, some, grid, shared_bytes, params, memory, schedule, build)
        launch.instructions += machine.run(first)
    launch.traffic = memory.finish()
    return report


def without(ptx: str, pattern: str, number: int = 0) -> str:
    """PTX with something taken out: the `number`-th match of a regular expression, or the first group of that match.

    Raises:
        ValueError: there is no such match.
    """
    found = list(re.finditer(pattern, ptx))
    if number >= len(found):
        raise ValueError(f"{pattern!r} occurs {len(found)} times, there is no number {number}")
    begin, end = found[number].span(1 if found[number].re.groups else 0)
    return ptx[:begin] + ptx[end:]
