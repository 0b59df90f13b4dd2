"""The second verb, y = act(x Wgᵀ + bg) * (x Wuᵀ + bu): accuracy on every layout and isa, errors, compile, module."""

import copy
import itertools

import numpy as np
import pytest
import torch

from rmtkern import ops
from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.layouts import LAYOUTS, cpu
from rmtkern.layouts.pairs import interleave, separate
from rmtkern.nn import PackedGatedLinear
from rmtkern.testing import accuracy_excess, assert_as_accurate_as_dense, random_sparse
from tests.layouts.test_contract import BF16, FACTORED, FORMS

# as in the contract of the layouts; those that store products have rank 2 here, that is, 1 for each half
FACTORS = [("lowrank", {"rank": 2}, FACTORED), ("spectral", {"rank": 2}, FACTORED)]
FLOAT32 = [form for form in FORMS if form[2] != FACTORED] + FACTORS
BFLOAT16 = BF16 + FACTORS
CASES = [(torch.float32, *form) for form in FLOAT32] + [(torch.bfloat16, *form) for form in BFLOAT16]


def half(f, k, kind, seed, dtype):
    return random_sparse(f, k, 0.6, seed=seed, nofm=kind).to(dtype)


def pack_pair(layout, params, kind, dtype, f, k):
    """(packed, gate, up): of the factored layouts the halves are what the packed weight holds."""
    if kind != FACTORED:
        gate, up = (half(f, k, kind, seed, dtype) for seed in (1, 2))
        return LAYOUTS[layout].pack(interleave(gate, up), **params), gate, up
    b = interleave(*(random_sparse(f, 2, 0.0, seed=seed) for seed in (1, 2))).to(dtype)
    a = random_sparse(2, k, 0.0, seed=3).to(dtype)
    if layout == "lowrank":
        packed = LAYOUTS[layout].from_factors(b, a)
    else:
        packed = LAYOUTS[layout].from_parts(
            b, a, interleave(*(random_sparse(f, k, 0.8, seed=s) for s in (4, 5))).to(dtype)
        )
    return packed, *separate(packed.unpack(), f)


@pytest.mark.parametrize("isa", ["reference", *cpu.isas()])
@pytest.mark.parametrize(("dtype", "layout", "params", "kind"), CASES)
# ragged F below and over a chunk, a row block of pairs and a tile; F = 8 n; T of one token to more than a panel
@pytest.mark.parametrize(("t", "f", "k"), [(1, 40, 64), (3, 37, 80), (16, 3, 64), (17, 85, 128), (197, 100, 48)])
def test_accuracy_with_every_epilogue(dtype, layout, params, kind, isa, t, f, k, monkeypatch):
    backend = "reference" if isa == "reference" else "cpu"
    monkeypatch.setenv("RMTKERN_ISA", "" if isa == "reference" else isa)
    packed, gate, up = pack_pair(layout, params, kind, dtype, f, k)
    generator = torch.Generator().manual_seed(t)
    x, bg, bu, s, r = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((t, k), (f,), (f,), (f,), (t, f))
    )
    epilogues = ((False, None, None), (True, None, None), (True, s, None), (False, s, r))
    for activation, (bias, scale, residual) in itertools.product(ops.ACTIVATIONS, epilogues):
        b = interleave(bg, bu) if bias else None
        y = ops.gated_linear(
            x, packed, b, activation=activation, scale=scale, residual=residual, features=f, backend=backend
        )
        assert y.shape == (t, f)
        if kind == FACTORED:  # the middle is rounded to the dtype of x, as two dense products in a row do
            assert_as_two_products(y, x, packed, bias and (bg, bu), activation, residual, scale, f)
            continue
        pair = (gate, bg if bias else None), (up, bu if bias else None)
        assert_as_accurate_as_dense(y, x, *pair[0], activation, residual, scale, up=pair[1])


