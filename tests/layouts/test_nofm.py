"""nofm: the law, what it refuses, and its kernel on every instruction set against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rmtkern.layouts import cpu
from rmtkern.layouts.nofm import NofMWeight, reference

ISAS = cpu.isas()


def random_weight(n_rows, n_cols, n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(n_rows, n_cols // m, m, generator=generator)
    dropped = torch.rand(groups.shape, generator=generator).argsort(-1)[..., n:]
    return groups.scatter(-1, dropped, 0.0).view(n_rows, n_cols)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", request.param)
    return request.param


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
@pytest.mark.parametrize(
    ("n", "m", "n_rows", "n_cols"),
    [
        (2, 4, 131, 128),
        (2, 4, 67, 72),
        (1, 3, 130, 201),
        (3, 5, 7, 200),
        (4, 8, 1, 136),
        (5, 7, 20, 133),
        (16, 16, 3, 80),
    ],
)
def test_kernel_is_as_accurate_as_dense(isa, tokens, n, m, n_rows, n_cols):
    torch.manual_seed(tokens)
    weight = random_weight(n_rows, n_cols, n, m)
    packed = NofMWeight.pack(weight, n=n, m=m)
    x, bias, residual = torch.randn(tokens, n_cols), torch.randn(n_rows), torch.randn(tokens, n_rows)
    for case in ((None, None, None), (bias, "gelu", residual)):
        exact = reference.linear(x.double(), packed, *case)
        got = cpu.linear(x, packed, *case)
        dense = functional.linear(x, weight, case[0])
        dense = dense if case[1] is None else functional.gelu(dense) + residual
        # the rule of docs/architecture.md: 2x the error of the dense op, plus 4 eps of the output's scale
        allowed = 2 * (dense - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (got - exact).abs().max() <= allowed


def test_reference_is_the_definition():
    weight, x = random_weight(9, 70, 2, 5), torch.randn(4, 70).double()
    got = reference.linear(x, NofMWeight.pack(weight, n=2, m=5), None, None, None)
    torch.testing.assert_close(got, x @ weight.double().T, rtol=1e-12, atol=1e-12)  # float64 on both sides
    packed = NofMWeight.pack(weight, n=2, m=5)
    assert reference.supports(packed, x) is None
    assert "device meta" in reference.supports(packed, x.to("meta"))


@settings(deadline=None, max_examples=60)
@given(
    n_rows=st.integers(1, 40),
    groups=st.integers(1, 30),
    m=st.integers(1, 16),
    data=st.data(),
    extra_zeros=st.floats(0, 1),
)
def test_unpack_returns_what_was_packed(n_rows, groups, m, data, extra_zeros):
    n = data.draw(st.integers(1, m))
    weight = random_weight(n_rows, groups * m, n, m) * (torch.rand(n_rows, groups * m) >= extra_zeros)
    packed = NofMWeight.pack(weight, n=n, m=m)
    assert packed.params == {"n": n, "m": m}
    assert packed.values.shape == (n_rows, groups * n)
    assert torch.equal(packed.unpack().view(torch.int32), (weight + 0.0).view(torch.int32))


def test_negative_zero_becomes_zero():
    packed = NofMWeight.pack(torch.tensor([[-0.0, 1.0, -0.0, -0.0]]), n=2, m=4)
    assert not torch.signbit(packed.values).any() and not torch.signbit(packed.unpack()).any()


def test_inf_at_a_pruned_position_goes_nowhere(isa):
    weight = random_weight(40, 64, 2, 4)
    x = torch.randn(3, 64)
    x[1, 9] = float("inf")
    got = cpu.linear(x, NofMWeight.pack(weight, n=2, m=4), None, None, None)
    assert torch.isfinite(got[1]).equal(weight[:, 9] == 0)


def test_bytes_of_a_vit_layer():
    packed = NofMWeight.pack(random_weight(768, 768, 2, 4), n=2, m=4)
    assert packed.nbytes == 768 * 768 * (2 + 1 / 8)


def test_refusals_name_what_is_wrong():
    weight = random_weight(6, 64, 2, 4)
    assert NofMWeight.reason_against(weight, n=2, m=4) is None
    weight[3, 8:12] = 1
    message = (
        r"nofm 2:4: row 3, columns 8 to 11 have 4 non-zeros, more than 2 \(1 such groups\); prune with pattern 2:4"
    )
    with pytest.raises(ValueError, match=message):
        NofMWeight.pack(weight, n=2, m=4)
    with pytest.raises(ValueError, match=r"in-features 63 are not divisible by m = 4; choose a divisor of 63"):
        NofMWeight.pack(torch.ones(2, 63), n=2, m=4)
    with pytest.raises(ValueError, match=r"expected 1 <= n <= m <= 16, got 5:4"):
        NofMWeight.pack(weight, n=5, m=4)
    with pytest.raises(ValueError, match=r"expected 1 <= n <= m <= 16, got 2:32"):
        NofMWeight.pack(weight, n=2, m=32)
    with pytest.raises(ValueError, match=r"nofm takes the params n and m, got \['n'\]"):
        NofMWeight.pack(weight, n=2)
    with pytest.raises(ValueError, match="nofm: the weight has NaN or Inf entries"):
        NofMWeight.pack(torch.full((2, 4), np.inf), n=2, m=4)


def test_op_passes_opcheck():
    packed = NofMWeight.pack(random_weight(40, 72, 2, 4), n=2, m=4)
    arguments = ("nofm", torch.randn(5, 72), 40, list(packed.tensors()), [2, 4], torch.randn(40), "silu", None)
    torch.library.opcheck(torch.ops.rmtkern.cpu_linear.default, arguments)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (3, 4), (8, 8), (5, 8), (16, 16), (7, 16), (1, 7)])
def test_damage_is_seen_for_every_group_width(isa, n, m):
    weight = random_weight(3, m * 9, n, m)
    packed = NofMWeight.pack(weight, n=n, m=m)
    x = torch.randn(2, m * 9)
    exact = reference.linear(x.double(), packed, None, None, None)
    # float32 sums of at most 144 products of order one
    torch.testing.assert_close(cpu.linear(x, packed, None, None, None).double(), exact, rtol=1e-4, atol=1e-4)
    packed.masks[2, -1] ^= 1 << ((m * 9 - 1) % 64) if (m * 9) % 64 else -(2**63)  # the last column
    with pytest.raises(ValueError, match="nofm: a group of the masks does not have exactly n bits"):
        cpu.linear(x, packed, None, None, None)


@pytest.mark.parametrize("damage", ["more_bits", "fewer_bits", "outside", "moved"])
def test_damaged_parts_are_refused_before_anything_is_read(isa, damage):
    packed = NofMWeight.pack(random_weight(5, 72, 2, 4), n=2, m=4)
    if damage == "more_bits":
        packed.masks[0, 0] = -1
    elif damage == "fewer_bits":
        packed.masks[4, 1] = 0
    elif damage == "outside":
        packed.masks[4, 1] |= 1 << 8  # the last word has columns 0 to 7
    elif damage == "moved":
        packed.masks[2, 0] = 0b1111 | (packed.masks[2, 0] & ~0xFF)  # four in the first group, none in the second
    with pytest.raises(ValueError, match="nofm: a group of the masks does not have exactly n bits"):
        cpu.linear(torch.randn(3, 72), packed, None, None, None)


def test_params_are_checked_at_the_cpp_boundary():
    packed = NofMWeight.pack(random_weight(5, 72, 2, 4), n=2, m=4)
    op = torch.ops.rmtkern.cpu_linear
    with pytest.raises(ValueError, match=r"nofm: params must be \(n, m\) with 1 <= n <= m <= 16"):
        op("nofm", torch.randn(3, 72), 5, list(packed.tensors()), [2], None, None, None)
    with pytest.raises(ValueError, match=r"nofm: in-features 72 are not divisible by m = 5"):
        op("nofm", torch.randn(3, 72), 5, list(packed.tensors()), [2, 5], None, None, None)
