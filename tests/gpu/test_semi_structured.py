"""2:4 on PyTorch's sparse tensor-core kernels: our packing against its own decompression, and how they are called.

Its products run on a device only. Here a product in float64 of what PyTorch decompresses stands in for them, which
checks what they are given by the rules of SparseSemiStructuredOps.cu and of their meta functions.
"""

import itertools

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from rmtkern import ops
from rmtkern.layouts.nofm import NofMWeight
from rmtkern.layouts.nofm.semi_structured import fits, metadata, runs, transposed_product
from rmtkern.layouts.pairs import interleave, separate
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse

DTYPES = [torch.float16, torch.bfloat16]


def two_of_four(n, k, dtype, seed=0):
    """Two of each four, and some groups with fewer."""
    w = random_sparse(n, k, 0, nofm=(2, 4), seed=seed)
    return (w * (random_sparse(n, k, 0.2, seed=seed + 1) != 0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 192), (64, 1024), (160, 64)])
def test_pytorch_decompresses_our_packing(n, k, dtype):
    w = two_of_four(n, k, dtype)
    kept, _, meta = NofMWeight.pack(w, n=2, m=4).gpu_tensors()
    assert kept.shape == (n, k // 2) and meta.shape == (n, k // 16) and meta.dtype == torch.int16
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(kept, meta), w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_packing_is_pytorchs_where_every_group_is_full(dtype):
    w = random_sparse(64, 128, 0, nofm=(2, 4)).to(dtype)
    kept, _, meta = NofMWeight.pack(w, n=2, m=4).gpu_tensors()
    theirs, their_meta = sparse_semi_structured_from_dense_cutlass(w)
    assert torch.equal(kept, theirs) and torch.equal(meta, their_meta)


def test_rows_that_share_their_pattern_have_metadata_too():
    w = random_sparse(16, 128, 0, nofm=(2, 4)).repeat_interleave(4, 0).bfloat16()
    kept, _, meta = NofMWeight.pack(w, n=2, m=4, r=4).gpu_tensors()
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(kept, meta), w)


def test_where_there_is_metadata():
    assert fits((32, 64), torch.float16) and fits((96, 128), torch.bfloat16)
    assert not fits((32, 64), torch.float32) and not fits((48, 64), torch.float16) and not fits((32, 96), torch.float16)
    for n, k, shape in ((48, 64, (64, 4)), (32, 96, (32, 8)), (1, 4, (32, 4))):  # for our own kernel, filled up
        _, _, meta = NofMWeight.pack(two_of_four(n, k, torch.float16), n=2, m=4).gpu_tensors()
        assert meta.shape == shape
    assert len(NofMWeight.pack(two_of_four(32, 64, torch.float32), n=2, m=4).gpu_tensors()) == 2
    assert not runs(torch.device("cpu"))


def test_metadata_by_hand():
    # row 9 (= 8 + 1) is dealt to 4 * 1 + 1 = 5; word 0 of an odd row stands where word 1 of the row before would
    masks = torch.zeros(30, 1, dtype=torch.int64)
    masks[9, 0] = 0b1010  # columns 1 and 3: 1 + 4 * 3 = 13
    meta = metadata(masks).flatten()
    assert int(meta[2 * 4 + 1]) == 0x444D and len(meta) == 32 * 4  # of words two columns wide, row 4, column 1
    assert int((meta != 0x4444).sum()) == 1  # where nothing is kept, columns 0 and 1: 0 + 4 * 1


@pytest.mark.parametrize("bias", [False, True])
def test_pytorchs_meta_functions_take_our_arguments(bias):
    parts = NofMWeight.pack(two_of_four(32, 64, torch.float16), n=2, m=4).gpu_tensors()
    kept, _, meta = (part.to("meta") for part in parts)
    x, row = (torch.empty(*shape, dtype=torch.float16, device="meta") for shape in ((13, 64), (32,)))
    y = transposed_product(x, kept, meta, row if bias else None)
    assert y.shape == (32, 16) and y.is_contiguous()


def stand_in(mat1, mat1_meta, mat2, bias=None):
    """mat1 mat2 + bias, refusing what the kernel of CUTLASS does not take."""
    assert mat1.is_contiguous() and mat1.dtype == mat2.dtype and mat1_meta.dtype == torch.int16
    assert mat2.stride(0) == 1 and mat2.stride(1) % 8 == 0 and mat2.shape[1] % 8 == 0
    assert mat1.shape[0] % 32 == 0 and mat2.shape[0] % 64 == 0 and mat1.shape[1] * 2 == mat2.shape[0]
    assert bias is None or (bias.shape == (len(mat1),) and bias.dtype == mat2.dtype)
    product = sparse_semi_structured_to_dense_cutlass(mat1, mat1_meta).double() @ mat2.double()
    return (product if bias is None else product + bias.double()[:, None]).to(mat2.dtype)


@pytest.fixture
def device(monkeypatch):
    """A device of compute capability 8.x, as far as 2:4 can tell; yields how often its product was asked for."""
    calls = []
    monkeypatch.setattr("rmtkern.layouts.nofm.triton.runs", lambda device: True)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda *args: (calls.append(args), stand_in(*args))[1])
    monkeypatch.setattr(
        torch, "_sparse_semi_structured_addmm", lambda bias, *args: (calls.append(args), stand_in(*args, bias))[1]
    )
    return calls


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [17, 40, 197])
def test_the_epilogue_follows_the_product(tokens, dtype, device):
    w = two_of_four(96, 128, dtype)
    packed = NofMWeight.pack(w, n=2, m=4)
    x, b, s, r = (torch.randn(*shape).to(dtype) for shape in ((tokens, 128), (96,), (96,), (tokens, 96)))
    forms = list(itertools.product(ops.ACTIVATIONS, (None, b), (None, s), (None, r)))
    for activation, bias, scale, residual in forms if tokens == 17 else forms[-3:]:
        y = ops.linear(x, packed, bias, activation=activation, scale=scale, residual=residual, backend="triton")
        assert_as_accurate_as_dense(y, x, w, bias, activation, residual, scale)
    assert len(device) == (len(forms) if tokens == 17 else 3)


@pytest.mark.interpreted
@pytest.mark.parametrize("features", [48, 44])
def test_the_epilogue_of_a_pair(features, device):
    w = two_of_four(2 * features, 64, torch.bfloat16)
    both = interleave(w[:features], w[features:])
    gate, up = separate(both, features)
    x, r = torch.randn(50, 64).bfloat16(), torch.randn(50, features).bfloat16()
    y = ops.gated_linear(x, NofMWeight.pack(both, n=2, m=4), residual=r, features=features, backend="triton")
    assert_as_accurate_as_dense(y, x, gate, None, "silu", r, up=(up, None))
    assert len(device) == 1


@pytest.mark.interpreted
def test_few_tokens_and_other_shapes_stay_with_our_kernel(device):
    for tokens, n, k in ((16, 96, 128), (40, 48, 64), (40, 32, 96)):
        w = two_of_four(n, k, torch.bfloat16)
        x = torch.randn(tokens, k).bfloat16()
        assert_as_accurate_as_dense(ops.linear(x, NofMWeight.pack(w, n=2, m=4), backend="triton"), x, w)
    assert device == []
