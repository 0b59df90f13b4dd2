"""The compiled kernels, executed on the CPU as the real wrappers launch them: right, in bounds, and without a race.

To add a kernel: one line in TABLE.
"""

import importlib
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch

from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.pairs import interleave
from rmtkern.pruning.smallest import take_smallest
from rmtkern.spectrum.sparsify import sparsify
from rmtkern.testing import assert_as_accurate_as_dense
from tests.gpu import test_masked_linear, test_sparsify
from tests.gpu.test_accuracy import pack, pair, problem

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.compiled

ALL = (torch.float32, torch.bfloat16, torch.float16)
HALF = ALL[1:]
SCHEDULES = {80: ("forward", "reverse"), 90: ("forward", "reverse", "lockstep")}
# T, N, K: each class of tiles (gpu_configs.py), none filled whole
ALIGNED, RAGGED, ROW, BATCH = (21, 80, 208), (37, 53, 72), (5, 48, 96), (520, 80, 80)


def op(packed, x, features, bias=None, activation=None, residual=None, scale=None, gated=False):
    """What `linear` calls, whose `supports` refuses tensors that are on no device."""
    importlib.import_module(f"rmtkern.layouts.{packed.layout}.triton")
    parts = list(packed.gpu_tensors())
    return torch.ops.rmtkern.triton_linear(packed.layout, x, features, parts, bias, activation, residual, scale, gated)


def linear(layout, dtype, shape):
    """The op of a layout with its whole epilogue."""
    w, x, bias, scale, residual = problem(*shape, dtype, "cpu")
    packed, w = pack(layout, w)
    y = op(packed, x, shape[1], bias, "gelu", residual, scale)
    assert_as_accurate_as_dense(y, x, w, bias, "gelu", residual, scale)


def gated(layout, dtype, shape):
    """The same of a gate-up pair, which has N rows together."""
    t, n, k = shape
    features = n // 2
    x, packed, gate, up, biases = pair(layout, t, features, k, dtype, "cpu")
    *_, scale, residual = problem(t, features, k, dtype, "cpu")
    y = op(packed, x, features, interleave(*biases), "silu", residual, scale, True)
    assert_as_accurate_as_dense(y, x, gate, biases[0], "silu", residual, scale, (up, biases[1]))


def masked(dtype, shape):
    """masked_linear, forward and backward."""
    with patch("rmtkern.masked_linear._reason_against_triton", lambda x, w: None):
        test_masked_linear.check(*test_masked_linear.problem(*shape, dtype, "cpu"), "gelu")


def sparsified(dtype, shape):
    """sparsify of two layers: recomposed, by a threshold, and with a fixed number of zeros."""
    parts = test_sparsify.factors(2, *shape[1:], "cpu")
    with patch("rmtkern.spectrum.sparsify._reason_against_kernel", lambda *_: None):
        whole = sparsify(*parts, dtype=dtype, backend="triton").weight
        exact = sparsify(*(part.double() for part in parts), backend="reference").weight
        eps = torch.finfo(dtype).eps
        assert float((whole.double() - exact).abs().max()) <= 4 * eps * float(exact.abs().max())
        for options, gone in (
            ({"threshold": 0.5}, whole.abs().float() < 0.5),
            ({"zeros": 1000}, torch.stack(list(take_smallest([layer.abs().float() for layer in whole], 1000)))),
        ):
            found = sparsify(*parts, dtype=dtype, backend="triton", **options)
            assert torch.equal(found.weight, whole.masked_fill(gone, 0))
            test_sparsify.check_bits(found)


BOTH, EVERY = ALL[:2], (ALIGNED, RAGGED, ROW)
TABLE = {
    "dense": (partial(linear, "dense"), ALL, EVERY),
    "dense gated": (partial(gated, "dense"), ALL[1:2], [ALIGNED]),
    "bitmask": (partial(linear, "bitmask"), ALL, EVERY),
    "lowrank": (partial(linear, "lowrank"), ALL, [ALIGNED]),  # which runs dense's kernel
    "spectral": (partial(linear, "spectral"), BOTH, EVERY),
    "block 64x32": (partial(linear, "block 64x32"), BOTH, [ALIGNED]),
    "block 16x128": (partial(linear, "block 16x128"), ALL[1:2], [RAGGED]),
    "nofm": (partial(linear, "nofm"), BOTH, [ALIGNED]),
    "masked_linear": (masked, BOTH, [RAGGED]),
    "sparsify": (sparsified, ALL[1:2], [RAGGED]),
}
"""Kernel -> (what launches it and checks the result, for a dtype and (T, N, K); dtypes; shapes)."""


