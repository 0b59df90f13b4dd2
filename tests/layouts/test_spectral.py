"""spectral: its law, what it refuses, and its kernel on every instruction set."""

import pytest
import torch

from rmtkern import ops
from rmtkern.layouts import cpu
from rmtkern.layouts.spectral import SpectralWeight
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=cpu.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", request.param)
    return request.param


def split(n, k, rank, sparsity=0.9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + k)
    b = torch.randn(n, rank, generator=generator) / rank**0.5
    a = torch.randn(rank, k, generator=generator) / k**0.5
    return b.to(dtype), a.to(dtype), random_sparse(n, k, sparsity).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
# one entry; odd and prime, with a rest of a strip and of a block; a middle of more than one block of 64 columns
@pytest.mark.parametrize(
    ("n", "k", "rank", "sparsity"), [(1, 1, 1, 0.0), (53, 67, 5, 0.97), (131, 129, 33, 0.5), (142, 200, 135, 1.0)]
)
def test_kernel_is_as_accurate_as_dense(isa, tokens, n, k, rank, sparsity, dtype):
    torch.manual_seed(tokens)
    packed = SpectralWeight.from_parts(*split(n, k, rank, sparsity, dtype))
    x, bias, scale = (torch.randn(*shape).to(dtype) for shape in ((tokens, k), (n,), (n,)))
    residual = torch.randn(tokens, n).to(dtype)
    for activation in ops.ACTIVATIONS:
        y = ops.linear(x, packed, bias, activation=activation, scale=scale, residual=residual)
        assert_as_accurate_as_dense(y, x, packed.unpack(), bias, activation, residual, scale)
    # the reference has the same parts, but no rounding: of the middle and of the output, 1/2 eps each
    exact = ops.linear(x.double(), packed, backend="reference")
    error = (ops.linear(x, packed).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_definition(dtype):
    b, a, s = split(133, 150, 7, 0.8, dtype)
    x = torch.randn(4, 150).double()
    got = ops.linear(x, SpectralWeight.from_parts(b, a, s), backend="reference")
    expected = x @ (b.double() @ a.double() + s.double()).T
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # float64 on both sides


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_law_of_factored_layouts(dtype):
    b, a, s = split(53, 67, 7, 0.9, dtype)
    s[0, 0] = -0.0
    packed = SpectralWeight.from_parts(b, a, s)
    back = packed.split()
    assert torch.equal(back[0], b) and torch.equal(back[1], a) and torch.equal(back[2], s)
    assert not torch.signbit(back[2][0, 0])
    assert torch.equal(packed.unpack(), (b.double() @ a.double() + s.double()).to(dtype) + 0.0)
    assert packed.label == "spectral(rank=7)"


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_finds_parts_on_rows_and_columns_of_their_own(dtype):
    # large factors on the first half, small entries on the other: the singular vectors are those of the factors
    w = torch.zeros(60, 80, dtype=dtype)
    b, a, _ = split(30, 40, 3)
    w[:30, :40] = (b @ a).to(dtype)
    s = (random_sparse(30, 40, 0.9) * 0.1).to(dtype)
    w[30:, 40:] = s
    packed = SpectralWeight.pack(w, rank=3)
    # rounding of the factors, the product and the remainder, 1/2 eps each, and what counts as zero: 2 eps
    assert (packed.unpack() - w).norm() <= 4 * torch.finfo(dtype).eps * w.norm()
    assert packed.split()[2][30:, 40:].count_nonzero() >= 0.8 * s.count_nonzero()
    assert list(SpectralWeight.variants(w)) == []  # only when named


def test_what_is_refused():
    w = torch.randn(20, 30)
    with pytest.raises(ValueError, match=r"spectral: after rank 5 the remainder has \d+ of 600 entries left"):
        SpectralWeight.pack(w, rank=5)
    assert SpectralWeight.reason_against(w, rank=5).endswith(
        "use from_parts with a sparse remainder, or another layout"
    )
    for rank in (0, 21):
        with pytest.raises(ValueError, match=rf"rank must be 1 to 20 for a weight of \(20, 30\), got {rank}"):
            SpectralWeight.pack(w, rank=rank)
    with pytest.raises(ValueError, match=r"spectral takes the param rank, got \[\]"):
        SpectralWeight.pack(w)
    b, a, s = split(20, 30, 4)
    with pytest.raises(ValueError, match=r"expected a sparse part \[20, 30\] torch.float32 on cpu as the factors"):
        SpectralWeight.from_parts(b, a, s.T)
    with pytest.raises(ValueError, match=r"expected factors B \[N, R\] and A \[R, K\]"):
        SpectralWeight.from_parts(b, a[:3], s)
    s[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf entries; repair the checkpoint"):
        SpectralWeight.from_parts(b, a, s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_parts_are_refused(isa, dtype):
    packed, x = SpectralWeight.from_parts(*split(140, 150, 7, 0.9, dtype)), torch.randn(3, 150).to(dtype)
    call = torch.ops.rmtkern.cpu_linear

    def damaged(part, change):
        parts = [tensor.clone() for tensor in packed.tensors()]
        parts[part] = change(parts[part])
        return parts

    def changed(index, value):
        def change(tensor):
            tensor[index] = value
            return tensor

        return change

    for part, change in ((1, changed(3, -1)), (2, changed(0, 139)), (3, changed(1, 2**40)), (0, lambda t: t[:-1])):
        with pytest.raises(ValueError, match="spectral: masks, rows, starts and values disagree; pack"):
            call("spectral", x, 140, damaged(part, change), [7], None, None, None, None)
    for part, name in ((1, "masks"), (2, "rows"), (3, "starts"), (4, "a"), (5, "b")):
        with pytest.raises(ValueError, match=rf"part '{name}' must have shape"):
            call("spectral", x, 140, damaged(part, lambda t: t[:-1]), [7], None, None, None, None)
    for params in ([], [0], [141], [-1], [7, 7]):
        with pytest.raises(ValueError, match=r"spectral: params must be \(rank\), 1 <= rank <= min\(N, K\)"):
            call("spectral", x, 140, list(packed.tensors()), params, None, None, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_stay_in_their_token(isa, dtype, value):
    packed, x = SpectralWeight.from_parts(*split(40, 50, 7, 0.9, dtype)), torch.randn(37, 50).to(dtype)
    clean = ops.linear(x, packed)
    x[3, 11] = value
    y = ops.linear(x, packed)
    assert not y[3].isfinite().any()  # every output has a factor on every column
    others = torch.arange(37) != 3
    # bfloat16 sums the pairs of a panel with Inf another way: a last bit
    torch.testing.assert_close(y[others], clean[others], rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 100, 300])
def test_the_same_on_any_number_of_threads(tokens):
    packed, x = SpectralWeight.from_parts(*split(300, 90, 20)), torch.randn(tokens, 90)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, packed))
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert_as_accurate_as_dense(result, x, packed.unpack())


def test_rounding_of_an_entry_far_above_the_others_is_no_remainder():
    for seed in range(40):
        torch.manual_seed(seed)
        weight = torch.randn(1, 1) @ (torch.randn(1, 16) * (torch.rand(1, 16) > 0.6) * 10)
        if bool(weight.any()):
            assert SpectralWeight.pack(weight, rank=1).split()[2].count_nonzero() == 0
