"""What every layout promises, on every backend and instruction set: the law, the accuracy, compile, opcheck."""

import copy
import io
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtkern import ops
from rmtkern.layouts import LAYOUTS, cpu
from rmtkern.nn import PackedLinear
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse
from tests.parallel import wrong_in_threads

# What the weights of a factored layout must be: of rank 1. Its law is weaker: unpack() is exact to the factors, and
# equals the weight that was packed up to rounding.
FACTORED = "factored"

# layout, params, what its weights must be: n:m, FACTORED, or anything (None); in float32, and below in bfloat16
FORMS = [
    ("dense", {"form": 0}, None),
    ("dense", {"form": 1}, None),
    ("dense", {"form": 2}, None),
    ("dense", {"form": 3}, None),
    ("bitmask", {}, None),
    ("block", {"r": 2, "c": 1}, None),
    ("block", {"r": 4, "c": 1}, None),
    ("block", {"r": 8, "c": 1}, None),
    ("nofm", {"n": 2, "m": 4}, (2, 4)),
    ("nofm", {"n": 1, "m": 16}, (1, 16)),
    ("lowrank", {"rank": 1}, FACTORED),
    ("spectral", {"rank": 1}, FACTORED),
]
BF16 = [
    ("dense", {"form": 0}, None),
    ("dense", {"form": 1}, None),
    ("dense", {"form": 2}, None),
    ("dense", {"form": 3}, None),
    ("bitmask", {}, None),
    ("block", {"r": 1, "c": 2}, None),
    ("block", {"r": 4, "c": 2}, None),
    ("nofm", {"n": 2, "m": 4}, (2, 4)),
]
IDS = [f"{layout}-{'-'.join(f'{k}{v}' for k, v in params.items())}" for layout, params, _ in FORMS]


def variants():
    """Form x (backend, isa) that can run here; an ISA that this CPU lacks cannot be tested on it."""
    for (layout, params, nofm), name in zip(FORMS, IDS, strict=True):
        yield pytest.param(layout, params, nofm, "reference", None, id=f"{name}-reference")
        isas = [None] if layout == "dense" and params["form"] < 3 else cpu.isas()
        for isa in isas:
            yield pytest.param(layout, params, nofm, "cpu", isa, id=f"{name}-cpu-{isa or 'torch'}")


def weight(shape, nofm, sparsity=0.7, seed=0):
    if nofm == FACTORED:
        return random_sparse(shape[0], 1, sparsity, seed=seed) @ random_sparse(1, shape[1], sparsity, seed=seed + 1)
    return random_sparse(*shape, sparsity, seed=seed, nofm=nofm)


def test_every_layout_is_here_and_every_kernel_path_has_a_reference():
    assert {layout for layout, _, _ in FORMS} == set(LAYOUTS)
    for layout in LAYOUTS:
        ops.load_kernels(layout)
        assert not isinstance(ops.KERNELS[layout]["reference"], str)
        assert not isinstance(ops.KERNELS[layout]["cpu"], str)
        assert LAYOUTS[layout].layout == layout


@pytest.mark.parametrize(("layout", "params", "nofm", "backend", "isa"), list(variants()))
# regular; prime T and N; T = 1; a K that is no multiple of 64 and an N over a row block; many tokens
@pytest.mark.parametrize(("t", "n", "k"), [(32, 64, 64), (37, 53, 80), (1, 96, 128), (5, 131, 208), (160, 16, 64)])
def test_accuracy_with_every_epilogue(layout, params, nofm, backend, isa, t, n, k, monkeypatch):
    if isa is not None:
        monkeypatch.setenv("RMTKERN_ISA", isa)
    w = weight((n, k), nofm)
    packed = LAYOUTS[layout].pack(w, **params)
    generator = torch.Generator().manual_seed(t)
    x, b, r = (torch.randn(*shape, generator=generator) for shape in ((t, k), (n,), (t, n)))
    for activation, bias, residual in itertools.product(ops.ACTIVATIONS, (None, b), (None, r)):
        y = ops.linear(x, packed, bias, activation=activation, residual=residual, backend=backend)
        assert_as_accurate_as_dense(y, x, w, bias, activation, residual)


