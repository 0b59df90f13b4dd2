"""lowrank: its law, what it refuses, what it offers, and its kernel on every instruction set."""

import pytest
import torch

from rmtkern import ops
from rmtkern.layouts import cpu
from rmtkern.layouts.factors import tolerance, truncation_errors
from rmtkern.layouts.lowrank import LowRankWeight
from rmtkern.testing import assert_as_accurate_as_dense

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=cpu.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", request.param)
    return request.param


def factors(n, k, rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + k)
    b = torch.randn(n, rank, generator=generator) / rank**0.5
    return b.to(dtype), (torch.randn(rank, k, generator=generator) / k**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
@pytest.mark.parametrize(("n", "k", "rank"), [(1, 1, 1), (53, 67, 5), (131, 129, 33), (64, 300, 64)])
def test_kernel_is_as_accurate_as_dense(isa, tokens, n, k, rank, dtype):
    torch.manual_seed(tokens)
    packed = LowRankWeight.from_factors(*factors(n, k, rank, dtype))
    x, bias, scale = (torch.randn(*shape).to(dtype) for shape in ((tokens, k), (n,), (n,)))
    residual = torch.randn(tokens, n).to(dtype)
    for activation in ops.ACTIVATIONS:
        y = ops.linear(x, packed, bias, activation=activation, scale=scale, residual=residual)
        assert_as_accurate_as_dense(y, x, packed.unpack(), bias, activation, residual, scale)
    # the reference has the same factors, but no rounding: of the middle and of the output, 1/2 eps each
    exact = ops.linear(x.double(), packed, backend="reference")
    error = (ops.linear(x, packed).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_law_of_factored_layouts(dtype):
    b, a = factors(53, 67, 7, dtype)
    packed = LowRankWeight.from_factors(b, a)
    back_b, back_a = packed.factors()
    assert torch.equal(back_b, b) and torch.equal(back_a, a)
    assert torch.equal(packed.unpack(), (b.double() @ a.double()).to(dtype) + 0.0)
    assert packed.label == "lowrank(rank=7)"
    w = packed.unpack()
    again = LowRankWeight.pack(w, rank=7).unpack()
    # both factors and both products are rounded: 1/2 eps each; 4 eps leaves room for the truncation of that rounding
    assert (again - w).norm() <= 4 * torch.finfo(dtype).eps * w.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(120, 80), (80, 120)])
def test_variants_offer_the_numerical_rank_where_it_gains(shape, dtype):
    low = LowRankWeight.from_factors(*factors(*shape, 9, dtype)).unpack()
    assert list(LowRankWeight.variants(low)) == [{"rank": 9}]
    high = LowRankWeight.from_factors(*factors(*shape, 40, dtype)).unpack()
    assert list(LowRankWeight.variants(high)) == []  # 40 * 200 is not below 0.8 * 9600
    assert list(LowRankWeight.variants(torch.randn(shape).to(dtype))) == []
    assert list(LowRankWeight.variants(torch.zeros(shape, dtype=dtype))) == [{"rank": 1}]


def test_truncation_errors_are_those_of_the_svd():
    w = torch.randn(30, 20)
    s = torch.linalg.svdvals(w.double())
    exact = torch.stack([s[rank:].square().sum().sqrt() for rank in range(21)]) / s.norm()
    torch.testing.assert_close(truncation_errors(w), exact, rtol=1e-6, atol=1e-7)  # resolved down to 1e-8
    torch.testing.assert_close(truncation_errors(w.T), exact, rtol=1e-6, atol=1e-7)


def test_what_is_refused():
    w = torch.randn(20, 30)
    error = float(truncation_errors(w)[5])
    with pytest.raises(
        ValueError, match=rf"rank 5 leaves {error:.2g} of the weight's norm, more than 2.4e-07 \(2 eps of"
    ):
        LowRankWeight.pack(w, rank=5)
    assert error > tolerance(torch.float32)
    for rank in (0, 21):
        with pytest.raises(ValueError, match=rf"rank must be 1 to 20 for a weight of \(20, 30\), got {rank}"):
            LowRankWeight.pack(w, rank=rank)
    with pytest.raises(ValueError, match=r"lowrank takes the param rank, got \['n'\]"):
        LowRankWeight.pack(w, n=2)
    with pytest.raises(
        ValueError, match=r"expected factors B \[N, R\] and A \[R, K\] of one dtype and device, got \[4, 3\]"
    ):
        LowRankWeight.from_factors(torch.ones(4, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="expected factors"):
        LowRankWeight.from_factors(torch.ones(4, 2), torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"a rank of at most min\(N, K\) = 2, got 3; multiply"):
        LowRankWeight.from_factors(torch.ones(2, 3), torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
        LowRankWeight.from_factors([[1.0]], torch.ones(1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_parts_are_refused(dtype):
    packed, x = LowRankWeight.from_factors(*factors(40, 50, 7, dtype)), torch.randn(3, 50).to(dtype)
    a, b = packed.tensors()
    call = torch.ops.rmtkern.cpu_linear
    for parts, name in (([a[:-1], b], "a"), ([a, b[:-1]], "b"), ([a.flatten(), b], "a")):
        with pytest.raises(ValueError, match=rf"part '{name}' must have shape"):
            call("lowrank", x, 40, parts, [7], None, None, None, None)
    with pytest.raises(ValueError, match="part 'b' is missing: got 1 parts"):
        call("lowrank", x, 40, [a], [7], None, None, None, None)
    for params in ([], [0], [41], [-1], [7, 7]):
        with pytest.raises(ValueError, match=r"lowrank: params must be \(rank\), 1 <= rank <= min\(N, K\)"):
            call("lowrank", x, 40, [a, b], params, None, None, None, None)


def test_inf_and_nan_propagate(isa):
    packed, x = LowRankWeight.from_factors(*factors(40, 50, 7)), torch.randn(5, 50)
    x[1, 3], x[3, 0] = float("inf"), float("nan")
    y = ops.linear(x, packed)
    assert y.isfinite().all(1).tolist() == [True, False, True, False, True]
    assert torch.equal(y[3].isnan(), torch.ones(40, dtype=torch.bool))


@pytest.mark.parametrize("tokens", [1, 100, 800])
def test_the_same_on_any_number_of_threads(tokens):
    packed, x = LowRankWeight.from_factors(*factors(70, 90, 20)), torch.randn(tokens, 90)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])  # one thread sums an output
    assert_as_accurate_as_dense(results[0], x, packed.unpack())