def cases(arch):
    """Parameters (name, dtype, shape): float16 with one shape, as bfloat16's code but for the conversions; ROW once.

    On sm_90 bfloat16 and the first shape.
    """
    found = []
    for name, (_, dtypes, shapes) in TABLE.items():
        for dtype, shape in product(dtypes, shapes):
            rare = (dtype == torch.float16 and shape != shapes[0]) or (dtype == torch.float32 and shape == ROW)
            if not rare if arch == 80 else (dtype, shape) == (torch.bfloat16, shapes[0]):
                found.append(pytest.param(name, dtype, shape, id=f"{name}-{dtype}-{shape}"))
    return pytest.mark.parametrize(("name", "dtype", "shape"), found)


@triton.jit
def described_kernel(
    x_desc, w_desc, y_ptr, T, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACROSS: tl.constexpr
):
    """x Wᵀ whose tiles the copy engine fetches; ACROSS: xᵀ [K, T] and Wᵀ [K, N] are given, so that K is no row."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if ACROSS:
            acc = tl.dot(x_desc.load([k, row]).T, w_desc.load([k, column]), acc)
        else:
            acc = tl.dot(x_desc.load([row, k]), w_desc.load([column, k]).T, acc, input_precision="tf32x3")
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], acc.to(y_ptr.dtype.element_ty), inside)


def described(dtype, shape, across=False):
    """Triton's tensor descriptors, that is TMA."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    t, n, k = shape
    w, x, *_ = problem(*shape, dtype, "cpu")
    y, (bm, bn, bk) = torch.zeros(t, n, dtype=dtype), (64, 32, 128 // dtype.itemsize)
    given = [(x, [bm, bk]), (w, [bn, bk])]
    if across:
        given = [(matrix.t().contiguous(), box[::-1]) for matrix, box in given]
    maps = [TensorDescriptor.from_tensor(*each) for each in given]
    grid = triton.cdiv(t, bm), triton.cdiv(n, bn)
    described_kernel[grid](*maps, y, t, n, k, bm, bn, bk, across, num_warps=4, num_stages=3)
    assert_as_accurate_as_dense(y, x, w)


def executed(arch, launch):
    """Run `launch` under every schedule of an architecture; nothing may be found."""
    from tests.gpu.ptx.driver import executing

    for schedule in SCHEDULES[arch]:
        with executing(arch, schedule) as report:
            launch()
        assert report.findings == [], schedule
    return report


@cases(80)
def test_sm_80(name, dtype, shape):
    executed(80, partial(TABLE[name][0], dtype, shape))


def test_many_tokens():
    executed(90, partial(linear, "dense", torch.bfloat16, BATCH))  # two warpgroups


@cases(90)  # the pointer kernels of float32 have the code of sm_80, test_tensor_descriptors has the other
def test_sm_90(name, dtype, shape):
    report = executed(90, partial(TABLE[name][0], dtype, shape))
    if shape == ALIGNED and name != "lowrank":
        assert all(launch.instructions["wgmma"] for launch in report.launches)


# ---------------------------------------------------------------- that faults are found

LOOP = (37, 80, 384)  # six steps, more than there are buffers
COPY_WAIT = r"cp\.async\.wait_group\s+\d+;"
FAULTS = {
    # what other threads copied is there after it, and a buffer is copied to again only after it
    "barrier of the loop": (80, "dense", COPY_WAIT + r"\s*(bar\.sync\s+0;)", {"race"}),
    "wait for copies": (80, "dense", COPY_WAIT, {"unwaited copy"}),
    "wait for copies, sm_90": (90, "bitmask", COPY_WAIT, {"unwaited copy"}),
    "fence before tensor cores read": (90, "bitmask", r"fence\.proxy\.async\.shared::cta;", {"missing fence"}),
    "barrier after it": (90, "bitmask", r"fence\.proxy\.async\.shared::cta;\s*(bar\.sync\s+0;)", {"race"}),
    "fence of registers": (90, "bitmask", r"wgmma\.fence\.sync\.aligned;", {"missing fence"}),
    "wait for products": (90, "bitmask", r"wgmma\.wait_group\.sync\.aligned\s+\d+;", {"unwaited product"}),
}
"""Name of what is taken out of a compiled kernel -> (architecture, layout, pattern, kinds of findings)."""


def check_fault(arch, launch, removed, kinds):
    """The fault must be found whatever the schedule; whether the result is wrong depends on it."""
    from tests.gpu.ptx.driver import executing
    from tests.gpu.ptx.launch import without

    for schedule in SCHEDULES[80] if arch == 80 else ("reverse",):
        with executing(arch, schedule, lambda ptx: without(ptx, removed)) as report:
            try:
                launch()
            except AssertionError as error:
                assert "accuracy rule" in str(error)
        assert report.kinds() & kinds, (schedule, report.findings)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_taken_out_is_missed(fault):
    arch, layout, removed, kinds = FAULTS[fault]
    check_fault(arch, partial(linear, layout, torch.bfloat16, LOOP), removed, kinds)


def test_a_pointer_out_of_bounds_is_found():
    from tests.gpu.ptx.driver import executing
    from tests.gpu.ptx.findings import OutOfBounds

    w, x, bias, _, residual = problem(*ALIGNED, torch.bfloat16, "cpu")
    packed, _ = pack("dense", w)
    with executing(80), pytest.raises(OutOfBounds, match=r"a read of \d+ bytes at byte \d+ of bias_ptr \(158 bytes\)"):
        op(packed, x, 80, bias[:79])
    with executing(80), pytest.raises(OutOfBounds, match=r"a read .* of residual_ptr \(3358 bytes\).*triton.py:\d+"):
        op(packed, x, 80, residual=residual.flatten()[:-1])


# ---------------------------------------------------------------- how much is moved

X_ONCE = (128, 192, 192)  # whole tiles of 64 x 64
RANK = 16


def test_spectral_reads_x_once_for_each_tile_of_outputs():
    """And moves at most 0.6 of the activations of a sparse kernel and two products with the factors."""
    from tests.gpu.ptx.driver import executing

    (t, n, k), dtype = X_ONCE, torch.bfloat16
    w, x, bias, *_ = problem(t, n, k, dtype, "cpu", 0.9)
    factors = torch.randn(n, RANK).to(dtype) / 8, torch.randn(RANK, k).to(dtype) / 8
    spectral = LAYOUTS["spectral"].from_parts(*factors, w)
    with executing(80) as fused:
        together = op(spectral, x, n, bias)
    with executing(80) as apart:
        sparse = op(LAYOUTS["bitmask"].pack(w), x, n, bias)
        both = op(LAYOUTS["lowrank"].from_factors(*factors), x, n, residual=sparse)
    assert_as_accurate_as_dense(together, x, spectral.unpack(), bias)
    torch.testing.assert_close(both, together, rtol=0.02, atol=0.05)

    (launch,) = fused.launches
    tiles = 2 * 3
    assert launch.grid == (tiles, 1, 1)
    assert launch.traffic["x_ptr"].read == tiles * 64 * k * x.element_size()  # each tile's rows, once
    assert launch.traffic["x_ptr"].distinct_read == x.nbytes
    assert launch.traffic["y_ptr"].written == together.nbytes

    activations = ("x_ptr", "residual_ptr", "y_ptr")

    def moved(report, kind):
        return sum(
            getattr(launch.traffic[name], kind)
            for launch in report.launches
            for name in activations
            if name in launch.traffic
        )

    assert len(apart.launches) == 3
    for kind in ("total", "distinct"):  # as the warps ask for it, and with a perfect cache
        assert moved(fused, kind) <= 0.6 * moved(apart, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensor_descriptors(dtype):
    report = executed(90, partial(described, dtype, (70, 40, 328)))
    x = report.launches[0].traffic["x_desc"]
    assert x.distinct_read == 70 * 328 * dtype.itemsize and x.read == 2 * x.distinct_read  # for two tiles of columns


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_matrices_that_lie_across_k(dtype):
    report = executed(90, partial(described, dtype, (72, 40, 330), True))
    assert report.launches[0].instructions["wgmma"]


@pytest.mark.parametrize(
    ("removed", "kinds"),
    [
        (r"waitLoop:[^}]*", {"unwaited copy"}),
        (r"wgmma\.wait_group\.sync\.aligned\s+1;", {"unwaited product"}),
    ],
    ids=["wait for the copy engine", "wait for products"],
)
def test_what_is_taken_out_of_tensor_descriptors_is_missed(removed, kinds):
    check_fault(90, partial(described, torch.bfloat16, (70, 40, 328)), removed, kinds)
