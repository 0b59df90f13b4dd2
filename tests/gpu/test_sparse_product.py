"""The CUDA C++ kernel of 2:4, compiled by NVRTC and executed on the CPU as the wrapper launches it; on a device too.

Every launch goes through the op, whose CuPy is another one (ptx/cupy_driver.py).
"""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtkern import ops
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.gpu_configs import choose
from rmtkern.layouts.nofm import sparse_product
from rmtkern.layouts.pairs import interleave, separate
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse
from tests.gpu.ptx.cupy_driver import executing_cuda, ptx_of, with_cupy
from tests.gpu.ptx.findings import OutOfBounds
from tests.gpu.ptx.launch import execute, without

MODULE = "rmtkern.layouts.nofm.cuda"
HALF = (torch.bfloat16, torch.float16)
# T, N, K: each tile, none filled whole; rows that are multiples of 16 bytes, and others
SHAPES = {
    "image": (37, 80, 208),
    "image, narrow": (21, 53, 76),
    "row": (5, 48, 336),
    "row, narrow": (3, 72, 132),
    "batch": (530, 136, 80),
    "one group": (1, 1, 4),
}


def two_of_four(n, k, dtype, sparsity=0.5, seed=0):
    """At most two of each four, of all entries 1 - sparsity."""
    w = random_sparse(n, k, 0, nofm=(2, 4), seed=seed)
    return (w * (random_sparse(n, k, max(0.0, 2 * sparsity - 1), seed=seed + 1) != 0)).to(dtype)


def problem(t, n, k, dtype, sparsity=0.5, outputs=None):
    generator = torch.Generator().manual_seed(t)
    shapes = ((t, k), (n,), (outputs or n,), (t, outputs or n))
    return two_of_four(n, k, dtype, sparsity), *(torch.randn(*s, generator=generator).to(dtype) for s in shapes)


def op(packed, x, features, bias=None, activation=None, residual=None, scale=None, gated=False):
    kept, _, meta = packed.gpu_tensors()
    return torch.ops.rmtkern.sparse_product(x, features, kept, meta, bias, activation, residual, scale, gated)


def check(shape, dtype, sparsity=0.5, activation="gelu"):
    w, x, bias, scale, residual = problem(*shape, dtype, sparsity)
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4)
    y = op(packed, x, shape[1], bias, activation, residual, scale)
    assert_as_accurate_as_dense(y, x, w, bias, activation, residual, scale)


def clean(report):
    assert report.findings == [] and report.launches
    return report


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for dtype in HALF for shape in SHAPES if (shape, dtype) != ("batch", HALF[1])],
    ids=str,
)
def test_sm_80(shape, dtype):
    for schedule in ("forward", "reverse"):
        with executing_cuda("sm_80", schedule) as report:
            check(SHAPES[shape], dtype)
        (launch,) = clean(report).launches
        assert launch.instructions["mma"] and launch.traffic["y"].distinct_written == 2 * np.prod(SHAPES[shape][:2])


@pytest.mark.compiled
def test_sm_90():
    with executing_cuda("sm_90", "lockstep") as report:
        check(SHAPES["image"], torch.bfloat16)
    clean(report)


@pytest.mark.compiled
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 1.0])
def test_sparsity(sparsity):
    with executing_cuda("sm_80") as report:
        check((33, 131, 208), torch.bfloat16, sparsity, "silu")
    clean(report)


@pytest.mark.compiled
def test_every_epilogue():
    w, x, b, s, r = problem(9, 40, 72, torch.bfloat16)
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4)
    some = [(None, None, None), (b, None, None), (None, s, None), (None, None, r), (b, s, r)]
    with executing_cuda("sm_80") as report:
        for activation, (bias, scale, residual) in itertools.product(ops.ACTIVATIONS, some):
            if activation in (None, "silu") or bias is not None:
                y = op(packed, x, 40, bias, activation, residual, scale)
                assert_as_accurate_as_dense(y, x, w, bias, activation, residual, scale)
    clean(report)