def assert_as_two_products(y, x, packed, biases, activation, residual, scale, f):
    """The rule, with the dense op of the same factors: their products one after the other."""
    parts = packed.split() if packed.layout == "spectral" else (*packed.factors(), None)

    def dense(kind):
        b, a, s, x_, r_, s_ = (None if p is None else p.to(kind) for p in (*parts, x, residual, scale))
        both = x_ @ a.t() @ b.t()
        if s is not None:
            both = both + x_ @ s.t()
        gate, up = (h.t() for h in separate(both.t().contiguous(), f))
        if biases:
            gate, up = gate + biases[0].to(kind), up + biases[1].to(kind)
        out = ops.FUNCTIONS[activation](gate) * up if activation else gate * up
        out = out if s_ is None else out * s_
        return out if r_ is None else out + r_

    exact = dense(torch.float64)
    error, allowed = (y - exact).abs().max(), 2 * (dense(x.dtype) - exact).abs().max()
    assert error <= allowed + 4 * torch.finfo(x.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_on_threads(dtype):
    packed, gate, up = pack_pair("bitmask", {}, None, dtype, 301, 200)
    x, threads = torch.randn(1000, 200).to(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for w in (packed, LAYOUTS["dense"].pack(packed.unpack(), form=3)):
            y = ops.gated_linear(x, w, features=301)
            assert_as_accurate_as_dense(y, x, gate, None, "silu", up=(up, None))
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_strides():
    packed, gate, up = pack_pair("bitmask", {}, None, torch.float32, 24, 64)
    for shape in ((64,), (2, 3, 64), (7, 64), (0, 64), (2, 0, 64)):
        x = torch.randn(*shape[:-1], 128)[..., ::2]
        r = torch.randn(*x.shape[:-1], 48)[..., ::2]
        y = ops.gated_linear(x, packed, residual=r)
        assert y.shape == (*x.shape[:-1], 24)
        assert_as_accurate_as_dense(y, x, gate, None, "silu", r, up=(up, None))


def test_the_rule_can_fail():
    _, gate, up = pack_pair("bitmask", {}, None, torch.float32, 24, 64)
    x = torch.randn(5, 64)
    swapped = ops.gated_linear(x, LAYOUTS["bitmask"].pack(interleave(up, gate)))
    assert accuracy_excess(swapped, x, gate, None, "silu", up=(up, None)) > 100


def test_errors():
    packed, *_ = pack_pair("bitmask", {}, None, torch.float32, 24, 64)
    x = torch.randn(3, 64)
    with pytest.raises(TypeError, match=r"expected a Tensor and a PackedWeight, got Tensor and Tensor"):
        ops.gated_linear(x, torch.randn(48, 64))
    with pytest.raises(TypeError, match=r"got list and BitmaskWeight"):
        ops.gated_linear([1.0], packed)
    with pytest.raises(ValueError, match=r"features: 16 outputs do not fit the 48 rows of the packed pair; expected N"):
        ops.gated_linear(x, packed, features=16)
    with pytest.raises(ValueError, match=r"features: 0 outputs do not fit"):
        ops.gated_linear(x, packed, features=0)
    with pytest.raises(ValueError, match=r"features: 12 outputs do not fit the 24 rows"):
        ops.gated_linear(x, LAYOUTS["bitmask"].pack(torch.ones(24, 64)))
    with pytest.raises(ValueError, match=r"x has shape \(3, 63\) but the packed weight expects \[..., 64\]"):
        ops.gated_linear(torch.randn(3, 63), packed)
    with pytest.raises(ValueError, match=r"unknown activation 'swish'"):
        ops.gated_linear(x, packed, activation="swish")
    with pytest.raises(ValueError, match=r"bias: expected \[48\] torch.float32, got \[24\]"):
        ops.gated_linear(x, packed, torch.ones(24))
    with pytest.raises(ValueError, match=r"scale: expected \[24\] torch.float32, got \[48\]"):
        ops.gated_linear(x, packed, scale=torch.ones(48))
    with pytest.raises(ValueError, match=r"residual: expected \[3, 24\] torch.float32, got \[3, 48\]"):
        ops.gated_linear(x, packed, residual=torch.ones(3, 48))
    with pytest.raises(KernelUnavailable, match=r"x is torch.float64; cast"):
        ops.gated_linear(x.double(), packed)


def test_the_boundary_refuses():
    w = LAYOUTS["bitmask"].pack(random_sparse(48, 64, 0.5))

    def call(y, **changes):
        arrays = {"bias": None, "scale": None, "residual": None, **changes}
        cpu.extension().linear(
            "bitmask",
            np.zeros((3, 64), np.float32),
            [t.numpy() for t in w.tensors()],
            [],
            y=y,
            activation="silu",
            threads=1,
            gated=True,
            **arrays,
        )

    y = np.zeros((3, 24), np.float32)
    call(y)
    call(np.zeros((3, 17), np.float32))  # 17 outputs need 48 rows, too
    with pytest.raises(ValueError, match=r"part 'masks' must have shape \(32\)"):
        call(np.zeros((3, 16), np.float32))
    with pytest.raises(ValueError, match=r"bias must have shape \(48,\), got \(24,\)"):
        call(y, bias=np.zeros(24, np.float32))
    with pytest.raises(ValueError, match=r"scale must have shape \(24,\), got \(48,\)"):
        call(y, scale=np.zeros(48, np.float32))
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 24\), got \(3, 48\)"):
        call(y, residual=np.zeros((3, 48), np.float32))
    with pytest.raises(ValueError, match=r"a weight needs N, K >= 1"):
        call(np.zeros((3, 0), np.float32))


@pytest.mark.parametrize("f", [1, 7, 8, 9, 24, 37])
def test_pairs_go_and_come_back(f):
    gate, up = torch.randn(f, 5), torch.randn(f, 5)
    pairs = interleave(gate, up)
    assert pairs.shape == (-(-f // 8) * 16, 5) and pairs.is_contiguous()
    for row in range(f):
        assert torch.equal(pairs[row // 8 * 16 + row % 8], gate[row])
        assert torch.equal(pairs[row // 8 * 16 + 8 + row % 8], up[row])
    assert int((pairs != 0).any(1).sum()) == 2 * f  # the rest is zeros
    for got, want in zip(separate(pairs, f), (gate, up), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(interleave(gate[:, 0], up[:, 0]), pairs[:, 0])


def test_pairs_refuse():
    with pytest.raises(TypeError, match=r"up: expected a Tensor \[F, K\] or \[F\], got list"):
        interleave(torch.ones(3), [1.0])
    for up in (torch.ones(2, 4), torch.ones(3, 4).double()):
        with pytest.raises(ValueError, match=r"gate and up: expected the same shape .* got \[3, 4\] torch.float32 and"):
            interleave(torch.ones(3, 4), up)
    with pytest.raises(ValueError, match=r"F >= 1"):
        interleave(torch.ones(0, 4), torch.ones(0, 4))
    with pytest.raises(ValueError, match=r"features: 9 outputs need 32 rows of pairs, got \[16, 4\]"):
        separate(torch.ones(16, 4), 9)


@pytest.mark.parametrize("layout", ["bitmask", "dense"])
def test_compile_and_opcheck(layout):
    packed, *_ = pack_pair(layout, {} if layout == "bitmask" else {"form": 3}, None, torch.float32, 21, 64)
    bias, x = torch.randn(48), torch.randn(2, 5, 64)

    def call(x):
        return ops.gated_linear(x, packed, bias, features=21)

    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        assert torch.equal(torch.compile(call, fullgraph=True, backend=backend)(x), call(x))
    parts = [packed.stored] if layout == "dense" else list(packed.tensors())
    args = (layout, x.view(10, 64), 21, parts, [], bias, "silu", None, None, True)
    torch.library.opcheck(torch.ops.rmtkern.cpu_linear, args, test_utils=("test_schema", "test_faketensor"))


def gated_module(stacked=None, **options):
    torch.manual_seed(0)
    gate, up, bg, bu = random_sparse(21, 64, 0.6), random_sparse(21, 64, 0.6, seed=1), torch.randn(21), torch.randn(21)
    form = LAYOUTS["bitmask"].pack(interleave(gate, up))
    grads = {"requires_grad": (True, False, False, True)} if stacked is None else {"requires_grad": (False, True)}
    module = PackedGatedLinear(form, interleave(bg, bu), features=21, stacked=stacked, **{**grads, **options})
    return module, gate, up, bg, bu


def test_the_module_computes_and_refuses_to_train():
    module, gate, up, bg, bu = gated_module()
    x = torch.randn(2, 5, 64)
    y = module(x)
    assert y.requires_grad
    assert_as_accurate_as_dense(y.detach(), x, gate, bg, "silu", up=(up, bu))
    assert set(module.state_dict()) == {"bias", *(f"weight.{part}" for part in module.weight.parts)}
    assert "out_features=21, bias=True, activation=silu, layout=bitmask, stacked=None" in repr(module)
    with pytest.raises(PackedModelError, match=r"has no backward pass; call rmtkern.unpack_"):
        y.sum().backward()
    with pytest.raises(PackedModelError, match=r"a packed model cannot train"):
        module.train()(x)
    module.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), y)
        assert torch.equal(copy.deepcopy(module)(x), y)


def test_the_module_takes_the_form_of_the_nearest_count():
    dense = LAYOUTS["dense"].pack(interleave(*gated_module()[1:3]), form=3)
    module, gate, up, bg, bu = gated_module(tokens=10, others={100: dense})
    assert module.form(3).layout == "bitmask" and module.form(90) is dense
    x = torch.randn(90, 64)
    assert_as_accurate_as_dense(module(x).detach(), x, gate, bg, "silu", up=(up, bu))


def test_unpack_gives_back_what_was_there():
    module, gate, up, bg, bu = gated_module()
    linears = module.unpack()
    for plain, weight, bias, grads in zip(linears, (gate, up), (bg, bu), ((True, False), (False, True)), strict=True):
        assert type(plain) is torch.nn.Linear and plain.weight.shape == (21, 64) and not plain.training
        assert torch.equal(plain.weight, weight) and torch.equal(plain.bias, bias)
        assert (plain.weight.requires_grad, plain.bias.requires_grad) == grads
    for stacked, order in (("gate", (0, 1)), ("up", (1, 0))):
        (plain,) = gated_module(stacked)[0].unpack()
        assert torch.equal(plain.weight, torch.cat([(gate, up)[i] for i in order]))
        assert torch.equal(plain.bias, torch.cat([(bg, bu)[i] for i in order]))
        assert (plain.weight.requires_grad, plain.bias.requires_grad) == (False, True)
    no_bias = PackedGatedLinear(module.weight, features=21).unpack()
    assert [plain.bias for plain in no_bias] == [None, None]


def test_the_module_refuses():
    form = LAYOUTS["bitmask"].pack(interleave(torch.ones(21, 64), torch.ones(21, 64)))
    with pytest.raises(TypeError, match=r"weight: expected a PackedWeight, got Tensor"):
        PackedGatedLinear(torch.ones(48, 64), features=21)
    with pytest.raises(ValueError, match=r"features: 5 outputs need 16 rows, got 48"):
        PackedGatedLinear(form, features=5)
    with pytest.raises(ValueError, match=r"bias: expected \[48\], got \[21\]"):
        PackedGatedLinear(form, torch.ones(21), features=21)
    with pytest.raises(ValueError, match=r"stacked: expected None, 'gate' or 'up', got 'both'"):
        PackedGatedLinear(form, features=21, stacked="both")
    with pytest.raises(
        ValueError, match=r"requires_grad: expected \(weight, bias\) of each linear, got \(True, False\)"
    ):
        PackedGatedLinear(form, features=21, requires_grad=(True, False))
