"""block: the law, the format, and its kernel on every instruction set against the float64 reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rmtkern import pack_, prune_
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import cpu
from rmtkern.layouts.bitmask import BitmaskWeight
from rmtkern.layouts.block import BlockWeight, reference
from rmtkern.layouts.block.weight import LARGE, SIZES
from rmtkern.nn import PackedLinear
from rmtkern.pruning.pattern import unit_entries
from rmtkern.testing import assert_as_accurate_as_dense as rule
from tests.layouts.test_bitmask import assert_as_accurate_as_dense, epilogues, isa  # noqa: F401

SHAPES = [(131, 67, 2), (128, 128, 4), (1, 130, 8), (259, 61, 8), (37, 64, 4)]


def block_weight(n_rows, n_cols, r, sparsity, seed=0):
    """Random mini-blocks of r rows and one column; the last strip may be shorter."""
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(-(-n_rows // r), n_cols, generator=generator) >= sparsity).repeat_interleave(r, 0)[:n_rows]
    return torch.randn(n_rows, n_cols, generator=generator) * kept


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.97, 1])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
@pytest.mark.parametrize(("n_rows", "n_cols", "r"), SHAPES)
def test_kernel_is_as_accurate_as_dense(isa, tokens, n_rows, n_cols, r, sparsity):  # noqa: F811
    torch.manual_seed(tokens)
    weight = block_weight(n_rows, n_cols, r, sparsity)
    packed = BlockWeight.pack(weight, r=r, c=1)
    x = torch.randn(tokens, n_cols)
    for bias, activation, residual in epilogues(tokens, n_rows):
        exact = reference.linear(x.double(), packed, bias, activation, residual)
        got = cpu.linear(x, packed, bias, activation, residual)
        assert_as_accurate_as_dense(got, x, weight, bias, activation, residual, exact)


def pair_weight(n_rows, n_cols, r, sparsity, seed=0):
    """bfloat16 with mini-blocks of r rows and 2 columns."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-n_rows // r), -(-n_cols // 2), generator=generator) >= sparsity
    kept = kept.repeat_interleave(r, 0).repeat_interleave(2, 1)[:n_rows, :n_cols]
    return (torch.randn(n_rows, n_cols, generator=generator) * kept).bfloat16()


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.97, 1])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 197])
@pytest.mark.parametrize(
    ("n_rows", "n_cols", "r"), [(131, 67, 1), (131, 135, 4), (128, 256, 4), (3, 1, 4), (259, 61, 1)]
)
def test_bfloat16_kernel_is_as_accurate_as_dense(isa, tokens, n_rows, n_cols, r, sparsity):  # noqa: F811
    torch.manual_seed(tokens)
    weight = pair_weight(n_rows, n_cols, r, sparsity)
    packed = BlockWeight.pack(weight, r=r, c=2)
    x, scale = torch.randn(tokens, n_cols).bfloat16(), torch.randn(n_rows).bfloat16()
    bias, residual = torch.randn(n_rows).bfloat16(), torch.randn(tokens, n_rows).bfloat16()
    for tail in ((None, None, None, None), (bias, "gelu", residual, scale)):
        rule(cpu.linear(x, packed, *tail), x, weight, *tail)


@pytest.mark.parametrize(("r", "n_rows", "n_cols"), [(1, 150, 131), (4, 150, 131), (4, 3, 1)])
def test_bfloat16_reference_is_the_definition(r, n_rows, n_cols):
    weight = pair_weight(n_rows, n_cols, r, 0.6)
    x = torch.randn(5, n_cols)
    got = reference.linear(x.double(), BlockWeight.pack(weight, r=r, c=2), None, None, None)
    np.testing.assert_allclose(got, x.double().numpy() @ weight.double().numpy().T, atol=1e-12)


