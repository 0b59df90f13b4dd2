"""Every kernel against float64 by the project's one accuracy rule: in Triton's interpreter, and on a device if any."""

import itertools

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from rmtkern import ops
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.pairs import interleave, separate
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse

DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
# layout and its form: dense as on an architecture with tensor descriptors; blocks wider and narrower than a tile, and
# mini-blocks, which run as bitmask
KERNELS = [
    "dense",
    "dense described",
    "bitmask",
    "lowrank",
    "spectral",
    "block 64x32",
    "block 16x128",
    "block mini",
    "nofm",
]
MINI = {torch.float32: (4, 1), torch.bfloat16: (4, 2)}
# one token; prime and ragged; a tile exactly; one more than a tile in every direction; less than a tile; several
# column blocks and steps of K with T over a tile; the class "batch" with whole and with ragged tiles
SHAPES = [
    (1, 96, 128),
    (37, 53, 80),
    (64, 64, 64),
    (65, 65, 65),
    (5, 7, 3),
    (197, 80, 208),
    (513, 128, 128),
    (530, 17, 72),
]

everywhere = pytest.mark.parametrize("device", DEVICES)
every_kernel = pytest.mark.parametrize("layout", KERNELS)
NUMBERS = [
    (layout, dtype)
    for layout in KERNELS
    for dtype in (MINI if layout == "block mini" else LAYOUTS[layout.split()[0]].dtypes)
]
every_number = pytest.mark.parametrize(("layout", "dtype"), NUMBERS, ids=str)
# without those whose epilogue another form runs in the same kernel, or from the same accumulator
every_epilogue = pytest.mark.parametrize(
    ("layout", "dtype"), [number for number in NUMBERS if number[0] not in ("block mini", "dense described")], ids=str
)


