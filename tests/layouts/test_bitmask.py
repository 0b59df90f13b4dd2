"""bitmask: the law, the format, and its kernel on every instruction set against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rmtkern.layouts import cpu
from rmtkern.layouts.bitmask import BitmaskWeight, reference
from rmtkern.testing import assert_as_accurate_as_dense as rule

ISAS = cpu.isas()
ACTIVATIONS = {
    None: lambda y: y,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def random_weight(n_rows, n_cols, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n_rows, n_cols, generator=generator) >= sparsity
    return torch.randn(n_rows, n_cols, generator=generator) * kept


def assert_as_accurate_as_dense(got, x, weight, bias, activation, residual, exact):
    """The rule of docs/architecture.md: 2x the error of the dense op, plus 4 eps of the output's scale."""
    dense = ACTIVATIONS[activation](functional.linear(x, weight, bias))
    dense = dense if residual is None else dense + residual
    scale = exact.abs().max()
    allowed = 2 * (dense - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * scale
    assert (got - exact).abs().max() <= allowed


def epilogues(tokens, features):
    """(bias, activation, residual): each alone, and everything at once."""
    bias, residual = torch.randn(features), torch.randn(tokens, features)
    yield None, None, None
    yield bias, None, None
    yield None, None, residual
    for activation in ("gelu", "gelu_tanh", "relu", "silu"):
        yield bias, activation, residual


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", request.param)
    return request.param


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.97, 1])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(131, 67), (128, 128), (1, 130), (259, 61)])
def test_kernel_is_as_accurate_as_dense(isa, tokens, n_rows, n_cols, sparsity):
    torch.manual_seed(tokens)
    weight = random_weight(n_rows, n_cols, sparsity)
    packed = BitmaskWeight.pack(weight)
    x = torch.randn(tokens, n_cols)
    for bias, activation, residual in epilogues(tokens, n_rows):
        exact = reference.linear(x.double(), packed, bias, activation, residual)
        got = cpu.linear(x, packed, bias, activation, residual)
        assert_as_accurate_as_dense(got, x, weight, bias, activation, residual, exact)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.97])
@pytest.mark.parametrize("tokens", [1, 17, 197])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(131, 67), (128, 256), (1, 131), (259, 300), (5, 1)])
def test_bfloat16_kernel_is_as_accurate_as_dense(isa, tokens, n_rows, n_cols, sparsity):
    torch.manual_seed(tokens)
    weight = random_weight(n_rows, n_cols, sparsity).bfloat16()
    packed = BitmaskWeight.pack(weight)
    x, scale = torch.randn(tokens, n_cols).bfloat16(), torch.randn(n_rows).bfloat16()
    bias, residual = torch.randn(n_rows).bfloat16(), torch.randn(tokens, n_rows).bfloat16()
    for tail in ((None, None, None, None), (bias, "gelu", residual, scale)):
        rule(cpu.linear(x, packed, *tail), x, weight, *tail)


@pytest.mark.parametrize("tokens", [5, 100])
def test_bfloat16_inf_and_nan_reach_kept_entries_only(isa, tokens):
    """Also where a pruned entry shares its pair with a kept one."""
    weight = random_weight(130, 200, 0.5).bfloat16()
    packed = BitmaskWeight.pack(weight)
    x = torch.randn(tokens, 200).bfloat16()
    x[2, 5], x[3, 6], x[4, 199] = float("inf"), float("nan"), -float("inf")
    got = cpu.linear(x, packed, None, None, None)
    assert torch.isfinite(got[2]).equal(weight[:, 5] == 0)
    assert torch.isnan(got[3]).equal(weight[:, 6] != 0)
    assert torch.isfinite(got[4]).equal(weight[:, 199] == 0)
    exact = reference.linear(x.double(), packed, None, None, None)
    torch.testing.assert_close(got.double(), exact, equal_nan=True, rtol=0.02, atol=0.02)  # which are finite


def test_bfloat16_bytes():
    """At 50 % at most 0.6 of the dense bfloat16 weight, in memory and on disk: 1 + 1/8 bytes an entry, and the rows."""
    weight = random_weight(3072, 768, 0.5).bfloat16()
    assert BitmaskWeight.pack(weight).nbytes <= 0.6 * weight.nbytes


