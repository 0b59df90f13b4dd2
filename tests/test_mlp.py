"""mlp(): accuracy of every pair of layouts on every instruction set, Inf and NaN, damage, threads, errors, compile."""

import itertools

import numpy as np
import pytest
import torch

from rmtkern import ops
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS, cpu
from rmtkern.mlp import mlp, reason_against
from rmtkern.testing import random_sparse
from tests.layouts.test_contract import FACTORED, weight
from tests.parallel import wrong_in_threads

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason="the extension is not built")

OWN = ("dense", {"form": 3}, None)
FORMS = {
    torch.float32: [
        OWN,
        ("bitmask", {}, None),
        ("block", {"r": 2, "c": 1}, None),
        ("block", {"r": 8, "c": 1}, None),
        ("nofm", {"n": 2, "m": 4}, (2, 4)),
        ("lowrank", {"rank": 1}, FACTORED),
        ("spectral", {"rank": 1}, FACTORED),
    ],
    torch.bfloat16: [
        OWN,
        ("bitmask", {}, None),
        ("block", {"r": 1, "c": 2}, None),
        ("block", {"r": 4, "c": 2}, None),
        ("nofm", {"n": 2, "m": 4}, (2, 4)),
        ("nofm", {"n": 2, "m": 4, "r": 4}, (2, 4)),
    ],
}
PAIRS = [(dtype, *pair) for dtype, forms in FORMS.items() for pair in itertools.product(forms, forms)]
IDS = [f"{dtype}-{a[0]}{list(a[1].values())}-{b[0]}{list(b[1].values())}"[6:] for dtype, a, b in PAIRS]


