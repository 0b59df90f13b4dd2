"""nofm: the law, what it refuses, and its kernel on every instruction set against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rmtkern.layouts import cpu
from rmtkern.layouts.nofm import NofMWeight, reference
from rmtkern.testing import assert_as_accurate_as_dense

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
    with pytest.raises(ValueError, match=r"nofm takes the params n and m, and r or not, got \['n'\]"):
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
    with pytest.raises(ValueError, match=r"nofm: params must be \(n, m\) or \(n, m, r\) with 1 <= n <= m <= 16"):
        op("nofm", torch.randn(3, 72), 5, list(packed.tensors()), [2], None, None, None)
    with pytest.raises(ValueError, match=r"nofm: in-features 72 are not divisible by m = 5"):
        op("nofm", torch.randn(3, 72), 5, list(packed.tensors()), [2, 5], None, None, None)


def shared_weight(n_rows, n_cols, seed=0):
    """bfloat16, 2:4 with a pattern that four rows share."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-n_rows // 4), n_cols // 4, 4, generator=generator).argsort(-1) < 2
    kept = kept.view(-1, 1, n_cols).expand(-1, 4, -1).reshape(-1, n_cols)[:n_rows]
    return (torch.randn(n_rows, n_cols, generator=generator) * kept).bfloat16()


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(131, 128), (128, 64), (3, 4), (261, 100), (1, 68)])
def test_shared_pattern_is_as_accurate_as_dense(isa, tokens, n_rows, n_cols):
    torch.manual_seed(tokens)
    weight = shared_weight(n_rows, n_cols)
    packed = NofMWeight.pack(weight, n=2, m=4, r=4)
    x, scale = torch.randn(tokens, n_cols).bfloat16(), torch.randn(n_rows).bfloat16()
    bias, residual = torch.randn(n_rows).bfloat16(), torch.randn(tokens, n_rows).bfloat16()
    for tail in ((None, None, None, None), (bias, "gelu", residual, scale)):
        assert_as_accurate_as_dense(cpu.linear(x, packed, *tail), x, weight, *tail)


@settings(deadline=None, max_examples=40)
@given(n_rows=st.integers(1, 150), groups=st.integers(1, 40), extra_zeros=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_law_of_a_shared_pattern(n_rows, groups, extra_zeros, seed):
    weight = shared_weight(n_rows, 4 * groups, seed) * (torch.rand(n_rows, 4 * groups) >= extra_zeros)
    packed = NofMWeight.pack(weight, n=2, m=4, r=4)
    assert torch.equal(packed.unpack().view(torch.int16), (weight + 0.0).view(torch.int16))
    x = torch.randn(3, 4 * groups).double()
    got = reference.linear(x, packed, None, None, None)
    torch.testing.assert_close(got, x @ weight.double().T, rtol=1e-12, atol=1e-12)  # float64 on both sides


def test_a_shared_pattern_is_recognised_and_counted():
    weight = shared_weight(768, 768)
    assert list(NofMWeight.variants(weight)) == [{"n": 2, "m": 4}, {"n": 2, "m": 4, "r": 4}]
    assert list(NofMWeight.variants(random_weight(768, 768, 2, 4).bfloat16())) == [{"n": 2, "m": 4}]
    assert NofMWeight.pack(weight, n=2, m=4, r=4).nbytes == 768 * 768 * (1 + 1 / 32)


def test_inf_at_a_place_that_a_shared_pattern_pruned_goes_nowhere(isa):
    weight, x = shared_weight(40, 64), torch.randn(20, 64).bfloat16()
    x[1, 9] = float("inf")
    got = cpu.linear(x, NofMWeight.pack(weight, n=2, m=4, r=4), None, None, None)
    assert torch.isfinite(got[1]).equal(weight[:, 9] == 0)


def test_refusals_of_a_shared_pattern(isa):
    weight = random_weight(8, 64, 2, 4).bfloat16()
    message = r"nofm 2:4x4: rows 0 on, columns \d+ to \d+ have [34] non-zeros, more than 2 .*; prune with pattern 2:4x4"
    with pytest.raises(ValueError, match=message):
        NofMWeight.pack(weight, n=2, m=4, r=4)
    with pytest.raises(ValueError, match=r"nofm: r must be 4, for torch.bfloat16 only, got 4 for torch.float32"):
        NofMWeight.pack(weight.float(), n=2, m=4, r=4)
    with pytest.raises(ValueError, match=r"nofm: r must be 4, for torch.bfloat16 only, got 2 for torch.bfloat16"):
        NofMWeight.pack(weight, n=2, m=4, r=2)
    packed = NofMWeight.pack(shared_weight(9, 68), n=2, m=4, r=4)
    x, op = torch.randn(3, 68).bfloat16(), torch.ops.rmtkern.cpu_linear
    with pytest.raises(ValueError, match=r"nofm: r must be 4, for bfloat16 only"):
        op("nofm", x, 9, list(packed.tensors()), [2, 4, 1], None, None, None)
    with pytest.raises(ValueError, match=r"part 'values' must have shape \(51, 8\)"):
        op("nofm", x, 9, [packed.values[:-1], packed.masks], [2, 4, 4], None, None, None)
    for code in (6, 7, 8, 15):
        damaged = packed.masks.clone()
        damaged[-1] = code
        with pytest.raises(ValueError, match="nofm: a code is none of the six pairs of four columns; pack the weight"):
            op("nofm", x, 9, [packed.values, damaged], [2, 4, 4], None, None, None)