def test_reference_is_the_definition():
    weight, bias, x = random_weight(140, 70, 0.5), torch.randn(140), torch.randn(5, 70)
    packed = BitmaskWeight.pack(weight)
    for activation, function in ACTIVATIONS.items():
        residual = torch.randn(5, 140)
        expected = function(x.double() @ weight.double().T + bias.double()) + residual.double()
        got = reference.linear(x.double(), packed, bias, activation, residual)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64 on both sides
    with pytest.raises(ValueError, match=r"unknown activation 'tanh'; valid: None, gelu"):
        reference.linear(x, packed, None, "tanh", None)


def test_activations_over_their_whole_range(isa):
    """One weight of 1, so the output is the activation of the input, from denormal to overflow."""
    sizes = torch.cat([torch.logspace(-44, 38, 400, dtype=torch.float64), torch.linspace(0, 20, 4000).double()])
    x = torch.cat([sizes, -sizes]).float()[:, None]
    packed = BitmaskWeight.pack(torch.ones(1, 1))
    for activation, function in ACTIVATIONS.items():
        got = cpu.linear(x, packed, None, activation, None).double()
        exact = reference.linear(x.double(), packed, None, activation, None)
        error, dense = (got - exact).abs(), (function(x).double() - exact).abs()
        # near x, the error of a few roundings of x itself; torch's own error where that is larger
        allowed = 2 * dense + 4 * torch.finfo(torch.float32).eps * x.abs().double() + 1e-38
        assert torch.where(torch.isfinite(exact.float()), error <= allowed, got == exact.float()).all(), activation


def test_inf_and_nan_reach_kept_entries_only(isa):
    weight = random_weight(130, 70, 0.5)
    weight[3] = 0
    packed = BitmaskWeight.pack(weight)
    x = torch.randn(20, 70)
    x[2, 5], x[4, 6], x[6, 7] = float("inf"), float("nan"), -float("inf")
    for activation in ACTIVATIONS:
        got = cpu.linear(x, packed, torch.ones(130), activation, None)
        exact = reference.linear(x.double(), packed, torch.ones(130), activation, None).float()
        torch.testing.assert_close(got, exact, equal_nan=True, rtol=1e-4, atol=1e-4)  # which are finite, not how near
        assert torch.isfinite(got[:, 3]).all()
        assert torch.isfinite(got[4]).equal(weight[:, 6] == 0)