@pytest.mark.compiled
@pytest.mark.parametrize(("t", "features", "k"), [(37, 53, 80), (18, 64, 64), (3, 9, 76)])
def test_gated(t, features, k):
    w, x, bias, scale, residual = problem(t, 2 * features, k, torch.bfloat16, outputs=features)
    both = interleave(w[:features], w[features:])
    gate, up = separate(both, features)
    packed = LAYOUTS["nofm"].pack(both, n=2, m=4)
    halves = bias.view(2, -1)
    with executing_cuda("sm_80", "reverse") as report:
        for activation in ("silu", "gelu_tanh"):
            y = op(packed, x, features, interleave(*halves), activation, residual, scale, True)
            assert_as_accurate_as_dense(y, x, gate, halves[0], activation, residual, scale, (up, halves[1]))
    clean(report)


@pytest.mark.compiled
def test_addresses_that_are_not_aligned():
    w, x, bias, _, residual = problem(20, 32, 64, torch.float16)
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4)
    with executing_cuda("sm_80") as report:
        for offset in (1, 4):  # 2 and 8 bytes: a copy of x is made, and narrow copies
            flat = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
            shifted = torch.cat([x.new_zeros(1), residual.flatten()])[1:].view(residual.shape)
            y = op(packed, flat, 32, bias, None, shifted)
            assert_as_accurate_as_dense(y, x, w, bias, None, residual)
    clean(report)


@pytest.mark.compiled
def test_what_is_not_kept_is_not_multiplied():
    w = torch.zeros(32, 64, dtype=torch.float16)
    w[:, 0], w[:, 1] = 1.0, 2.0
    x = torch.ones(2, 64, dtype=torch.float16)
    x[0, 2], x[1, 1] = float("inf"), float("nan")
    with executing_cuda("sm_80") as report:
        y = op(LAYOUTS["nofm"].pack(w, n=2, m=4), x, 32)
    clean(report)
    assert (y[0] == 3).all() and y[1].isnan().all()


@pytest.mark.compiled
def test_offsets_of_more_than_32_bits():
    """The first block of the last tokens of many; x and y begin so far before what there is."""
    rows, far, n, k = 5, 2**25, 192, 192  # 6.4e9 entries of x and of y
    config = choose("sparse_product", 2, "sm_80", 100)
    w, x = two_of_four(n, k, torch.bfloat16), torch.randn(rows, k).bfloat16()
    kept, _, meta = LAYOUTS["nofm"].pack(w, n=2, m=4).gpu_tensors()
    y = torch.zeros(rows, n, dtype=torch.bfloat16)
    options = sparse_product.options(config, True, None, False, sparse_product.WIDE)
    block = far // config.bm * -(-n // config.bn)  # whole groups of tiles come before it
    ptx = ptx_of(sparse_product.source(), "sm_80", options).replace("%ctaid.x", str(block))
    for number, row in ((0, k), (6, n)):
        load = rf"(ld\.param\.u64\s+(%rd\d+), \[\w+_param_{number}\];)"
        ptx, count = re.subn(load, rf"\1 sub.s64 \2, \2, {2 * far * row};", ptx)
        assert count
    given = (x, kept, meta, 0, 0, 0, y, far + rows, n, n, k)
    arguments = dict(zip(sparse_product.ARGUMENTS, given, strict=True))
    clean(execute(ptx, (1, 1, 1), arguments, sparse_product.shared_bytes(config)))
    assert_as_accurate_as_dense(y[:, : config.bn].contiguous(), x, w[: config.bn])


# ---------------------------------------------------------------- that faults are found

FAULTS = {
    "barrier of the loop": (r"cp\.async\.wait_group\s+\d+;.*?(bar\.sync\s+0;)", {"race"}),
    "wait for copies": (r"cp\.async\.wait_group\s+\d+;", {"unwaited copy"}),
    "barrier before the epilogue": (r"bar\.sync\s+0;(?=(?:(?!bar\.sync).)*st\.shared)", {"race"}),
    "barrier after the tile is turned": (r"bar\.sync\s+0;(?!.*bar\.sync)", {"race"}),
}


