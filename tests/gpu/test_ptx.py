"""The compiled kernels, executed on the CPU as the real wrappers launch them: right, in bounds, and without a race.

To add a kernel: a layout comes by itself with its name in `test_accuracy.KERNELS`; anything else is one line in TABLE.
"""

import importlib
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from rmtkern.layouts import LAYOUTS
from rmtkern.testing import assert_as_accurate_as_dense
from tests.gpu.test_accuracy import KERNELS, pack, problem

pytestmark = pytest.mark.compiled

SCHEDULES = {80: ("forward", "reverse"), 90: ("forward", "reverse", "lockstep")}
ALIGNED, RAGGED, ROW = (21, 80, 208), (37, 53, 72), (5, 48, 96)  # T, N, K
HALF = (torch.float16, torch.bfloat16)


def op(layout, packed, x, features, bias=None, activation=None, residual=None, scale=None, gated=False):
    """What `linear` calls, whose `supports` refuses tensors that are on no device."""
    importlib.import_module(f"rmtkern.layouts.{layout}.triton")
    parts = list(packed.gpu_tensors())
    return torch.ops.rmtkern.triton_linear(layout, x, features, parts, bias, activation, residual, scale, gated)


def linear(layout, dtype, shape):
    """The whole epilogue, then none."""
    w, x, bias, scale, residual = problem(*shape, dtype, "cpu")
    packed, w = pack(layout, w)
    y = op(layout, packed, x, shape[1], bias, "gelu", residual, scale)
    assert_as_accurate_as_dense(y, x, w, bias, "gelu", residual, scale)


TABLE = {layout: (partial(linear, layout), LAYOUTS[layout].dtypes) for layout in KERNELS}
"""Kernel -> (what launches it and checks the result, for a dtype and (T, N, K); dtypes)."""

every_kernel = pytest.mark.parametrize(
    ("name", "dtype"), [(name, d) for name in TABLE for d in TABLE[name][1]], ids=str
)


def executed(arch, launch):
    """Run `launch` under every schedule of an architecture; nothing may be found."""
    from tests.gpu.ptx.driver import executing

    for schedule in SCHEDULES[arch]:
        with executing(arch, schedule) as report:
            launch()
        assert report.findings == [], schedule
    return report


@every_kernel
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED, ROW], ids=["aligned", "ragged", "row"])
def test_sm_80(name, dtype, shape):
    executed(80, partial(TABLE[name][0], dtype, shape))


@every_kernel
def test_sm_90(name, dtype):
    report = executed(90, partial(TABLE[name][0], dtype, ALIGNED))
    if dtype in HALF and name in ("dense", "bitmask", "spectral"):
        assert all(launch.instructions["wgmma"] for launch in report.launches)