def test_denormal_weights_are_kept(isa):
    weight = torch.zeros(3, 65)
    weight[1, 64] = 1e-42
    packed = BitmaskWeight.pack(weight)
    assert packed.values.numel() == 1 and packed.unpack()[1, 64] == weight[1, 64]
    got = cpu.linear(torch.full((2, 65), 1e30), packed, None, None, None)
    exact = float(weight[1, 64]) * 1e30
    # one product of two exact factors: half an ulp, if the CPU does not flush denormals
    torch.testing.assert_close(got[:, 1].double(), torch.full((2,), exact, dtype=torch.float64), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(n_rows=st.integers(1, 300), n_cols=st.integers(1, 150), sparsity=st.floats(0, 1), seed=st.integers(0, 9))
def test_unpack_returns_what_was_packed(n_rows, n_cols, sparsity, seed):
    weight = random_weight(n_rows, n_cols, sparsity, seed)
    half = weight.bfloat16()
    assert torch.equal(BitmaskWeight.pack(half).unpack().view(torch.int16), (half + 0.0).view(torch.int16))
    packed = BitmaskWeight.pack(weight)
    assert torch.equal(packed.unpack().view(torch.int32), (weight + 0.0).view(torch.int32))
    assert packed.values.numel() == int((weight != 0).sum())
    segments = n_rows * -(-n_cols // 64)
    assert packed.nbytes <= 4 * packed.values.numel() + 9 * segments + 8 * (segments + 1)


def test_negative_zero_becomes_zero():
    weight = torch.tensor([[-0.0, 1.0], [0.0, -0.0]])
    packed = BitmaskWeight.pack(weight)
    assert packed.values.tolist() == [1.0]
    assert not torch.signbit(packed.unpack()).any()


def test_bytes_of_a_vit_layer():
    packed = BitmaskWeight.pack(random_weight(3072, 768, 0.9))
    per_entry = packed.nbytes / (3072 * 768)
    assert per_entry == pytest.approx(0.1 * 4 + 9 / 64, rel=0.01)  # a 64-bit mask and a row byte per 64 columns


def test_full_segments_come_first_in_a_group():
    packed = BitmaskWeight.pack(random_weight(300, 130, 0.5))
    counts = np.bitwise_count(packed.masks.numpy().view(np.uint64)).astype(int)
    for height, start in ((128, 0), (128, 128), (44, 128 * 6)):
        assert (np.diff(counts[start : start + height]) <= 0).all()


def test_pack_keeps_device_and_names_what_it_refuses():
    weight = torch.ones(4, 4)
    assert BitmaskWeight.pack(weight.requires_grad_()).values.requires_grad is False
    with pytest.raises(ValueError, match=r"bitmask takes no params, got \['n'\]"):
        BitmaskWeight.pack(weight, n=2)
    with pytest.raises(
        ValueError, match=r"bitmask: expected dtype torch.float32, torch.bfloat16, torch.float16, got torch.float64"
    ):
        BitmaskWeight.pack(weight.double())
    with pytest.raises(ValueError, match="bitmask: the weight has NaN or Inf entries"):
        BitmaskWeight.pack(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"bitmask: expected a weight \[N, K\]"):
        BitmaskWeight.pack(torch.ones(3))
    with pytest.raises(TypeError, match=r"bitmask: expected a torch.Tensor \[N, K\], got ndarray"):
        BitmaskWeight.pack(np.ones((2, 2)))


def test_supports_gives_the_reason():
    packed = BitmaskWeight.pack(torch.ones(4, 4))
    assert cpu.supports(packed, torch.ones(1, 4)) is None
    assert "torch.float64; cast to torch.float32 or torch.bfloat16" in cpu.supports(
        packed, torch.ones(1, 4, dtype=torch.float64)
    )
    reason = cpu.supports(packed, torch.ones(1, 4).bfloat16())
    assert reason is not None and "x is torch.bfloat16, the weight torch.float32; cast x, or pack" in reason
    assert "device meta" in cpu.supports(packed, torch.ones(1, 4, device="meta"))
    assert reference.supports(packed, torch.ones(1, 4)) is None
    assert "device meta" in reference.supports(packed, torch.ones(1, 4, device="meta"))


def test_op_passes_opcheck_and_compiles_to_the_same():
    packed = BitmaskWeight.pack(random_weight(40, 70, 0.5))
    x, bias, residual = torch.randn(5, 70), torch.randn(40), torch.randn(5, 40)
    for case in ((None, None, None), (bias, "gelu", residual)):
        arguments = ("bitmask", x, 40, list(packed.tensors()), [], *case)
        torch.library.opcheck(torch.ops.rmtkern.cpu_linear.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n_rows"), [(1000, 70), (200, 700), (1, 300), (16, 128), (197, 384), (600, 1100)])
def test_every_thread_count_gives_the_same_bits(isa, tokens, n_rows, dtype):
    packed = BitmaskWeight.pack(random_weight(n_rows, 200, 0.5).to(dtype))
    x, before = torch.randn(tokens, 200).to(dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(cpu.linear(x, packed, None, "gelu", None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("damage", ["more_bits", "fewer_bits", "row", "outside", "starts", "end", "negative", "order"])
def test_damaged_parts_are_refused_before_anything_is_read(isa, damage):
    weight = random_weight(150, 70, 0.5)
    weight[7] = 0
    weight[:, 63] = 0  # so that no mask is negative
    packed = BitmaskWeight.pack(weight)
    if damage == "more_bits":
        packed.masks[0] = -1
    elif damage == "fewer_bits":
        packed.masks[0] = 0
    elif damage == "row":
        packed.rows[-1] = 22  # the last row block has rows 0 to 21
    elif damage == "outside":
        packed.masks[-1] = 1 << 6  # the last column block has columns 0 to 5
    elif damage == "starts":
        packed.starts[1] += 1
    elif damage == "end":
        packed.starts[-1] += 1
    elif damage == "negative":
        packed.starts[0] = -8
    elif damage == "order":
        packed.masks[:128] = packed.masks[:128].sort().values  # as many bits, an empty segment before full ones
    with pytest.raises(ValueError, match="bitmask: masks, rows, starts and values disagree; pack the weight again"):
        cpu.linear(torch.randn(3, 70), packed, None, None, None)
