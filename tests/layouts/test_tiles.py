"""Tiles, and the dense form `own` on every instruction set against the float64 reference."""

import math

import pytest
import torch
from torch.nn import functional

from rmtkern import ops
from rmtkern.layouts import cpu
from rmtkern.layouts.dense.weight import FORMS, DenseWeight
from rmtkern.layouts.tiles import pack_tiles, unpack_tiles
from rmtkern.testing import assert_as_accurate_as_dense

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=cpu.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 32])
@pytest.mark.parametrize("shape", [(1, 1), (32, 8), (33, 7), (131, 67)])
def test_tiles_are_exact_and_as_documented(shape, width, dtype):
    n, k = shape
    dense = torch.randn(shape).to(dtype)
    tiles = pack_tiles(dense, width)
    per = 4 // dtype.itemsize
    assert tiles.shape == (math.ceil(n / width) * math.ceil(k / per), width * per)
    assert tiles.is_contiguous()
    assert torch.equal(unpack_tiles(tiles, shape, width), dense)
    row, col = n - 1, k - 1  # tile by tile, lane by lane, row by row
    at = row // width * math.ceil(k / per) + col // per
    assert tiles[at, row % width * per + col % per] == dense[row, col]
    assert tiles.count_nonzero() == dense.count_nonzero()  # filled up with zeros


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 12, 13, 16, 17, 197])
# below a tile; a tile; odd and prime; more columns than are summed at once, with an odd rest
@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 64), (53, 67), (131, 1031)])
def test_own_is_as_accurate_as_dense(isa, tokens, n, k, dtype):
    torch.manual_seed(tokens)
    w, x, bias = (torch.randn(*shape).to(dtype) for shape in ((n, k), (tokens, k), (n,)))
    scale, residual = torch.randn(n).to(dtype), torch.randn(tokens, n).to(dtype)
    packed = DenseWeight.pack(w, form=FORMS.index("own"))
    for activation in ops.ACTIVATIONS:
        assert_as_accurate_as_dense(ops.linear(x, packed, activation=activation), x, w, activation=activation)
        y = ops.linear(x, packed, bias, activation=activation, scale=scale, residual=residual)
        assert_as_accurate_as_dense(y, x, w, bias, activation, residual, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_reads_nothing_past_a_token(isa, dtype):
    # what lies behind an odd K is the next token, and NaN behind the last one
    memory = torch.full((2 * 33 + 1,), float("nan"), dtype=dtype)
    x = memory[:66].view(2, 33)
    x[0] = 1.0
    packed = DenseWeight.pack(torch.ones(5, 33, dtype=dtype), form=3)
    y = ops.linear(x, packed)
    assert torch.equal(y[0], torch.full((5,), 33.0, dtype=dtype))
    assert bool(y[1].isnan().all())
    x[1] = 2.0
    assert torch.equal(ops.linear(x, packed)[1], torch.full((5,), 66.0, dtype=dtype))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("tokens", "n"), [(1, 300), (40, 20), (100, 130)])
def test_own_gives_the_same_on_any_number_of_threads(threads, tokens, n):
    w, x = torch.randn(n, 90), torch.randn(tokens, 90)
    packed = DenseWeight.pack(w, form=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.linear(x, packed)
        torch.set_num_threads(threads)
        shared = ops.linear(x, packed)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(alone, functional.linear(x, w), rtol=1e-5, atol=1e-5)  # float32 over 90 columns
    assert torch.equal(alone, shared)  # each output is summed by one thread, in one order


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_converts_back(dtype):
    w = torch.randn(33, 7).to(dtype)
    packed = DenseWeight.pack(w, form=3)
    assert packed.dense is None
    assert torch.equal(packed.tensors()[0], w)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    cast = packed.to(other)
    assert torch.equal(cast.unpack(), w.to(other))
    x = torch.randn(3, 7).to(other)
    assert_as_accurate_as_dense(ops.linear(x, cast), x, w.to(other))


def test_damaged_tiles_are_refused():
    x, tiles = torch.randn(3, 7), pack_tiles(torch.randn(33, 7))
    call = torch.ops.rmtkern.cpu_linear
    with pytest.raises(ValueError, match=r"part 'tiles' must have shape \(14, 32\) for a weight of \(33, 7\), got"):
        call("dense", x, 33, [tiles[:-1]], [], None, None, None, None)
    with pytest.raises(TypeError, match="part 'tiles' must be float32, got bfloat16"):
        call("dense", x, 33, [tiles.bfloat16()], [], None, None, None, None)
