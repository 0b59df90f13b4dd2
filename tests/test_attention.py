"""The attention kernel on every instruction set against float64, and its use in real models."""

import copy
import threading

import pytest
import torch
from torch.nn import functional as F

from rmtkern.attention import attention, reason_against
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import cpu
from rmtkern.packing import pack_, unpack_
from rmtkern.packing.attention import AttentionForward, watch_attention
from rmtkern.packing.sites import disable, enable
from tests.packing.test_pack import timer, timm_tiny, torchvision_small, transformers_small

DTYPES = [torch.float32, torch.bfloat16]
# prime and tiny; a whole ViT head; more keys than a block, up to 960 of d = 64, with few queries and with many
LENGTHS = [(1, 1), (3, 17), (17, 3), (197, 197), (5, 1100), (400, 40)]


def heads(tokens, d, dtype, seed, batch=2, n=3):
    """[batch, n, tokens, d] as models have it: a transposed view of a projection."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, n, d, generator=generator).to(dtype).transpose(1, 2)


def definition(q, k, v, mask=None, scale=None):
    """softmax(q kᵀ scale + mask) v in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v.double()


def assert_accurate(y, q, k, v, mask=None, scale=None):
    """Twice PyTorch's error plus 4 eps of the largest value: an output is a mean of values, which may cancel."""
    exact = definition(q, k, v, mask, scale)
    cast = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=cast, scale=scale)
    allowed = 2 * (dense - exact).abs().max() + 4 * torch.finfo(q.dtype).eps * v.abs().max()
    assert y.dtype == q.dtype and y.shape == exact.shape
    assert (y - exact).abs().max() <= allowed