@pytest.mark.parametrize("r", [2, 4, 8])
def test_reference_is_the_definition(r):
    weight = block_weight(150, 70, r, 0.6)
    x = torch.randn(5, 70)
    got = reference.linear(x.double(), BlockWeight.pack(weight, r=r, c=1), None, None, None)
    np.testing.assert_allclose(got, x.double().numpy() @ weight.double().numpy().T, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([(dtype, size) for dtype, sizes in SIZES.items() for size in (*sizes, *LARGE)]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_unpack_returns_what_was_packed(n_rows, n_cols, form, sparsity, seed):
    dtype, (r, c) = form
    generator = torch.Generator().manual_seed(seed)  # entries, not mini-blocks: zeros inside a stored one are kept too
    weight = torch.randn(n_rows, n_cols, generator=generator)
    weight *= torch.rand(n_rows, n_cols, generator=generator) >= sparsity
    weight = weight.to(dtype)
    back = BlockWeight.pack(weight, r=r, c=c).unpack()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert back.dtype == dtype and torch.equal(back.view(bits), (weight + 0.0).view(bits))


def test_inf_at_a_column_that_is_not_stored_goes_nowhere(isa):  # noqa: F811
    weight = torch.zeros(8, 70)
    weight[:4, 3] = 1.0
    x = torch.full((3, 70), torch.inf)
    x[:, 3] = 2.0
    got = cpu.linear(x, BlockWeight.pack(weight, r=4, c=1), None, None, None)
    assert torch.equal(got[:, :4], torch.full((3, 4), 2.0)) and torch.equal(got[:, 4:], torch.zeros(3, 4))
    x[:, 3] = torch.inf
    assert torch.isinf(cpu.linear(x, BlockWeight.pack(weight, r=4, c=1), None, None, None)[:, :4]).all()


def test_bytes_are_fewer_than_those_of_bitmask():
    weight = block_weight(768, 768, 4, 0.5)
    packed = BlockWeight.pack(weight, r=4, c=1)
    assert packed.values.shape == (int((weight != 0).sum()) // 4, 4)
    assert packed.nbytes < BitmaskWeight.pack(weight).nbytes


def test_variants_recognise_the_pattern_from_the_weight():
    def found(weight):
        return [params["r"] for params in BlockWeight.variants(weight)]

    assert list(BlockWeight.variants(pair_weight(64, 96, 4, 0.7))) == [{"r": 1, "c": 2}, {"r": 4, "c": 2}]
    assert list(BlockWeight.variants(pair_weight(64, 96, 1, 0.7))) == [{"r": 1, "c": 2}]
    # unstructured: more bytes than bitmask, but its entries lie in pairs
    assert list(BlockWeight.variants(block_weight(64, 96, 4, 0.7).bfloat16())) == [{"r": 1, "c": 2}]
    assert list(BlockWeight.variants(torch.ones(8, 8).bfloat16())) == []

    assert found(block_weight(64, 96, 8, 0.7)) == [2, 4, 8]
    assert found(block_weight(64, 96, 4, 0.7)) == [2, 4]
    assert found(block_weight(64, 96, 2, 0.7)) == [2]
    assert found(block_weight(64, 96, 1, 0.7)) == []
    assert found(torch.zeros(8, 8)) == [] and found(torch.randn(8, 8)) == []
    weight = block_weight(64, 96, 4, 0.7)
    weight[5, weight[5].nonzero()[0]] = 0.0  # a stray zero, as training leaves now and then
    assert found(weight) == [2, 4]


def test_refusals_name_what_is_wrong():
    for params in ({}, {"r": 3}, {"r": 4, "c": 2}):
        with pytest.raises(
            ValueError,
            match=r"params \(r, c\) must be one of \(2, 1\), \(4, 1\), \(8, 1\), or each one of 16, 32, 64, 128 for",
        ):
            BlockWeight.pack(torch.zeros(4, 4), **params)
    with pytest.raises(
        ValueError, match=r"must be one of \(1, 2\), \(4, 2\), or each one of 16.* for torch.bfloat16, got"
    ):
        BlockWeight.pack(torch.zeros(4, 4).bfloat16(), r=4, c=1)
    with pytest.raises(ValueError, match="NaN or Inf"):
        BlockWeight.pack(torch.full((4, 4), torch.nan), r=2, c=1)
    with pytest.raises(ValueError, match="expected dtype"):
        BlockWeight.pack(torch.zeros(4, 4).double(), r=2, c=1)
    packed = BlockWeight.pack(torch.ones(4, 4), r=2, c=1)
    packed.params = {"r": 16, "c": 1}
    with pytest.raises(ValueError, match=r"block: params must be \(r, c\): \(2, 1\), \(4, 1\) or \(8, 1\) for float32"):
        cpu.linear(torch.ones(1, 4), packed, None, None, None)


@pytest.mark.parametrize("damage", ["more_bits", "fewer_bits", "row", "outside", "starts", "end", "negative", "values"])
def test_damaged_parts_are_refused_before_anything_is_read(isa, damage):  # noqa: F811
    weight = block_weight(150, 70, 4, 0.5)
    weight[:, 63] = 0  # so that no mask is negative
    packed = BlockWeight.pack(weight, r=4, c=1)
    if damage == "more_bits":
        packed.masks[0] = -1
    elif damage == "fewer_bits":
        packed.masks[0] = 0
    elif damage == "row":
        packed.rows[-1] = 6  # the last row block has strips 0 to 5
    elif damage == "outside":
        packed.masks[-1] = 1 << 6  # the last column block has columns 0 to 5
    elif damage == "starts":
        packed.starts[1] += 1
    elif damage == "end":
        packed.starts[-1] += 1
    elif damage == "negative":
        packed.starts[0] = -8
    elif damage == "values":
        packed.values = packed.values[:-1].clone()
    with pytest.raises(ValueError, match="block: masks, rows, starts and values disagree; pack the weight again"):
        cpu.linear(torch.randn(3, 70), packed, None, None, None)


@pytest.mark.parametrize("r", [1, 4])
def test_pruned_bfloat16_entries_are_structural_zeros_beside_kept_ones(isa, r):  # noqa: F811
    torch.manual_seed(0)
    weight = (torch.randn(40, 64) * (torch.rand(40, 64) < 0.5)).bfloat16()
    x = torch.randn(20, 64).bfloat16()
    x[1, 9] = float("inf")
    got = cpu.linear(x, BlockWeight.pack(weight, r=r, c=2), None, None, None)
    assert torch.isfinite(got[1]).equal(weight[:, 9] == 0) and torch.isfinite(got[2:]).all()


def large_weight(n_rows, n_cols, r, c, sparsity, seed=0):
    """Random blocks; the last ones may be cut."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-n_rows // r), -(-n_cols // c), generator=generator) >= sparsity
    return torch.randn(n_rows, n_cols, generator=generator) * unit_entries(kept, (r, c))[:n_rows, :n_cols]


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize(("r", "c"), [(16, 16), (32, 128), (128, 32)])
def test_large_blocks_have_a_reference(r, c, dtype):
    weight = large_weight(150, 331, r, c, 0.6).to(dtype)
    x = torch.randn(5, 331).double()
    packed = BlockWeight.pack(weight, r=r, c=c)
    np.testing.assert_allclose(
        reference.linear(x, packed, None, None, None), x.numpy() @ weight.double().numpy().T, atol=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 2200), st.sampled_from(LARGE), st.floats(0, 1), st.integers(0, 2**31))
def test_the_index_of_large_blocks_is_that_of_block_compressed_rows(n_rows, n_cols, size, sparsity, seed):
    r, c = size
    weight = large_weight(n_rows, n_cols, r, c, sparsity, seed)
    values, begins, columns, places = BlockWeight.pack(weight, r=r, c=c).gpu_tensors()
    assert values.shape[1:] == (r, c) and begins[0] == 0 and begins[-1] == len(columns) == len(places) == len(values)
    dense = torch.zeros(len(begins) - 1, r, -(-n_cols // c), c)
    for strip, (begin, end) in enumerate(pairwise(begins.tolist())):
        inside = columns[begin:end].tolist()
        assert inside == sorted(set(inside))
        for column, place in zip(inside, places[begin:end].tolist(), strict=True):
            dense[strip, :, column] = values[place]
    assert torch.equal(dense.view(len(begins[1:]) * r, -1)[:n_rows, :n_cols], weight)


def test_the_widest_blocks_are_recognised():
    def widest(*size):
        return BlockWeight.widest(large_weight(256, 512, *size, 0.6))

    assert widest(32, 32) == {"r": 32, "c": 32} and widest(16, 128) == {"r": 16, "c": 128}
    assert widest(128, 128) == {"r": 128, "c": 128}
    assert widest(8, 8) is None and widest(1, 1) is None
    assert BlockWeight.widest(torch.zeros(64, 64)) is None and BlockWeight.widest(torch.ones(64, 64)) is None
    weight = large_weight(256, 512, 64, 16, 0.6)
    weight[weight.nonzero()[0, 0], weight.nonzero()[0, 1]] = 0.0  # a stray zero, as training leaves now and then
    assert BlockWeight.widest(weight) == {"r": 64, "c": 16}


def test_a_cpu_runs_large_blocks_as_the_mini_blocks_that_tile_them():
    weight = large_weight(128, 128, 32, 32, 0.5)
    assert list(BlockWeight.variants(weight)) == [{"r": r, "c": 1} for r in (2, 4, 8)]
    assert list(BlockWeight.variants(weight.bfloat16())) == [{"r": 1, "c": 2}, {"r": 4, "c": 2}]
    assert list(BlockWeight.variants(weight.half())) == []
    packed = BlockWeight.pack(weight, r=32, c=32)
    with pytest.raises(
        KernelUnavailable,
        match=r"cpu: blocks of 32 x 32 are for a GPU; pack the weight on the CPU, where mini",
    ):
        PackedLinear(packed)(torch.randn(3, 128))
    with pytest.raises(ValueError, match=r"block: params must be \(r, c\): \(2, 1\), \(4, 1\) or \(8, 1\) for float32"):
        cpu.linear(torch.randn(3, 128), packed, None, None, None)  # the extension itself refuses, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_large_blocks_packs_on_a_cpu(dtype):
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    prune_(model, 0.5, pattern="32x32", targets="all")
    x = torch.randn(197, 128)
    expected = model(x)
    report = pack_(model, x, dtype=dtype)
    assert "for a GPU" not in str(report)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