@pytest.fixture(autouse=True)
def architecture(request, monkeypatch):
    """The interpreter takes the way of sm_80; here that of sm_90, for one of KERNELS."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if params.get("layout") == "dense described" and params.get("device") == "cpu":
        monkeypatch.setattr("rmtkern.layouts.triton_product.target", lambda: "sm_90")


def columns(layout, k):
    """K, or the next multiple of 4 for 2:4."""
    return -(-k // 4) * 4 if layout == "nofm" else k


def two_of_four(w, r=1):
    """`w` with the two largest of each four columns, summed over r rows."""
    n, k = w.shape
    score = functional.pad(w.detach().float().abs(), (0, 0, 0, -n % r)).view(-1, r, k).sum(1).view(-1, k // 4, 4)
    kept = torch.zeros_like(score).scatter_(2, score.topk(2).indices, 1.0).view(-1, k)
    return w * kept.repeat_interleave(r, 0)[:n].to(w.dtype)


def pack(layout, w):
    """(packed, the weight that it holds).

    Factors are cut from `w`, and `w` is the sparse part of spectral. Of blocks whole ones are set to zero besides, and
    of each four columns all but the largest two for nofm.
    """
    layout, _, size = layout.partition(" ")
    if layout == "nofm":
        w = two_of_four(w)
        return LAYOUTS[layout].pack(w, n=2, m=4), w
    if layout in ("dense", "bitmask"):
        return LAYOUTS[layout].pack(w), w
    if layout == "block":
        r, c = MINI[w.dtype] if size == "mini" else map(int, size.split("x"))
        w = w.clone()
        for at in range(-(-w.shape[0] // r)):  # a strip without blocks too
            w[at * r : at * r + r] *= (torch.arange(w.shape[1], device=w.device) // c + at) % 3 == 0 if at % 5 else 0
        return LAYOUTS[layout].pack(w, r=r, c=c), w
    rank = min(5, *w.shape)
    factors = w[:, :rank].contiguous(), w[:rank] / rank**0.5
    packed = LAYOUTS[layout].from_factors(*factors) if layout == "lowrank" else LAYOUTS[layout].from_parts(*factors, w)
    return packed, packed.unpack()


def problem(t, n, k, dtype, device, sparsity=0.5):
    w = random_sparse(n, k, sparsity).to(device, dtype)
    generator = torch.Generator().manual_seed(t)
    shapes = ((t, k), (n,), (n,), (t, n))
    return w, *(torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)


def pair(layout, t, features, k, dtype, device):
    """(x, packed pair, gate, up, their biases)."""
    w, x, bias, *_ = problem(t, 2 * features, k, dtype, device)
    packed, both = pack(layout, interleave(w[:features], w[features:]))
    return x, packed, *separate(both, features), bias.view(2, -1)


@everywhere
@every_number
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_ragged_shapes(layout, dtype, device, t, n, k):
    w, x, bias, scale, residual = problem(t, n, columns(layout, k), dtype, device)
    packed, w = pack(layout, w)
    y = ops.linear(x, packed, bias, activation="gelu", scale=scale, residual=residual, backend="triton")
    assert_as_accurate_as_dense(y, x, w, bias, "gelu", residual, scale)


def forms(bias, scale, residual):
    """(activation, bias, scale, residual) of an epilogue: all that may be given, with GELU; else nothing or everything.

    One step follows the other and knows nothing of it, so that more pairs of steps would show nothing more.
    """
    for activation, *given in itertools.product(ops.ACTIVATIONS, (None, bias), (None, scale), (None, residual)):
        if activation == "gelu" or len({part is None for part in given}) == 1:
            yield activation, *given


@everywhere
@every_epilogue
def test_every_epilogue(layout, dtype, device):
    w, x, b, s, r = problem(21, 40, 72, dtype, device)
    packed, w = pack(layout, w)
    for activation, bias, scale, residual in forms(b, s, r):
        y = ops.linear(x, packed, bias, activation=activation, scale=scale, residual=residual, backend="triton")
        assert_as_accurate_as_dense(y, x, w, bias, activation, residual, scale)


@everywhere
@every_epilogue
@pytest.mark.parametrize(("t", "features", "k"), [(1, 8, 64), (37, 53, 80), (65, 64, 64), (5, 3, 7), (197, 72, 208)])
def test_gated(layout, dtype, device, t, features, k):
    x, packed, gate, up, biases = pair(layout, t, features, columns(layout, k), dtype, device)
    *_, scale, residual = problem(t, features, k, dtype, device)
    both = interleave(*biases)
    for activation in ops.ACTIVATIONS if t == 37 else ("silu",):  # which no shape changes
        y = ops.gated_linear(
            x, packed, both, activation=activation, scale=scale, residual=residual, features=features, backend="triton"
        )
        assert_as_accurate_as_dense(y, x, gate, biases[0], activation, residual, scale, (up, biases[1]))
    y = ops.gated_linear(x, packed, features=features, backend="triton")
    assert_as_accurate_as_dense(y, x, gate, None, "silu", up=(up, None))


@everywhere
@every_number
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_sparsity(layout, sparsity, dtype, device):
    w, x, bias, *_ = problem(33, 131, 208, dtype, device, sparsity)
    packed, w = pack(layout, w)
    y = ops.linear(x, packed, bias, activation="silu", backend="triton")
    assert_as_accurate_as_dense(y, x, w, bias, "silu")


@everywhere
@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_nan_and_infinity_pass_through(layout, device):
    w, x, *_ = problem(4, 16, 32, torch.float32, device, 0.0)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = ops.linear(x, LAYOUTS[layout].pack(w), activation="relu", backend="triton")
    expected = torch.relu(x @ w.t())
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@everywhere
@every_kernel
def test_shapes_and_strides(layout, device):
    w = random_sparse(24, 64, 0.5).to(device)
    packed, w = pack(layout, w)
    inputs = [torch.randn(64), torch.randn(2, 3, 64), torch.randn(64, 7).t(), torch.randn(2, 5, 65)[..., 1:]]
    for x in (x.to(device) for x in inputs):
        y = ops.linear(x, packed, backend="triton")
        assert y.shape == (*x.shape[:-1], 24)
        assert_as_accurate_as_dense(y, x, w)
    assert ops.linear(torch.randn(0, 64, device=device), packed, backend="triton").shape == (0, 24)


@pytest.mark.interpreted
@pytest.mark.parametrize("which", ["x", "w", "y"])
def test_offsets_of_more_than_32_bits(which):
    # 17 rows, 2^27 + 16 elements apart: the last is beyond 2^31 elements; untouched memory is never allocated
    from rmtkern.layouts.triton_product import product_kernel

    stride = 2**27 + 16
    x, w, y = torch.randn(17, 32).half(), torch.randn(17, 32).half(), torch.zeros(17, 17).half()
    expected = x @ w.t()
    tensors = {"x": x, "w": w, "y": y}
    far = torch.empty(16 * stride + 64, dtype=torch.float16).as_strided(tensors[which].shape, (stride, 1))
    far.copy_(tensors[which])
    tensors[which] = far
    strides = [t.stride(0) for t in tensors.values()]
    # tiles of 16: the second one holds the far row
    product_kernel[(4,)](
        tensors["x"], tensors["w"], None, None, None, tensors["y"], 17, 17, 17, 32, *strides,
        BM=16, BN=16, BK=32, GROUP=8, EVEN_K=True, ACTIVATION=None, GATED=False, PRECISION="ieee",
    )  # fmt: skip
    assert_as_accurate_as_dense(tensors["y"].clone(), x, w)
    assert torch.allclose(tensors["y"], expected, atol=0.05)


@everywhere
@every_kernel
def test_the_op_keeps_pytorchs_contract(layout, device):
    w, x, bias, scale, residual = problem(5, 24, 64, torch.bfloat16, device)
    packed, _ = pack(layout, w)
    ops.load_kernels(packed.layout)
    parts = list(packed.gpu_tensors())
    op = torch.ops.rmtkern.triton_linear.default
    torch.library.opcheck(op, (packed.layout, x, 24, parts, bias, "gelu", residual, scale))
    torch.library.opcheck(op, (packed.layout, x, 24, parts, None, None, None))
    x, packed, *_ = pair(layout, 5, 9, 64, torch.bfloat16, device)
    torch.library.opcheck(op, (packed.layout, x, 9, list(packed.gpu_tensors()), None, "silu", None, None, True))


@everywhere
@every_kernel
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(layout, device, dynamic):
    w, x, bias, *_ = problem(5, 24, 64, torch.bfloat16, device)
    packed, w = pack(layout, w)
    for name, tensor in zip(packed.gpu_parts, packed.gpu_form(), strict=True):
        setattr(packed, name, tensor)  # as on a device
    ops.load_kernels(packed.layout)  # as PackedLinear does: an import cannot be traced
    torch.compiler.reset()

    def call(x):
        return ops.linear(x, packed, bias, activation="silu", backend="triton")

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (x, x[:3]):
        assert torch.equal(compiled(rows), call(rows))


@everywhere
@every_kernel
def test_reasons_against_a_call(layout, device):
    packed, _ = pack(layout, random_sparse(16, 64, 0.5).to(device))
    with pytest.raises(
        ops.KernelUnavailable, match=r"triton: x is torch.float64; cast to torch.float32 or torch.float16"
    ):
        ops.linear(torch.randn(3, 64, device=device).double(), packed, backend="triton")
    with pytest.raises(ops.KernelUnavailable, match=r"triton: x is torch.float16, the weight torch.float32; cast one"):
        ops.linear(torch.randn(3, 64, device=device).half(), packed, backend="triton")
    with pytest.raises(ValueError, match=r"bias: expected a tensor on (cpu|cuda:0) like x, got meta; move it"):
        ops.linear(torch.randn(3, 64, device=device), packed, torch.ones(16, device="meta"), backend="triton")
    with pytest.raises(ops.KernelUnavailable, match=r"triton: x is on (cpu|cuda:0), the weight on meta; move both"):
        ops.linear(torch.randn(3, 64, device=device), packed.to("meta"), backend="triton")


@everywhere
def test_sizes_that_offsets_could_not_hold_are_refused(device):
    from rmtkern.layouts.triton import supports

    packed = LAYOUTS["dense"].pack(torch.ones(2, 2, device=device))
    x = torch.zeros(1, device=device).expand(2**31, 2)
    assert supports(packed, x) == "tokens or stored values reach 2^31; split the call"
    packed.shape = (2**23, 2)
    assert supports(packed, x[:1]) == f"the weight is ({2**23}, 2); N and K must be less than 2^23"


@pytest.mark.interpreted
def test_a_cast_bitmask_weight_keeps_its_masks():
    # bfloat16 masks have two words for a segment, and stay so when the values are cast
    w, x, *_ = problem(9, 20, 200, torch.bfloat16, "cpu")
    packed = LAYOUTS["bitmask"].pack(w).half()
    assert torch.equal(packed.unpack(), w.half())
    assert_as_accurate_as_dense(ops.linear(x.half(), packed, backend="triton"), x.half(), w.half())


@pytest.mark.gpu
def test_a_bitmask_weight_on_a_device_holds_its_masks_by_row():
    w = random_sparse(131, 200, 0.7)
    packed = LAYOUTS["bitmask"].pack(w)
    before = packed.nbytes
    assert packed.row_masks is None
    there = packed.cuda()
    assert there.row_masks.is_cuda and there.nbytes == before + 12 * 4 * 131
    assert "row_masks" not in there.state_dict()
    assert there.cpu().row_masks is None and torch.equal(there.unpack(), w)


@pytest.mark.interpreted
@pytest.mark.parametrize("rank", [1, 16, 17, 64])
def test_spectral_takes_ranks_up_to_64(rank):
    w, x, *_ = problem(9, 70, 90, torch.float32, "cpu", 0.9)
    packed = LAYOUTS["spectral"].from_parts(torch.randn(70, rank) / 8, torch.randn(rank, 90) / 8, w)
    assert_as_accurate_as_dense(ops.linear(x, packed, backend="triton"), x, packed.unpack())


@pytest.mark.interpreted
def test_spectral_refuses_a_larger_rank():
    w, x, *_ = problem(9, 70, 90, torch.float32, "cpu", 0.9)
    packed = LAYOUTS["spectral"].from_parts(torch.randn(70, 65), torch.randn(65, 90), w)
    with pytest.raises(ops.KernelUnavailable, match=r"triton: the rank is 65, more than 64; use lowrank, or dense"):
        ops.linear(x, packed, backend="triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [(r, c) for r in (16, 32, 64, 128) for c in (16, 32, 64, 128)])
def test_blocks_of_every_size(size):
    (r, c), tokens, n, k = size, 20, 200, 300
    generator = torch.Generator().manual_seed(r + c)
    kept = torch.rand(-(-n // r), -(-k // c), generator=generator) < 0.4
    w = torch.randn(n, k, generator=generator) * kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    x = torch.randn(tokens, k, generator=generator)
    packed = LAYOUTS["block"].pack(w.bfloat16(), r=r, c=c)
    assert torch.equal(packed.unpack(), w.bfloat16())
    assert_as_accurate_as_dense(ops.linear(x.bfloat16(), packed, backend="triton"), x.bfloat16(), w.bfloat16())


@pytest.mark.interpreted
@pytest.mark.parametrize(("shape", "kernel"), [((37, 53, 80), "described"), ((37, 53, 81), "pointed")])
def test_descriptors_are_used_where_they_fit(shape, kernel, monkeypatch):
    from rmtkern.layouts import triton_product

    used = []
    for name, called in (("described", "descriptor_product"), ("pointed", "run")):
        original = getattr(triton_product, called)
        monkeypatch.setattr(
            triton_product, called, lambda *args, name=name, original=original: (used.append(name), original(*args))
        )
    w, x, *_ = problem(*shape, torch.bfloat16, "cpu")
    packed = LAYOUTS["dense"].pack(w)
    ops.linear(x, packed, backend="triton")
    monkeypatch.setattr(triton_product, "target", lambda: "sm_90")
    assert_as_accurate_as_dense(ops.linear(x, packed, backend="triton"), x, w)
    assert used == ["pointed", kernel]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", LAYOUTS["dense"].dtypes)
def test_a_pair_by_descriptors(dtype, monkeypatch):
    monkeypatch.setattr("rmtkern.layouts.triton_product.target", lambda: "sm_90")
    x, packed, gate, up, biases = pair("dense", 37, 53, 80, dtype, "cpu")
    *_, scale, residual = problem(37, 53, 80, dtype, "cpu")
    y = ops.gated_linear(x, packed, interleave(*biases), scale=scale, residual=residual, features=53, backend="triton")
    assert_as_accurate_as_dense(y, x, gate, biases[0], "silu", residual, scale, (up, biases[1]))


@pytest.mark.interpreted
def test_descriptors_fit_aligned_rows():
    from rmtkern.layouts.triton_descriptor import fits

    x = torch.zeros(4, 32).half()
    assert fits(x, x[1:], x[:, 8:])
    assert not fits(x, x[:, 4:]) and not fits(x[:, 1:]) and not fits(x.t()) and not fits(torch.zeros(4, 12).half())


@pytest.mark.interpreted
@pytest.mark.parametrize("which", ["x_desc", "w_desc", "y_ptr"])
def test_descriptors_reach_beyond_32_bits(which):
    from triton.tools.tensor_descriptor import TensorDescriptor

    from rmtkern.layouts.triton_descriptor import descriptor_kernel

    stride = 2**27 + 16
    x, w = torch.randn(2, 17, 32).half()
    given = {"x_desc": x, "w_desc": w, "y_ptr": torch.zeros(17, 17).half()}
    far = torch.empty(16 * stride + 64, dtype=torch.float16).as_strided(given[which].shape, (stride, 1))
    far.copy_(given[which])
    given[which] = far
    y = given["y_ptr"]
    for name in ("x_desc", "w_desc"):
        given[name] = TensorDescriptor.from_tensor(given[name], [16, 32])
    descriptor_kernel[(4,)](
        bias_ptr=None, scale_ptr=None, residual_ptr=None, T=17, N=17, F=17, K=32, y_stride=y.stride(0), **given,
        BM=16, BN=16, BK=32, GROUP=8, ACTIVATION=None, GATED=False, PRECISION="ieee",
    )  # fmt: skip
    assert_as_accurate_as_dense(y.clone(), x, w)


@everywhere
@pytest.mark.parametrize(("t", "n", "k"), [(37, 53, 80), (5, 7, 4), (40, 64, 64)])
def test_rows_that_share_their_pattern(device, t, n, k):
    w, x, bias, *_ = problem(t, n, k, torch.bfloat16, device)
    w = two_of_four(w, 4)
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4, r=4)
    y = ops.linear(x, packed, bias, activation="gelu", backend="triton")
    assert_as_accurate_as_dense(y, x, w, bias, "gelu")


@pytest.mark.interpreted
@pytest.mark.parametrize("r", [{}, {"r": 4}])
def test_a_cast_nofm_weight_keeps_its_format(r):
    w, x, *_ = problem(9, 21, 72, torch.bfloat16, "cpu")
    w = two_of_four(w, r.get("r", 1))
    packed = LAYOUTS["nofm"].pack(w, n=2, m=4, **r).half()
    assert torch.equal(packed.unpack(), w.half())
    assert_as_accurate_as_dense(ops.linear(x.half(), packed, backend="triton"), x.half(), w.half())
    assert torch.equal(LAYOUTS["nofm"].pack(w, n=2, m=4, **r).float().unpack(), w.float())


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8), (3, 16), (4, 4)])
def test_other_nofm_run_as_bitmask(device, dtype, n, m):
    w = random_sparse(53, 208, 0, nofm=(n, m)).to(device, dtype)
    w[3] = 0.0  # explicit zeros
    _, x, bias, *_ = problem(37, 53, 208, dtype, device)
    packed = LAYOUTS["nofm"].pack(w, n=n, m=m)
    assert [part.ndim for part in packed.gpu_tensors()] == [1, 2, 2]
    assert_as_accurate_as_dense(ops.linear(x, packed, bias, backend="triton"), x, w, bias)


@pytest.mark.interpreted
@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize("layout", ["nofm", "bitmask"])
def test_sparse_kernels_reach_beyond_32_bits(layout, which):
    from rmtkern.layouts.nofm.triton import pairs_kernel
    from rmtkern.layouts.triton_strips import strips_kernel

    packed, w = pack(layout, two_of_four(torch.randn(17, 64)).half())
    values, masks, *rest = packed.gpu_tensors()
    stride = 2**27 + 16
    given = {"x": torch.randn(17, 64).half(), "y": torch.zeros(17, 17).half()}
    x = given["x"]
    far = torch.empty(16 * stride + 64, dtype=torch.float16).as_strided(given[which].shape, (stride, 1))
    far.copy_(given[which])
    given[which] = far
    kernel, parts, more = {
        "nofm": (pairs_kernel, (values, masks.view(dtype=torch.int32)), {}),
        "bitmask": (strips_kernel, (values, masks, *rest, None, None), {"RANK": 0}),
    }[layout]
    kernel[(4,)](
        given["x"], *parts, None, None, None, given["y"], 17, 17, 17, 64, given["x"].stride(0), given["y"].stride(0),
        BM=16, BN=16, BK=64, GROUP=8, EVEN_K=True, ACTIVATION=None, GATED=False, PRECISION="ieee", **more,
    )  # fmt: skip
    assert_as_accurate_as_dense(given["y"].clone(), x, w)


@pytest.mark.interpreted
def test_a_block_far_in_memory():
    # the second block's place is beyond 2^31 elements; untouched memory is never allocated
    from rmtkern.layouts.block.triton import blocks_kernel

    place = 2**31 // 256 + 1
    values = torch.empty((place + 1) * 256, dtype=torch.float16).view(-1, 16, 16)
    blocks = torch.randn(2, 16, 16).half()
    values[0], values[place] = blocks
    x, y = torch.randn(17, 32).half(), torch.zeros(17, 16).half()
    index = [torch.tensor(row, dtype=torch.int32) for row in ([0, 2], [0, 1], [0, place])]
    blocks_kernel[(2,)](
        x, values, *index, None, None, None, y, 17, 16, 16, 32, 32, 16, R=16, C=16,
        BM=16, BN=16, BK=16, GROUP=8, EVEN_K=True, ACTIVATION=None, GATED=False, PRECISION="ieee",
    )  # fmt: skip
    assert_as_accurate_as_dense(y, x, torch.cat(list(blocks), 1))


@pytest.mark.interpreted
def test_an_infinity_meets_stored_blocks_only():
    w = torch.zeros(32, 64)
    w[:16, 16:32] = 1.0
    x = torch.ones(2, 64)
    x[0, 40], x[1, 20] = float("inf"), float("inf")
    y = ops.linear(x, LAYOUTS["block"].pack(w, r=16, c=16), backend="triton")
    assert torch.equal(y[0], w.sum(1)) and y[1, :16].isinf().all() and (y[1, 16:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("params", "held"), [({"r": 32, "c": 16}, "begins"), ({"r": 4, "c": 1}, "row_masks")])
def test_a_block_weight_on_a_device_holds_what_its_kernel_reads(params, held):
    w = random_sparse(131, 200, 0.7)
    packed = LAYOUTS["block"].pack(w, **params)
    there = packed.cuda()
    assert getattr(there, held).is_cuda and held not in there.state_dict()
    assert getattr(there.cpu(), held) is None and torch.equal(there.unpack(), w)