@pytest.mark.parametrize("isa", ["reference", *cpu.isas()])
@pytest.mark.parametrize(("layout", "params", "nofm"), BF16)
@pytest.mark.parametrize(("t", "n", "k"), [(37, 53, 80), (1, 96, 128), (3, 131, 208), (197, 17, 64)])
def test_bfloat16_accuracy_with_every_epilogue(layout, params, nofm, isa, t, n, k, monkeypatch):
    backend = "reference" if isa == "reference" else "cpu"
    monkeypatch.setenv("RMTKERN_ISA", "" if isa == "reference" else isa)
    w = weight((n, k), nofm).bfloat16()
    packed = LAYOUTS[layout].pack(w, **params)
    assert packed.unpack().dtype == torch.bfloat16 and torch.equal(packed.unpack(), w)
    generator = torch.Generator().manual_seed(t)
    x, b, s, r = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((t, k), (n,), (n,), (t, n)))
    for activation, scale, residual in itertools.product(ops.ACTIVATIONS, (None, s), (None, r)):
        y = ops.linear(x, packed, b, activation=activation, scale=scale, residual=residual, backend=backend)
        assert_as_accurate_as_dense(y, x, w, b, activation, residual, scale)


@pytest.mark.parametrize(("layout", "params", "nofm"), BF16)
def test_bfloat16_extremes_and_copies(layout, params, nofm):
    x = torch.randn(9, 64).bfloat16()
    for sparsity in (0.0, 0.97, 1.0):
        w = (weight((20, 64), nofm, sparsity) * (1 - int(sparsity))).bfloat16()
        packed = LAYOUTS[layout].pack(w, **params)
        assert_as_accurate_as_dense(ops.linear(x, packed), x, w)
        twin = copy.deepcopy(packed)
        assert torch.equal(twin.unpack(), w) and torch.equal(ops.linear(x, twin), ops.linear(x, packed))
    with pytest.raises(ops.KernelUnavailable, match=r"x is torch.float32, the weight torch.bfloat16; cast"):
        ops.linear(x.float(), packed)


@pytest.mark.parametrize("isa", ["reference", *cpu.isas()])
@pytest.mark.parametrize(
    ("dtype", "layout", "params", "nofm"),
    [*((torch.float32, *form) for form in FORMS), *((torch.bfloat16, *form) for form in BF16)],
)
def test_denormals_inf_and_nan_in_activations(dtype, layout, params, nofm, isa, monkeypatch):
    """Pruned entries are structural zeros, kept entries propagate, and no token hears of another."""
    backend = "reference" if isa == "reference" else "cpu"
    monkeypatch.setenv("RMTKERN_ISA", "" if isa == "reference" else isa)
    w = weight((37, 64), nofm, 0.5).to(dtype)
    packed = LAYOUTS[layout].pack(w, **params)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    x[8:10] *= 1e-39  # denormal in both dtypes
    x = x.to(dtype)
    assert 0 < x[8].abs().max() < torch.finfo(dtype).tiny
    special = {2: (5, float("inf")), 4: (6, float("nan")), 6: (63, -float("inf")), 19: (0, float("nan"))}
    clean = [token for token in range(20) if token not in special]
    for token, (column, value) in special.items():
        x[token, column] = value
    y = ops.linear(x, packed, backend=backend)
    assert_as_accurate_as_dense(y[clean], x[clean], w)
    assert_as_accurate_as_dense(y[8:10], x[8:10], w)
    kept = w != 0
    if layout == "block" and dtype == torch.float32:  # whose blocks are stored and multiplied whole
        kept = torch.cat([one.any(0, keepdim=True).expand_as(one) for one in kept.split(params["r"])])
    for token, (column, _) in special.items():
        if layout in ("bitmask", "block", "nofm"):
            assert torch.isfinite(y[token]).equal(~kept[:, column]), token
        else:
            assert not torch.isfinite(y[token]).any(), token


@pytest.mark.parametrize(
    ("dtype", "layout", "params", "nofm"),
    [*((torch.float32, *form) for form in FORMS), *((torch.bfloat16, *form) for form in BF16)],
)
def test_python_threads_may_share_a_weight(dtype, layout, params, nofm):
    packed = LAYOUTS[layout].pack(weight((200, 160), nofm, 0.5).to(dtype), **params)
    inputs = [torch.randn(tokens, 160).to(dtype) for tokens in (1, 40, 97, 300)]
    assert wrong_in_threads(lambda x: ops.linear(x, packed, activation="gelu"), inputs, threads=4, calls=12) == []