@pytest.mark.compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_taken_out_is_missed(fault):
    removed, kinds = FAULTS[fault]
    for schedule in ("forward", "reverse"):
        with executing_cuda("sm_80", schedule, lambda ptx: without(ptx, f"(?s:{removed})")) as report:
            try:
                check((37, 80, 448), torch.bfloat16)  # the last of seven steps lies where the results will
            except AssertionError as error:
                assert "accuracy rule" in str(error)
        assert report.kinds() & kinds, (schedule, report.findings)


@pytest.mark.compiled
def test_a_pointer_out_of_bounds_is_found():
    w, x, bias, _, residual = problem(20, 80, 208, torch.bfloat16)
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4)
    with executing_cuda("sm_80"), pytest.raises(OutOfBounds, match=r"a read of 2 bytes .* of bias \(158 bytes\)"):
        op(packed, x, 80, bias[:79])
    with executing_cuda("sm_80"), pytest.raises(OutOfBounds, match=r"a read .* of residual \(3198 bytes\).*kernel.cu:"):
        op(packed, x, 80, residual=residual.flatten()[:-1])


# ---------------------------------------------------------------- what CuPy is given, and what is refused


def stand_in(**more):
    return SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, **more))


@pytest.fixture
def module():
    with with_cupy(stand_in(), MODULE) as found:
        yield found


def test_arguments_are_addresses_and_numbers_of_32_bits(module):
    x = torch.ones(3)
    assert module._argument(x) == x.data_ptr() and module._argument(x).dtype == np.uint64
    assert module._argument(None) == 0 and module._argument(None).dtype == np.uint64
    assert module._argument(7) == 7 and module._argument(7).dtype == np.int32


def test_cupy_works_on_torchs_device_and_stream(module, monkeypatch):
    entered = []

    def context(name):
        class Context:
            def __init__(self, value):
                self.value = value

            def __enter__(self):
                entered.append((name, self.value))

            def __exit__(self, *error):
                return None

        return Context

    module.cupy.cuda.Device, module.cupy.cuda.ExternalStream = context("cupy"), context("stream")
    monkeypatch.setattr(torch.cuda, "device", context("torch"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=(77, device)))
    device = torch.device("cuda", 1)
    with module._torchs_stream(device):
        assert entered == [("torch", device), ("cupy", 1), ("stream", (77, device))]


def test_a_kernel_that_cannot_be_built_says_why(module):
    def fails(**_):
        raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture")

    module.cupy.RawModule = fails
    why = r"on cuda:0: cuda: cupy cannot build the kernel, .* CUDA 12.5 or later: nvrtc: error: invalid value for"
    with pytest.raises(KernelUnavailable, match=rf"{why} --gpu-architecture; use backend='triton'"):
        module._built(torch.device("cuda", 0), ("-DBM=16",), 1024)


FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(*shape, device="cuda", dtype=torch.bfloat16):
    with FAKE:
        return torch.empty(*shape, device=device, dtype=dtype)


def weight(dtype=torch.bfloat16, device="cuda", **params):
    packed = LAYOUTS["nofm"].pack(torch.zeros(32, 64, dtype=dtype), **{"n": 2, "m": 4, **params})
    packed.values = fake(*packed.values.shape, device=device, dtype=packed.values.dtype)
    return packed