def packed_of(form, n, k, dtype, seed=0):
    """A random weight [n, k], and the same in a form."""
    layout, params, kind = form
    if params.get("r") == 4 and layout == "nofm":
        w = weight((-(-n // 4), k), kind, seed=seed).repeat_interleave(4, 0)[:n].to(dtype)
    else:
        w = weight((n, k), kind, seed=seed).to(dtype)
    packed = LAYOUTS[layout].pack(w, **params)
    return packed.unpack(), packed


def chain(kind, x, w1, b1, activation, w2, b2, scale=None, residual=None):
    """The definition in a dtype; float64 is the reference."""
    tensors = [None if t is None else t.to(kind) for t in (x, w1, b1, w2, b2, scale, residual)]
    x, w1, b1, w2, b2, scale, residual = tensors
    h = torch.nn.functional.linear(x, w1, b1)
    if activation == "gelu_tanh":
        h = torch.nn.functional.gelu(h, approximate="tanh")
    elif activation is not None:
        h = getattr(torch.nn.functional, activation)(h)
    y = torch.nn.functional.linear(h, w2, b2)
    y = y if scale is None else y * scale
    return y if residual is None else y + residual


def assert_accurate(y, *call):
    """The rule of the project for two linears: twice the error of PyTorch's in this dtype, plus 4 eps of the scale."""
    exact = chain(torch.float64, *call)
    dense = chain(y.dtype, *call)
    allowed = 2 * (dense - exact).abs().max() + 4 * torch.finfo(y.dtype).eps * exact.abs().max()
    assert y.shape == exact.shape
    assert (y - exact).abs().max() <= allowed


def tensors(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("dtype", "first", "second"), PAIRS, ids=IDS)
def test_accuracy_of_every_pair_of_layouts(dtype, first, second, isa, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    k, hidden, n = 80, 144, 53  # more hidden features than a row block
    (w1, p1), (w2, p2) = packed_of(first, hidden, k, dtype, 1), packed_of(second, n, hidden, dtype, 2)
    b1, b2, scale = tensors(dtype, (hidden,), (n,), (n,))
    for tokens, activation in ((1, "gelu"), (17, "silu"), (101, "relu")):
        x, residual = tensors(dtype, (tokens, k), (tokens, n), seed=tokens)
        assert reason_against(x, p1, p2) is None
        for rest in ((None, None, None, None), (b1, b2, None, None), (b1, None, scale, residual)):
            a, b, s, r = rest
            y = mlp(x, p1, p2, first_bias=a, second_bias=b, activation=activation, scale=s, residual=r)
            assert_accurate(y, x, w1, a, activation, w2, b, s, r)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_every_size_activation_and_thread_count(dtype, isa, threads, sparsity, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for k, hidden, n in ((7, 1, 1), (64, 131, 17), (129, 259, 131)):  # odd hidden features end in half a pair
            w1, w2 = (random_sparse(*shape, sparsity, seed=n).to(dtype) for shape in ((hidden, k), (n, hidden)))
            p1, p2 = LAYOUTS["bitmask"].pack(w1), LAYOUTS["bitmask"].pack(w2)
            b1, b2 = tensors(dtype, (hidden,), (n,))
            for tokens, activation in zip((1, 3, 16, 97, 230), ops.ACTIVATIONS, strict=True):
                (x,) = tensors(dtype, (tokens, k), seed=tokens)
                y = mlp(x, p1, p2, first_bias=b1, second_bias=b2, activation=activation)
                assert_accurate(y, x, w1, b1, activation, w2, b2)
                two = ops.linear(ops.linear(x, p1, b1, activation=activation), p2, b2)
                assert_accurate(two, x, w1, b1, activation, w2, b2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("dtype", "first", "second"), PAIRS, ids=IDS)
def test_inf_and_nan_pass_as_through_two_linears(dtype, first, second, isa, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    (_, p1), (_, p2) = packed_of(first, 132, 64, dtype, 1), packed_of(second, 40, 132, dtype, 2)
    (x,) = tensors(dtype, (120, 64))
    x[3, 5], x[50, 63], x[119, 0] = float("nan"), float("inf"), -float("inf")  # the last is in a panel's tail
    for activation in (None, "relu", "gelu"):
        y = mlp(x, p1, p2, activation=activation)
        two = ops.linear(ops.linear(x, p1, activation=activation), p2)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(two))
        clean = torch.ones(120, dtype=torch.bool)
        clean[[3, 50, 119]] = False
        assert y[clean].isfinite().all()


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("tokens", [5, 250])  # 250: the weight's pairs are made first
def test_pruned_entries_multiply_nothing_that_lies_between(isa, tokens, monkeypatch):
    """The hidden features become Inf; where the second weight is zero, that is none of the output's business."""
    monkeypatch.setenv("RMTKERN_ISA", isa)
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("bitmask", "block")):
        params = {} if layout == "bitmask" else {"r": 1, "c": 2} if dtype == torch.bfloat16 else {"r": 2, "c": 1}
        w1, w2 = torch.zeros(130, 64, dtype=dtype), torch.zeros(4, 130, dtype=dtype)
        w1[128, 0], w1[1, 1] = 3e38, 1.0
        w2[0, 1], w2[2, 128] = 2.0, 1.0
        x = torch.zeros(tokens, 64, dtype=dtype)
        x[:, 0], x[:, 1] = 1e3, 1.0
        y = mlp(x, LAYOUTS[layout].pack(w1, **params), LAYOUTS[layout].pack(w2, **params), activation=None)
        assert torch.equal(y[:, 0], torch.full((tokens,), 2.0, dtype=dtype))
        assert y[:, 2].isposinf().all()
        assert (y[:, [1, 3]] == 0).all() or layout == "block"


@pytest.mark.parametrize("isa", cpu.isas())
def test_damaged_parts_are_refused(isa, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    for dtype, tokens, broken in itertools.product((torch.float32, torch.bfloat16), (3, 250), (0, 1)):
        both = [LAYOUTS["bitmask"].pack(random_sparse(96, 96, 0.5, seed=i).to(dtype)) for i in range(2)]
        both[broken].masks[0] = -1
        x = torch.zeros(tokens, 96, dtype=dtype)
        message = r"mlp of bitmask and bitmask: masks, rows, starts and values disagree; pack the weights again"
        with pytest.raises(ValueError, match=message):
            mlp(x, *both)


def test_two_python_threads_may_share_the_weights():
    for dtype in (torch.float32, torch.bfloat16):
        p1 = LAYOUTS["bitmask"].pack(random_sparse(200, 150, 0.5).to(dtype))
        p2 = LAYOUTS["bitmask"].pack(random_sparse(150, 200, 0.5).to(dtype))
        inputs = [torch.randn(tokens, 150).to(dtype) for tokens in (1, 40, 97, 300)]
        assert wrong_in_threads(lambda x, p1=p1, p2=p2: mlp(x, p1, p2), inputs, threads=3, calls=20) == []


def test_shapes_strides_compile_and_opcheck():
    p1, p2 = LAYOUTS["bitmask"].pack(random_sparse(40, 64, 0.5)), LAYOUTS["dense"].pack(torch.randn(24, 40), form=3)
    for x in (
        torch.randn(64),
        torch.randn(2, 3, 64),
        torch.randn(64, 7).t(),
        torch.randn(0, 64),
        torch.randn(2, 0, 64),
    ):
        residual = torch.randn(*x.shape[:-1], 48)[..., ::2]
        kept = x.clone()
        y = mlp(x, p1, p2, residual=residual)
        assert y.shape == (*x.shape[:-1], 24) and torch.equal(x, kept)
        if y.numel():
            assert_accurate(y, x, p1.unpack(), None, "gelu", p2.unpack(), None, None, residual)
    x = torch.randn(5, 64)
    compiled = torch.compile(lambda x: mlp(x, p1, p2) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * mlp(x, p1, p2))
    for tail in ((None, None, None, None), (torch.randn(40), torch.randn(24), "gelu", torch.randn(5, 24))):
        arguments = ("bitmask", "dense", x, 40, 24, list(p1.tensors()), list(p2.cpu_tensors()), [], [3, 1], *tail)
        torch.library.opcheck(torch.ops.rmtkern.cpu_mlp.default, arguments)


def test_it_falls_back_to_two_linears(monkeypatch):
    bitmask = LAYOUTS["bitmask"].pack(random_sparse(40, 64, 0.5))
    torch_form = LAYOUTS["dense"].pack(torch.randn(24, 40))
    x = torch.randn(5, 64)
    assert reason_against(x, bitmask, torch_form) == "dense/torch: another library computes it"
    assert torch.equal(mlp(x, bitmask, torch_form), ops.linear(ops.linear(x, bitmask, activation="gelu"), torch_form))
    own = LAYOUTS["dense"].pack(torch.randn(24, 40), form=3)
    assert reason_against(x, bitmask, own) is None
    assert "x is torch.float64; cast to" in reason_against(x.double(), bitmask, own)
    monkeypatch.setenv("RMTKERN_BACKEND", "reference")
    assert reason_against(x, bitmask, own) == "RMTKERN_BACKEND is 'reference'"
    np.testing.assert_allclose(
        mlp(x, bitmask, own), chain(torch.float64, x, bitmask.unpack(), None, "gelu", own.unpack(), None), atol=1e-5
    )


def test_errors():
    p1, p2 = LAYOUTS["bitmask"].pack(torch.eye(5, 8)), LAYOUTS["bitmask"].pack(torch.eye(6, 5))
    x = torch.ones(3, 8)
    with pytest.raises(TypeError, match="expected a Tensor and two PackedWeights, got Tensor, BitmaskWeight, Tensor"):
        mlp(x, p1, torch.ones(6, 5))
    with pytest.raises(ValueError, match=r"second: expected \[N, 5\], as the first gives 5 features, got \(5, 8\)"):
        mlp(x, p1, p1)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\) but the packed weight expects \[..., 8\]"):
        mlp(x[:, :7], p1, p2)
    with pytest.raises(ValueError, match="unknown activation 'swish'; valid: None, gelu"):
        mlp(x, p1, p2, activation="swish")
    for name, size in (("first_bias", 5), ("second_bias", 6), ("scale", 6)):
        with pytest.raises(ValueError, match=rf"{name}: expected \[{size}\] torch.float32 on the cpu, got \[9\]"):
            mlp(x, p1, p2, **{name: torch.ones(9)})
    with pytest.raises(ValueError, match=r"residual: expected \[3, 6\] torch.float32 on the cpu, got \[3, 5\]"):
        mlp(x, p1, p2, residual=torch.ones(3, 5))
    with pytest.raises(KernelUnavailable, match=r"x is torch\.float64; cast to"):
        mlp(x.double(), p1, p2)
    with pytest.raises(KernelUnavailable, match="dense/torch is another library's form"):
        cpu.mlp(x, LAYOUTS["dense"].pack(torch.ones(5, 8)), p2, (None, None), None, None)