@pytest.mark.parametrize(("layout", "params", "nofm", "backend", "isa"), list(variants()))
def test_shapes_and_strides(layout, params, nofm, backend, isa, monkeypatch):
    if isa is not None:
        monkeypatch.setenv("RMTKERN_ISA", isa)
    w = weight((24, 64), nofm)
    packed = LAYOUTS[layout].pack(w, **params)
    inputs = [
        torch.randn(64),
        torch.randn(2, 3, 64),
        torch.randn(64, 7).t(),
        torch.randn(7, 128)[:, ::2],
        torch.randn(3, 64).expand(4, 3, 64),
        torch.randn(1, 64).expand(5, 64),
        torch.randn(2, 5, 65)[..., 1:],
        torch.randn(0, 64),
        torch.randn(2, 0, 64),
    ]
    for x in inputs:
        r = torch.randn(*x.shape[:-1], 48)[..., ::2]
        kept = x.clone()
        y = ops.linear(x, packed, activation="gelu", residual=r, backend=backend)
        assert y.shape == (*x.shape[:-1], 24)
        assert torch.equal(x, kept)
        assert_as_accurate_as_dense(y, x, w, activation="gelu", residual=r)


@pytest.mark.parametrize(("layout", "params", "nofm"), FORMS, ids=IDS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 140), groups=st.integers(1, 9), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_law(layout, params, nofm, n, groups, sparsity, seed):
    w = weight((n, 16 * groups), nofm, sparsity, seed)
    if nofm != FACTORED:
        w.view(-1)[:: max(1, 3 * seed)] *= -0.0  # signed zeros must come back as 0.0
    back = LAYOUTS[layout].pack(w, **params).unpack()
    assert back.dtype == w.dtype and back.is_contiguous()
    if nofm == FACTORED:
        # two factors and their product are rounded once each: 3/2 eps of each entry; 4 eps leaves room for the SVD
        assert (back - w).norm() <= 4 * torch.finfo(w.dtype).eps * w.norm()
        return
    assert torch.equal(back.view(torch.int32), (w + 0.0).view(torch.int32))


@pytest.mark.parametrize(("layout", "params", "nofm"), FORMS, ids=IDS)
def test_extreme_sparsity(layout, params, nofm):
    x = torch.randn(9, 64)
    for sparsity in (0.0, 1.0):
        w = weight((20, 64), nofm, sparsity) * (1 - int(sparsity))
        y = ops.linear(x, LAYOUTS[layout].pack(w, **params), torch.ones(20))
        assert_as_accurate_as_dense(y, x, w, torch.ones(20))


@pytest.mark.parametrize(("layout", "params", "nofm"), FORMS, ids=IDS)
@pytest.mark.parametrize("grad", [False, True])
def test_compile(layout, params, nofm, grad):
    torch._dynamo.reset()
    module = PackedLinear(LAYOUTS[layout].pack(weight((32, 64), nofm), **params), torch.ones(32), "gelu")
    x = torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        eager = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="eager")(x)
    assert torch.equal(compiled, eager)
    assert compiled.requires_grad == eager.requires_grad == grad


@pytest.mark.parametrize("layout", ["bitmask", "nofm"])
@pytest.mark.parametrize("epilogue", [False, True])
def test_opcheck(layout, epilogue):
    w = weight((32, 64), (2, 4))
    packed = LAYOUTS[layout].pack(w, **({"n": 2, "m": 4} if layout == "nofm" else {}))
    tail = (torch.ones(32), "gelu", torch.randn(3, 32)) if epilogue else (None, None, None)
    arguments = (layout, torch.randn(3, 64), 32, list(packed.tensors()), list(packed.params.values()), *tail)
    torch.library.opcheck(torch.ops.rmtkern.cpu_linear.default, arguments)