def test_calls_that_are_refused(module, monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert module.supports(weight(), fake(3, 64)) is None
    assert module.supports(weight(r=4), fake(3, 64)) is None
    half = fake(3, 64, dtype=torch.float16)
    assert module.supports(weight(dtype=torch.float16, n=1, m=4), half) == (
        "the pattern is 1:4; sparse tensor cores take 2:4"
    )
    assert module.supports(weight(), fake(3, 64, dtype=torch.float32)) == (
        "x is torch.float32; cast to torch.float16 or torch.bfloat16"
    )
    assert module.supports(weight(), half) == (
        "x is torch.float16, the weight torch.bfloat16; cast one to the other's dtype"
    )
    assert module.supports(weight(device="cuda:1"), fake(3, 64)) == (
        "x is on cuda:0, the weight on cuda:1; move both to one CUDA device"
    )
    assert module.supports(weight(), fake(3, 64, device="cpu")) == (
        "x is on cpu, the weight on cuda:0; move both to one CUDA device"
    )
    large = weight()
    large.shape = (32, 2**23)
    assert module.supports(large, fake(3, 64)) == f"the weight is (32, {2**23}); N and K must be less than 2^23"
    assert module.supports(weight(), fake(2**31, 64)) == "tokens reach 2^31; split the call"
    properties.major = 7
    assert module.supports(weight(), fake(3, 64)) == (
        "NVIDIA H100 is none of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"
    )
    monkeypatch.setattr(module, "SEES_DEVICE", False)
    assert module.supports(weight(), fake(3, 64)) == "cupy sees no device; install the one of this machine's CUDA"


def test_it_goes_before_triton_and_is_not_there_without_cupy(monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with with_cupy(stand_in(), MODULE) as module:
        assert ops._select(fake(3, 64), weight(), None) is module
    monkeypatch.setattr(ops, "KERNELS", {})
    with with_cupy(None, "rmtkern.layouts.nofm") as _, pytest.raises(KernelUnavailable) as refused:  # None: not there
        ops.linear(fake(3, 64), weight(), backend="cuda")
    assert "cuda: the package cupy is not installed" in str(refused.value)


def test_a_cupy_that_does_not_import_is_a_reason(monkeypatch):
    def load(name):
        raise ImportError("libcublas.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(ops.importlib, "import_module", load)
    assert ops._imported(MODULE) == "libcublas.so.13: cannot open shared object file"


def test_the_op_keeps_pytorchs_contract():
    w, x, bias, scale, residual = problem(5, 24, 64, torch.bfloat16)
    kept, _, meta = LAYOUTS["nofm"].pack(w, n=2, m=4).gpu_tensors()
    with with_cupy(stand_in(), MODULE) as module:

        def launch(y, *args):
            y.fill_(1.0)

        module.launch = launch
        operator = torch.ops.rmtkern.sparse_product.default
        torch.library.opcheck(operator, (x, 24, kept, meta, bias, "gelu", residual, scale))
        torch.library.opcheck(operator, (x, 12, kept, meta, None, "silu", None, None, True))
        packed = LAYOUTS["nofm"].pack(w, n=2, m=4)
        for name, tensor in zip(packed.gpu_parts, packed.gpu_form(), strict=True):
            setattr(packed, name, tensor)  # as on a device
        compiled = torch.compile(
            lambda x: module.linear(x, packed, bias, "gelu", None), fullgraph=True, backend="eager"
        )
        assert compiled(x).shape == (5, 24)


def test_metadata_of_shapes_that_are_not_whole():
    """By the definition of mma.sp's metadata, word by word."""
    n, k = 41, 76
    w = two_of_four(n, k, torch.float16, 0.0)
    _, _, meta = LAYOUTS["nofm"].pack(w, n=2, m=4).gpu_tensors()
    words = meta.view(torch.int32).flatten().numpy().view(np.uint32).reshape(4, 64)  # 2 ceil(K / 64), N filled up
    for word, lane in itertools.product(range(4), range(64)):
        for half, group in itertools.product(range(2), range(4)):
            row = lane // 32 * 32 + lane % 4 // 2 * 16 + half * 8 + lane % 32 // 4
            column = 32 * word + lane % 2 * 16 + 4 * group
            code = int(words[word, lane]) >> (16 * half + 4 * group) & 15
            inside = row < n and column < k
            kept = torch.nonzero(w[row, column : column + 4]).flatten().tolist() if inside else [0, 1]
            assert [code & 3, code >> 2] == kept


# ---------------------------------------------------------------- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_this_device(shape, dtype):
    pytest.importorskip("cupy")
    w, x, bias, scale, residual = (tensor.cuda() for tensor in problem(*SHAPES[shape], dtype))
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4)
    y = ops.linear(x, packed, bias, activation="gelu", scale=scale, residual=residual, backend="cuda")
    assert_as_accurate_as_dense(y, x, w, bias, "gelu", residual, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = ops.linear(x, packed, bias, activation="gelu", scale=scale, residual=residual, backend="cuda")
    graph.replay()
    assert torch.equal(again, y)
