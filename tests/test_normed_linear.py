"""normed_linear(): LayerNorm and a packed linear in one kernel; every layout and instruction set, Inf, NaN, errors."""

import pytest
import torch
from torch.nn import functional as F

from rmtkern import ops
from rmtkern.layer_norm import layer_norm
from rmtkern.layouts import LAYOUTS, cpu
from rmtkern.mlp import mlp, normed_linear
from rmtkern.testing import excess_over, random_sparse
from tests.test_mlp import FORMS, packed_of, tensors

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason="the extension is not built")
CASES = [(dtype, form) for dtype, forms in FORMS.items() for form in forms]
IDS = [f"{dtype}-{form[0]}{list(form[1].values())}"[6:] for dtype, form in CASES]


def dense(kind, x, norm, w, bias, activation):
    x, weight, shift, w, bias = (None if t is None else t.to(kind) for t in (x, *norm[:2], w, bias))
    y = F.linear(F.layer_norm(x, x.shape[-1:], weight, shift, norm[2]), w, bias)
    return F.gelu(y) if activation == "gelu" else y


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("dtype", "form"), CASES, ids=IDS)
def test_accuracy_and_the_bits_of_both_kernels(dtype, form, isa, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    k, n = 80, 131
    w, packed = packed_of(form, n, k, dtype)
    weight, shift, bias = tensors(dtype, (k,), (k,), (n,))
    for tokens in (1, 3, 17, 101, 230):
        (x,) = tensors(dtype, (tokens, k), seed=tokens)
        x = x * 3 + 1
        for norm in ((weight, shift, 1e-6), (None, None, 1e-3), (weight, None, 1e-5)):
            y = normed_linear(x, packed, bias, norm=norm, activation="gelu")
            exact = dense(torch.float64, x, norm, w, bias, "gelu")
            assert excess_over(y, dense(dtype, x, norm, w, bias, "gelu"), exact) <= 1
            two = ops.linear(layer_norm(x, *norm[:2], eps=norm[2]), packed, bias, activation="gelu")
            assert excess_over(y, two, exact) <= 1


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("k", [1, 2, 7, 31, 97, 129])
def test_rows_that_end_inside_a_vector(dtype, k, isa, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    w = random_sparse(9, k, 0.3).to(dtype)
    weight, shift = tensors(dtype, (k,), (k,))
    for tokens in (1, 19):
        (x,) = tensors(dtype, (tokens, k), seed=tokens)
        y = normed_linear(x, LAYOUTS["bitmask"].pack(w), norm=(weight, shift, 1e-5))
        norm = weight, shift, 1e-5
        assert excess_over(y, dense(dtype, x, norm, w, None, None), dense(torch.float64, x, norm, w, None, None)) <= 1


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", FORMS)
def test_inf_and_nan_spoil_their_row_only(dtype, isa, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", isa)
    w = random_sparse(40, 37, 0.5, seed=1).to(dtype)
    w[3] = 0  # pruned entries multiply nothing, not even NaN
    packed = LAYOUTS["bitmask"].pack(w)
    (x,) = tensors(dtype, (30, 37))
    clean = normed_linear(x, packed, norm=(None, None, 1e-5))
    x[1, 36], x[20, 0] = float("inf"), float("nan")
    y = normed_linear(x, packed, norm=(None, None, 1e-5))
    spoiled = torch.zeros(30, dtype=torch.bool)
    spoiled[[1, 20]] = True
    assert torch.equal(y[~spoiled], clean[~spoiled])
    assert (y[spoiled][:, 3] == 0).all()
    assert y[spoiled][:, w.abs().sum(1) > 0].isnan().all()


def test_an_mlp_normalises_too_on_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype, forms in FORMS.items():
                for form in forms:
                    (_, p1), (_, p2) = packed_of(form, 132, 64, dtype, 1), packed_of(form, 40, 132, dtype, 2)
                    x, weight, shift = tensors(dtype, (200, 64), (64,), (64,))
                    y = mlp(x, p1, p2, norm=(weight, shift, 1e-6))
                    two = mlp(layer_norm(x, weight, shift, eps=1e-6), p1, p2)
                    assert torch.equal(y, two)
    finally:
        torch.set_num_threads(before)


def test_shapes_compile_opcheck_fallback_and_errors(monkeypatch):
    packed = LAYOUTS["bitmask"].pack(random_sparse(24, 64, 0.5))
    weight, shift = tensors(torch.float32, (64,), (64,))
    norm = weight, shift, 1e-5
    for x in (torch.randn(64), torch.randn(2, 3, 64), torch.randn(64, 7).t(), torch.randn(0, 64)):
        y = normed_linear(x, packed, norm=norm)
        assert y.shape == (*x.shape[:-1], 24)
        if x.numel():
            assert torch.equal(y, ops.linear(layer_norm(x, weight, shift), packed))
    x = torch.randn(5, 64)
    compiled = torch.compile(lambda x: normed_linear(x, packed, norm=norm) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * normed_linear(x, packed, norm=norm))
    arguments = ("bitmask", x, 24, list(packed.tensors()), [], None, None, None, None, False, weight, None, 1e-5)
    torch.library.opcheck(torch.ops.rmtkern.cpu_linear.default, arguments)
    for plain in (LAYOUTS["dense"].pack(packed.unpack()), LAYOUTS["dense"].pack(packed.unpack(), form=3)):
        torch.testing.assert_close(normed_linear(x, plain, norm=norm), normed_linear(x, packed, norm=norm))
    with pytest.raises(TypeError, match="expected a Tensor and a PackedWeight, got Tensor and Tensor"):
        normed_linear(x, packed.unpack(), norm=norm)
    with pytest.raises(ValueError, match=r"x has shape|weight: expected \[63\]"):
        normed_linear(x[:, :63], packed, norm=norm)
    with pytest.raises(ValueError, match=r"norm: expected eps >= 0, got -1"):
        normed_linear(x, packed, norm=(weight, shift, -1.0))
    with pytest.raises(ValueError, match=r"the norm's weight: expected \[64\] torch.float32 on the cpu, got \[9\]"):
        normed_linear(x, packed, norm=(torch.ones(9), None, 1e-5))
    with pytest.raises(ValueError, match=r"the norm's bias must have shape \(64,\), got \(9,\)"):
        cpu.linear(x, packed, None, None, None, norm=(weight, torch.ones(9), 1e-5))
    monkeypatch.setenv("RMTKERN_BACKEND", "reference")
    torch.testing.assert_close(
        normed_linear(x, packed, norm=norm), F.linear(F.layer_norm(x, (64,), weight, shift), packed.unpack())
    )