@pytest.mark.parametrize(("layout", "params", "nofm"), FORMS, ids=IDS)
def test_copies_and_files(layout, params, nofm):
    w, x = weight((32, 64), nofm), torch.randn(3, 64)
    packed = LAYOUTS[layout].pack(w, **params)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    other = LAYOUTS[layout].pack(weight((32, 64), nofm, seed=1), **params)
    if layout == "dense":
        other.load_state_dict(packed.state_dict())  # the parts of other layouts depend on the weight in size
        assert torch.equal(other.unpack(), w)
    for twin in (copy.deepcopy(packed), torch.load(file, weights_only=False), copy.deepcopy(packed).double().float()):
        assert torch.equal(twin.unpack(), packed.unpack())
        assert torch.equal(ops.linear(x, twin), ops.linear(x, packed))
    assert set(packed.state_dict()) == set(packed.parts)
    assert packed.nbytes == sum(part.nbytes for part in packed.tensors())
    assert str(packed.nbytes) in repr(packed)


@pytest.mark.parametrize(("layout", "params", "nofm"), FORMS, ids=IDS)
def test_what_no_layout_stores(layout, params, nofm):
    pack = LAYOUTS[layout].pack
    with pytest.raises(TypeError, match=r"expected a torch.Tensor \[N, K\], got list"):
        pack([[1.0]], **params)
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\] with N, K >= 1, got shape \(4,\)"):
        pack(torch.ones(4), **params)
    with pytest.raises(ValueError, match=r"got shape \(0, 64\)"):
        pack(torch.ones(0, 64), **params)
    with pytest.raises(ValueError, match=r"expected dtype torch.float32.*, got torch.float64; cast"):
        pack(torch.ones(4, 64, dtype=torch.float64), **params)
    for bad in (float("nan"), float("inf")):
        w = weight((4, 64), nofm)
        w[2, 3] = bad
        with pytest.raises(ValueError, match="NaN or Inf entries; repair the checkpoint"):
            pack(w, **params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_can_be_packed(layout, dtype):
    for nofm in ((2, 4), (3, 8), None):
        w = weight((16, 64), nofm, 0.3).to(dtype)
        for params in LAYOUTS[layout].variants(w):
            assert torch.equal(LAYOUTS[layout].pack(w, **params).unpack(), w + 0.0)


def test_nofm_offers_the_tightest_pattern():
    offered = list(LAYOUTS["nofm"].variants(weight((16, 64), (2, 4))))
    assert offered == [{"n": 2, "m": 4}]
    assert list(LAYOUTS["nofm"].variants(torch.ones(16, 64))) == []


def test_dense_forms(monkeypatch):
    dense = LAYOUTS["dense"]
    w, x = torch.randn(8, 16), torch.randn(3, 16)
    assert [dense.pack(w, form=form).label for form in range(4)] == [
        "dense/torch",
        "dense/onednn",
        "dense/onednn_prepacked",
        "dense/own",
    ]
    with pytest.raises(ValueError, match="dense: form 4 is unknown; expected 0 to 3: torch, onednn"):
        dense.pack(w, form=4)
    with pytest.raises(ValueError, match="dense: unknown parameter n; expected form, tokens"):
        dense.pack(w, n=2)
    packed = dense.pack(w, form=1)
    monkeypatch.setattr("rmtkern.layouts.dense.weight.NO_ONEDNN", "this PyTorch was built without oneDNN; use form 0")
    monkeypatch.setattr("rmtkern.layouts.dense.cpu.NO_ONEDNN", "this PyTorch was built without oneDNN; use form 0")
    assert list(dense.variants(w)) == [{"form": 0}, {"form": 3}]
    with pytest.raises(ValueError, match="built without oneDNN"):
        dense.pack(w, form=2)
    with pytest.raises(ops.KernelUnavailable, match="built without oneDNN"):
        ops.linear(x, packed)
    assert torch.equal(ops.linear(x, dense.pack(w)), x @ w.t())
    monkeypatch.setattr("rmtkern.layouts.dense.cpu.MISSING", "the extension rmtkern._C is not there")
    with pytest.raises(ops.KernelUnavailable, match=r"the extension rmtkern\._C is not there"):
        ops.linear(x, dense.pack(w, form=3))


@pytest.mark.parametrize(("layout", "params", "nofm"), FORMS, ids=IDS)
def test_parts_begin_at_cache_lines(layout, params, nofm):
    packed = LAYOUTS[layout].pack(weight((40, 64), nofm), **params)
    lines = [part for name, part in zip(packed.parts, packed.tensors(), strict=True) if name not in packed.streamed]
    assert lines and all(part.data_ptr() % 64 == 0 for part in lines)


@pytest.mark.parametrize(
    ("layout", "params", "nofm", "dtype"),
    [(*form, dtype) for forms, dtype in ((FORMS, torch.float32), (BF16, torch.bfloat16)) for form in forms],
)
@pytest.mark.parametrize(("n", "k"), [(131, 208), (5, 64)])
def test_what_pack_writes_has_no_damage(layout, params, nofm, dtype, n, k):
    dense = weight((n, k), nofm).to(dtype)
    for part in (LAYOUTS[layout].pack(dense, **params), LAYOUTS[layout].pack(dense, **params).to("cpu")):
        assert part.damage() is None


def damaged(packed, name, change):
    """The weight with a part of it changed."""
    parts = {key: part.clone() for key, part in zip(packed.parts, packed.tensors(), strict=True)}
    change(parts[name])
    return type(packed)(packed.shape, packed.params, tuple(parts.values()))


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damage_that_no_kernel_sees_is_told(dtype, isa, monkeypatch):
    """Kernels run these without leaving their memory, and would compute something else than `unpack` gives."""
    monkeypatch.setenv("RMTKERN_ISA", isa)
    dense = random_sparse(131, 208, 0.5).to(dtype)
    size = {"r": 4, "c": 1} if dtype == torch.float32 else {"r": 4, "c": 2}
    sparse = dense.where(torch.rand(131, 208) < 0.05, 0)
    spectral = LAYOUTS["spectral"].from_parts(torch.randn(131, 3).to(dtype), torch.randn(3, 208).to(dtype), sparse)
    lowrank = LAYOUTS["lowrank"].from_factors(torch.randn(131, 3).to(dtype), torch.randn(3, 208).to(dtype))
    found = [
        (LAYOUTS["bitmask"].pack(dense), "rows", lambda part: part[:2].fill_(int(part[0])), "each strip once"),
        (LAYOUTS["block"].pack(dense, **size), "rows", lambda part: part[:2].fill_(int(part[0])), "each strip once"),
        (spectral, "rows", lambda part: part[:2].fill_(int(part[0])), "each strip once"),
        (spectral, "a", lambda part: part[0, -1:].fill_(1e30), "what fills up the tiles .* is not zero"),
        (spectral, "b", lambda part: part[-1, -1:].fill_(1e30), "what fills up the tiles .* is not zero"),
        (lowrank, "a", lambda part: part[0, -1:].fill_(1e30), "what fills up the tiles .* is not zero"),
        (lowrank, "b", lambda part: part[-1, -1:].fill_(1e30), "what fills up the tiles .* is not zero"),
    ]
    if dtype == torch.bfloat16:
        picked = LAYOUTS["nofm"].pack(weight((131, 208), (2, 4)).to(dtype), n=2, m=4)
        for value in (0x77, 0xFF, 0x00):
            change = lambda part, value=value: part[0, :4].fill_(value)  # noqa: E731
            found.append((picked, "masks", change, "do not name two columns of each group"))
    for packed, name, change, words in found:
        assert packed.damage() is None
        bad = damaged(packed, name, change)
        assert ops.linear(torch.zeros(1, 208, dtype=dtype), bad).shape == (1, 131)
        assert re.search(words, bad.damage()), (packed.layout, name)


def test_what_lies_in_padding_rows_does_not_matter():
    dense = weight((21, 64), (2, 4)).bfloat16()
    packed = LAYOUTS["nofm"].pack(dense, n=2, m=4)
    bad = damaged(packed, "masks", lambda part: part[-1, -4:].fill_(0xFF))
    bad = damaged(bad, "values", lambda part: part[-1, -2:].fill_(1e30))
    assert bad.damage() is None and torch.equal(bad.unpack(), dense + 0.0)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(ops.linear(x, bad), ops.linear(x, packed))


def test_parts_without_numbers_are_refused_by_the_kernels():
    packed = LAYOUTS["bitmask"].pack(random_sparse(8, 64, 0.5))
    packed.values = packed.values.to(torch.int64)
    with pytest.raises(ops.KernelUnavailable, match=r"x is torch\.float32, the weight None; cast x, or pack"):
        ops.linear(torch.zeros(1, 64), packed)