@pytest.fixture(params=cpu.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 31, 32, 34, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_accuracy(isa, dtype, d, queries, keys):
    q, k, v = heads(queries, d, dtype, 0), heads(keys, d, dtype, 1), heads(keys, d, dtype, 2)
    assert_accurate(attention(q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.0, -0.5, 3.0])
@pytest.mark.parametrize("kind", ["bool", "bias", "per_key", "per_query", "2d"])
def test_masks_and_scales(isa, dtype, kind, scale):
    q, k, v = heads(17, 32, dtype, 0), heads(600, 32, dtype, 1), heads(600, 32, dtype, 2)
    generator = torch.Generator().manual_seed(3)
    mask = {
        "bool": torch.rand(2, 1, 17, 600, generator=generator) > 0.3,
        "bias": torch.randn(1, 3, 17, 600, generator=generator).to(dtype),
        "per_key": torch.randn(2, 1, 1, 600, generator=generator).to(dtype),
        "per_query": torch.randn(2, 1, 17, 1, generator=generator).to(dtype),
        "2d": torch.randn(600, 17, generator=generator).to(dtype).t(),
    }[kind]
    assert_accurate(attention(q, k, v, mask=mask, scale=scale), q, k, v, mask, scale)


def test_a_query_that_sees_no_key_gives_zeros(isa):
    q, k, v = (heads(20, 32, torch.float32, i) for i in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[4] = False
    y = attention(q, k, v, mask=mask)
    assert (y[:, :, 4] == 0).all() and torch.isfinite(y).all()
    assert torch.equal(y[:, :, 5], attention(q, k, v)[:, :, 5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences(isa, dtype):
    q, k, v = heads(250, 64, dtype, 0, 1, 2), heads(12608, 64, dtype, 1, 1, 2), heads(12608, 64, dtype, 2, 1, 2)
    assert_accurate(attention(q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [slice(0, 1500), slice(1000, 2000)])
def test_whole_blocks_of_keys_may_be_hidden(isa, dtype, hidden):
    q, k, v = heads(30, 64, dtype, 0), heads(2000, 64, dtype, 1), heads(2000, 64, dtype, 2)
    mask = torch.ones(30, 2000, dtype=torch.bool)
    mask[3:, hidden] = False
    assert_accurate(attention(q, k, v, mask=mask), q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_finite_mask_is_not_minus_infinity(isa, dtype):
    """transformers masks with finfo.min: a query that sees nothing else gets the mean of all values, as in PyTorch."""
    q, k, v = (heads(20, 32, dtype, i) for i in range(3))
    mask = torch.zeros(20, 20, dtype=dtype)
    mask[4], mask[5, :10] = torch.finfo(dtype).min, torch.finfo(dtype).min
    y = attention(q, k, v, mask=mask)
    assert_accurate(y, q, k, v, mask)
    mean = v.double().mean(2)
    assert (y[:, :, 4] - mean).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("keys", [20, 1100])
def test_inf_and_nan_in_v_stay_in_their_output(isa, dtype, special, keys):
    q, k, v = heads(20, 32, dtype, 0), heads(keys, 32, dtype, 1), heads(keys, 32, dtype, 2)
    v[1, 2, 7, 5] = special
    y, expected = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(torch.isnan(y), torch.isnan(expected)) and torch.equal(y.isinf(), expected.isinf())
    y[1, 2, :, 5] = 0
    assert torch.isfinite(y).all()


def test_large_scores_do_not_overflow(isa):
    q, k, v = (heads(40, 16, torch.float32, i) for i in range(3))
    assert_accurate(attention(200 * q, k, v), 200 * q, k, v)


def test_inf_and_nan_stay_in_their_rows(isa):
    q, k, v = (heads(20, 32, torch.float32, i) for i in range(3))
    q[0, 0, 3, 5] = torch.nan
    y = attention(q, k, v)
    assert torch.isnan(y[0, 0, 3]).all()
    assert torch.isfinite(y[0, 0, :3]).all() and torch.isfinite(y[0, 0, 4:]).all() and torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_one_projection_and_the_output_layout(dtype):
    qkv = torch.randn(2, 50, 3, 4, 32).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    y = attention(q, k, v)
    assert_accurate(y, q, k, v)
    assert y.transpose(1, 2).is_contiguous()
    odd = torch.randn(2, 4, 32, 50).to(dtype).transpose(2, 3)  # the last dimension is not contiguous: copied
    assert_accurate(attention(odd, k, v), odd, k, v)
    assert torch.equal(attention(q[:0], k[:0], v[:0]), q.new_empty(0, 4, 50, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [300, 1100])
def test_threads_give_the_same_bits(dtype, keys):
    q, k, v = heads(300, 64, dtype, 0), heads(keys, 64, dtype, 1), heads(keys, 64, dtype, 2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    found = [None] * 4

    def work(i):
        found[i] = attention(q, k, v)

    running = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(torch.equal(results[0], other) for other in found)


def test_opcheck():
    q, k, v = (heads(5, 16, torch.float32, i) for i in range(3))
    mask = torch.zeros(5, 5).expand(2, 3, 5, 5)
    for one in (None, mask):
        torch.library.opcheck(torch.ops.rmtkern.cpu_attention.default, (q, k, v, one, 0.25))


def test_refusals(monkeypatch):
    q, k, v = (heads(5, 16, torch.float32, i) for i in range(3))
    with pytest.raises(TypeError, match=r"k: expected a Tensor \[B, H, T, d\], got list"):
        attention(q, [1], v)
    with pytest.raises(ValueError, match=r"q: expected \[B, H, Tq, d\], got \[3, 5, 16\]"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"k: expected \[2, 3, Tk >= 1, 16\] as q and k say, got \[2, 3, 5, 8\]"):
        attention(q, k[..., :8], v)
    with pytest.raises(ValueError, match=r"v: expected \[2, 3, Tk >= 1, 16\] as q and k say, got \[2, 3, 4, 16\]"):
        attention(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match=r"k: .* got \[2, 3, 0, 16\]"):
        attention(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match=r"v: expected torch.float32 as q is, got torch.bfloat16"):
        attention(q, k, v.bfloat16())
    with pytest.raises(ValueError, match=r"mask: expected a shape broadcastable to \[2, 3, 5, 5\], got \[7\]"):
        attention(q, k, v, mask=torch.zeros(7))
    with pytest.raises(KernelUnavailable, match=r"q is torch.float64; cast to torch.float32 or torch.bfloat16"):
        attention(q.double(), k.double(), v.double())
    assert "device meta" in reason_against(q.to("meta"), k, v)
    monkeypatch.setattr(cpu, "MISSING", "the extension is not there; install a compiler")
    with pytest.raises(KernelUnavailable, match="no attention kernel runs this call: the extension is not there"):
        attention(q, k, v)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 5, 16).double()}, TypeError, "q must be float32 or bfloat16"),
        ({"q": torch.zeros(3, 5, 16)}, ValueError, r"q and k must have shape \(B, H, T, d\)"),
        ({"k": torch.zeros(2, 3, 0, 16)}, ValueError, "at least one key and d >= 1"),
        ({"k": torch.zeros(2, 3, 5, 8)}, ValueError, r"k must have shape \(2, 3, 5, 16\), got \(2, 3, 5, 8\)"),
        ({"v": torch.zeros(2, 3, 5, 16, dtype=torch.int32)}, TypeError, "v must be float32 as q is, got int32"),
        ({"v": torch.zeros(2, 3, 16, 5).transpose(2, 3)}, TypeError, "v must be contiguous in its last dimension"),
        ({"mask": torch.zeros(5, 5)}, ValueError, r"mask must have shape \(2, 3, 5, 5\), got \(5, 5\)"),
        ({"y": torch.zeros(2, 3, 5, 16)}, ValueError, r"y must have shape \(2, 5, 3, 16\)"),
        ({"y": torch.zeros(2, 3, 5, 16).transpose(1, 2)}, TypeError, "y must be C-contiguous"),
        ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        ({"isa": "mmx"}, ValueError, "unknown instruction set 'mmx'"),
    ],
)
def test_boundary_refuses(changes, error, message):
    call = {
        **{name: torch.zeros(2, 3, 5, 16) for name in "qkv"},
        "mask": None,
        "y": torch.zeros(2, 5, 3, 16),
        "scale": 1.0,
        "threads": 1,
        **changes,
    }
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    with pytest.raises(error, match=message):
        cpu.extension().attention(**arrays)


def first(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@pytest.mark.parametrize(("build", "sites"), [(timm_tiny, 2), (transformers_small, 2), (torchvision_small, 2)])
def test_real_models_call_the_kernel(build, sites):
    torch.manual_seed(0)
    model, x = build()
    model.eval()
    with torch.no_grad(), watch_attention(model) as calls:
        before = first(model(*x))
    assert len(calls) == sites and all(call.reason is None for found in calls.values() for call in found)
    modules = [AttentionForward(model.get_submodule(name)) for name in calls]
    enable(modules)
    assert AttentionForward.of(model) == modules
    torch._dynamo.reset()
    with torch.no_grad():
        after = first(model(*x))
        # float32 sums in another order, through two blocks
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
        for twin in (copy.deepcopy(model), torch.compile(model, backend="eager")):
            torch.testing.assert_close(first(twin(*x)), after, rtol=0, atol=1e-5 * float(after.abs().max()))
    disable(modules)
    with torch.no_grad():
        assert AttentionForward.of(model) == []
        torch.testing.assert_close(first(model(*x)), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_training_keeps_pytorchs_attention():
    model, x = timm_tiny()
    with torch.no_grad(), watch_attention(model) as calls:
        model(*x)
    enable(AttentionForward(model.get_submodule(name)) for name in calls)
    first(model(*x)).sum().backward()  # needs a gradient, which the kernel has not
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def multihead(**options):
    return torch.nn.MultiheadAttention(32, 4, **{"batch_first": True, **options}).eval()


def test_multihead_attention_leaves_other_calls_to_pytorch():
    x, other = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    light = {"need_weights": False}
    cases = {
        "the attention weights are asked for": (multihead(), (x, x, x), {}),
        "q, k and v are not one tensor": (multihead(), (x, other, other), light),
        "it has a mask": (multihead(), (x, x, x), {**light, "attn_mask": torch.zeros(9, 9)}),
        "batch first": (multihead(batch_first=False), (x, x, x), light),
        "separate projections": (multihead(add_zero_attn=True), (x, x, x), light),
        "it has dropout": (multihead(dropout=0.5).train(), (x, x, x), light),
        "torch.float64": (multihead().double(), (x.double(),) * 3, light),
        "the input is empty": (multihead(), (x[:0],) * 3, light),
    }
    for reason, (module, args, kwargs) in cases.items():
        with torch.no_grad(), watch_attention(torch.nn.ModuleDict({"a": module})) as calls:
            torch.manual_seed(1)
            before, weights = module(*args, **kwargs)
            enable([AttentionForward(module)])
            torch.manual_seed(1)
            after, same = module(*args, **kwargs)
        assert reason in calls["a"][0].reason
        # PyTorch's fast path and its other one round differently
        torch.testing.assert_close((after, same), (before, weights), rtol=0, atol=1e-5)
    module = multihead()
    enable([AttentionForward(module)])
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert module.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multihead_attention_is_checked_against_float64(bias, dtype, monkeypatch):
    model, x = torch.nn.ModuleDict({"a": multihead(bias=bias).to(dtype)}), torch.randn(2, 9, 32).to(dtype)
    with torch.no_grad(), watch_attention(model) as calls:
        model["a"](x, x, x, need_weights=False)
    (call,) = calls["a"]
    with torch.no_grad():
        assert call.reason is None and call.q.shape == (2, 4, 9, 8) and call.excess() <= 1
        monkeypatch.setattr("rmtkern.packing.attention.attention", lambda q, k, v: attention(k, q, v))
        assert call.excess() > 1


def test_autocast_keeps_pytorchs_attention():
    attn, x, module = timm_tiny()[0].eval().blocks[0].attn, torch.randn(2, 9, 32), multihead()
    wide = torch.randn(1, 4, attn.qkv.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = attn(wide), module(x, x, x, need_weights=False)[0]
        with watch_attention(torch.nn.ModuleDict({"a": attn, "b": module})) as calls:
            attn(wide), module(x, x, x, need_weights=False)
        assert [found[0].reason for found in calls.values()] == ["autocast chooses the dtype"] * 2
        enable([AttentionForward(attn), AttentionForward(module)])
        after = attn(wide), module(x, x, x, need_weights=False)[0]
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pack_uses_it_where_it_is_faster_and_unpack_takes_it_back(dtype):
    model, x = timm_tiny()
    model.eval()
    before, plain = model(*x).detach(), timer("dense/torch")

    def measure(calls, budget_ms):
        if "attention/kernel" in calls:
            plain(calls, budget_ms)
            return {"attention/torch": 2.0, "attention/kernel": 1.0}
        return plain(calls, budget_ms)

    report = pack_(model, x, dtype=dtype, timer=measure)
    assert [(site.name, site.used, site.torch_ms, site.kernel_ms) for site in report.attention] == [
        (f"blocks.{i}.attn", True, 2.0, 1.0) for i in range(2)
    ]
    assert "attention kernel in 2 of 2 modules: 2.00x PyTorch's" in str(report) and len(AttentionForward.of(model)) == 2
    tolerance = 0.03 if dtype else 1e-5  # two blocks of bfloat16, or sums in another order
    torch.testing.assert_close(model(*x).detach(), before, rtol=0, atol=tolerance * float(before.abs().max()))
    unpack_(model)
    assert AttentionForward.of(model) == []


def test_pack_leaves_it_where_it_is_not_faster_or_not_wanted():
    model, x = timm_tiny()
    report = pack_(model.eval(), x, timer=timer("dense/torch"))  # both take 3 ms
    assert AttentionForward.of(model) == [] and [site.used for site in report.attention] == [False, False]
    assert "1.00x PyTorch's, short of the margin (3 % less time)" in report.attention[0].reason
    unpack_(model)
    assert pack_(model, x, timer=timer("dense/torch"), attention=False).attention == ()


def test_the_guard_puts_attention_back():
    model, x = timm_tiny()

    def measure(calls, budget_ms):
        if "attention/kernel" in calls:
            return {"attention/torch": 2.0, "attention/kernel": 1.0}
        if "original" in calls:
            return {"original": 1.0, "packed": 2.0 if AttentionForward.of(model) else 1.0, "dense": 1.0} | {
                name: 1.0 if name != "packed" else 2.0 for name in calls
            }
        return {label: 1.0 if label == "dense/torch" else 2.0 for label in calls}

    report = pack_(model.eval(), x, timer=measure)
    assert AttentionForward.of(model) == [] and not any(site.used for site in report.attention)
    assert any("the attention kernel made the model slower: PyTorch's was put back" in note for note in report.notes)
