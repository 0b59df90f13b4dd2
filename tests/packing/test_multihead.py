"""nn.MultiheadAttention in packed models: taken apart, computed, left alone with a reason, given back bit for bit."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rmtkern.attention import attention
from rmtkern.errors import PackedModelError
from rmtkern.files import load, save
from rmtkern.nn import PackedLinear
from rmtkern.packing import is_packed, pack_, unpack_
from rmtkern.packing.attention import AttentionForward
from rmtkern.packing.multihead import PackedMultihead
from rmtkern.storage import read_metadata
from tests.packing.test_pack import assert_same_function, prune, timer, torchvision_small
from tests.test_files import refused, written

LIGHT = {"need_weights": False}


def pruned(model, sparsity=0.8):
    """Every linear weight, in_proj included, with its smallest entries zero."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weight = module.in_proj_weight.data
            weight[weight.abs() < weight.abs().flatten().quantile(sparsity)] = 0.0
    return prune(model, sparsity)


class Block(nn.Module):
    """Attention as people write it, and a linear that can always be packed."""

    def __init__(self, call=None, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(64, 4, **{"batch_first": True, **options})
        self.tail = nn.Linear(64, 64)
        self.call = call or (lambda attn, x: attn(x, x, x, need_weights=False)[0])

    def forward(self, x):
        return self.tail(x + self.call(self.attn, x))


def block(call=None, seed=0, **options):
    torch.manual_seed(seed)
    model = Block(call, **options)
    for key, parameter in model.attn.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)  # they are zero, which would hide a lost one
    return pruned(model), torch.randn(2, 9, 64)


def only(*wanted):
    """A timer by which bitmask wins in weights of these row counts alone, and a packed model over the others."""

    def measure(calls, budget_ms):
        found = [call() for call in calls.values()]
        if "original" in calls:
            return {name: {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}[name] for name in calls}
        rows = found[0].shape[-1] if isinstance(found[0], torch.Tensor) else 0
        fast = "bitmask" if rows in wanted else "dense/torch"
        return {label: 1.0 if label == fast else 2.0 for label in calls}

    return measure


def test_torchvision_is_packed_whole_and_comes_back():
    torch.manual_seed(0)
    model, x = torchvision_small()
    pruned(model)
    first = model.encoder.layers[0].self_attention
    first.note, first.in_proj_bias.requires_grad_(False).requires_grad = "mine", False
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert len(report.layers) == report.packed_layers == 9 and report.packed_share == 1.0
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    shapes = {layer.name: layer.shape for layer in report.layers}
    for name in names:
        assert type(model.get_submodule(name)) is PackedMultihead
        assert shapes[f"{name}.in_proj"] == (192, 64) and shapes[f"{name}.out_proj"] == (64, 64)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert [site.name for site in report.attention] == names
    assert_same_function(model, dense, *x)
    for packed_model in (copy.deepcopy(model), model):
        assert unpack_(packed_model) == 9 and not is_packed(packed_model)
        for name in names:
            one, was = packed_model.get_submodule(name), dense.get_submodule(name)
            assert type(one) is nn.MultiheadAttention and type(one.out_proj) is type(was.out_proj)
            assert set(vars(one)) == set(vars(was))
            for key in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "training", "kdim"):
                assert getattr(one, key) == getattr(was, key), key
        assert packed_model.encoder.layers[0].self_attention.note == "mine"
        assert list(packed_model.state_dict()) == list(dense.state_dict())
        for key, value in dense.state_dict().items():
            assert torch.equal(packed_model.state_dict()[key].view(torch.int32), (value + 0.0).view(torch.int32)), key
        grads = {name: parameter.requires_grad for name, parameter in packed_model.named_parameters()}
        assert grads == {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    model.train()(*x).sum().backward()  # an ordinary model again
    assert model.encoder.layers[1].self_attention.in_proj_weight.grad.abs().sum() > 0


def test_bfloat16_and_compile():
    torch.manual_seed(0)
    model, (x,) = torchvision_small()
    pruned(model)
    with torch.no_grad():
        before = model(x)
        report = pack_(model, x, dtype=torch.bfloat16, timer=timer("block"))
        assert report.packed_share == 1.0
        after = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")(x)
    # two blocks of bfloat16, whose eps is 0.008
    torch.testing.assert_close(after, before, rtol=0, atol=0.03 * float(before.abs().max()))
    torch.testing.assert_close(compiled, after, rtol=0, atol=0.03 * float(before.abs().max()))
    unpack_(model)
    one = model.encoder.layers[0].self_attention
    assert type(one) is nn.MultiheadAttention
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def weighted(attn, x):
    y, weights = attn(x, x, x)
    return y + weights.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("call", "options"),
    [
        (None, {}),
        (weighted, {}),
        (None, {"batch_first": False}),
        (weighted, {"batch_first": False, "dropout": 0.5}),
        (lambda attn, x: attn(query=x, key=x, value=x, average_attn_weights=False)[0], {}),
    ],
)
def test_hand_written_attention(call, options, bias):
    model, x = block(call, bias=bias, **options)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert [(layer.name, layer.packed) for layer in report.layers] == [
        ("attn.in_proj", True),
        ("attn.out_proj", True),
        ("tail", True),
    ]
    assert {layer.tokens for layer in report.layers} == {(18,)}
    assert_same_function(model, dense, x)
    unpack_(model)
    assert torch.equal(model.attn.in_proj_weight, dense.attn.in_proj_weight)
    assert (model.attn.in_proj_bias is None) == (not bias)


@pytest.mark.parametrize("batch_first", [True, False])
def test_every_other_call_of_a_packed_module_is_right(batch_first):
    model, x = block(batch_first=batch_first)
    dense = copy.deepcopy(model.attn)
    pack_(model, x, timer=timer())
    attn, other = model.attn, torch.randn(2, 9, 64)
    assert type(attn) is PackedMultihead
    mask = torch.triu(torch.full((x.shape[1 if batch_first else 0],) * 2, -torch.inf), 1)
    hidden = torch.zeros(x.shape[:2] if batch_first else x.shape[1::-1], dtype=torch.bool)
    hidden[0, -1] = True
    calls = [
        ((x, x, x), {}),
        ((x, x, x), {"average_attn_weights": False}),
        ((x, other, other), {}),
        ((x, other, x), LIGHT),
        ((x, x, x), {"attn_mask": mask, **LIGHT}),
        ((x, x, x), {"attn_mask": mask, "is_causal": True, **LIGHT}),
        ((x, x, x, hidden), {}),
        ((x[0], x[0], x[0]), LIGHT),
        *([((x, x, x), {"is_causal": True, **LIGHT})] if batch_first else []),  # which PyTorch then overlooks
        ((x[:0], x[:0], x[:0]) if batch_first else (x[:, :0],) * 3, LIGHT),
    ]
    with torch.no_grad():
        for args, kwargs in calls:
            (y, weights), (want, wanted) = attn(*args, **kwargs), dense(*args, **kwargs)
            assert y.shape == want.shape and (weights is None) == (wanted is None)
            torch.testing.assert_close(y, want, rtol=0, atol=2e-5)  # float32 sums in another order
            if wanted is not None:
                torch.testing.assert_close(weights, wanted, rtol=0, atol=2e-5)
        with torch.autocast("cpu", torch.bfloat16):
            y, want = attn(x, x, x, **LIGHT)[0], dense(x, x, x, **LIGHT)[0]
        assert y.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(y, want, rtol=0, atol=0.03)  # a few bfloat16 roundings of numbers around 1
        assert torch.equal(attn.in_proj_weight, dense.in_proj_weight)
        assert torch.equal(attn.in_proj_bias, dense.in_proj_bias)


def test_training_and_gradients_are_refused():
    model, x = block()
    pack_(model, x, timer=timer())
    for args in ((x, x, x), (x, torch.randn(2, 9, 64), x)):
        y, _ = model.attn(*args, need_weights=False)
        with pytest.raises(PackedModelError, match=r"no backward pass; call rmtkern\.unpack_\(model\) first"):
            y.sum().backward()
        model.attn.train()
        with pytest.raises(PackedModelError, match=r"a packed model cannot train; call eval\(\)"):
            model.attn(*args, need_weights=False)
        model.attn.eval()


def masks(batch, tokens, heads=4):
    """Masks as people give them to nn.MultiheadAttention; every query sees a key."""
    causal = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1)
    hidden = torch.zeros(batch, tokens, dtype=torch.bool)
    hidden[0, -3:] = True
    added = torch.randn(tokens, tokens)
    per_head = torch.rand(batch * heads, tokens, tokens) < 0.5
    per_head[:, :, 0] = False
    return {
        "causal": {"attn_mask": causal},
        "causal float": {"attn_mask": torch.zeros(tokens, tokens).masked_fill(causal, -torch.inf)},
        "causal hint": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": hidden},
        "padding float": {"key_padding_mask": torch.zeros(batch, tokens).masked_fill(hidden, -torch.inf)},
        "added": {"attn_mask": added},
        "per head": {"attn_mask": per_head},
        "both": {"attn_mask": causal, "key_padding_mask": hidden},
        "both, per head": {"attn_mask": per_head.float() * -9.0, "key_padding_mask": hidden.float() * -5.0},
    }


def in_dtype(options, x):
    """Float masks in the dtype of x, as PyTorch wants them."""
    return {
        key: value.to(x.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in options.items()
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", masks(2, 9))
def test_masked_attention_runs_packed(name, need_weights, batch_first, monkeypatch):
    options = {**masks(2, 9)[name], "need_weights": need_weights}
    model, x = block(lambda attn, x: attn(x, x, x, **in_dtype(options, x))[0], batch_first=batch_first)
    x = x if batch_first else x.transpose(0, 1)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert type(model.attn) is PackedMultihead and report.packed_layers == 3
    monkeypatch.setattr(PackedMultihead, "_unpacked", lambda *args: 1 / 0)
    x = torch.randn_like(x)
    assert_same_function(model, dense, x)
    with torch.no_grad():
        for average in (True, False):
            (y, weights), (want, wanted) = (
                module.attn(x, x, x, average_attn_weights=average, **options) for module in (model, dense)
            )
            torch.testing.assert_close(y, want, rtol=0, atol=2e-5)  # float32 sums in another order
            assert (weights is None) == (wanted is None) == (not need_weights)
            if wanted is not None:
                torch.testing.assert_close(weights, wanted, rtol=0, atol=2e-5)
        if name == "both, per head" and batch_first:
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_masked_attention_in_float64_reference():
    """Against softmax(q kᵀ / sqrt(d) + mask) v written out, so that a mask with the wrong sign or place would show."""
    options = masks(2, 9)["both, per head"]
    model, x = block(lambda attn, x: attn(x, x, x, need_weights=False, **options)[0])
    dense = copy.deepcopy(model).double()
    pack_(model, x, timer=timer())
    wide = x.double()
    qkv = nn.functional.linear(wide, dense.attn.in_proj_weight, dense.attn.in_proj_bias)
    q, k, v = qkv.view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
    scores = (
        q @ k.transpose(-1, -2) / 4
        + options["attn_mask"].view(2, 4, 9, 9)
        + options["key_padding_mask"].view(2, 1, 1, 9)
    )
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    want = dense.tail(wide + dense.attn.out_proj(y))
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), want, rtol=0, atol=2e-5)


def test_the_attention_kernel_takes_masks(monkeypatch):
    options = masks(2, 9)["both"]
    model, x = block(lambda attn, x: attn(x, x, x, need_weights=False, **options)[0])
    dense, ran = copy.deepcopy(model), []
    report = pack_(model, x, timer=kernel_wins)
    assert [site.used for site in report.attention] == [True]
    monkeypatch.setattr(
        "rmtkern.packing.attention.attention", lambda *args, **kwargs: ran.append(1) or attention(*args, **kwargs)
    )
    with torch.no_grad():
        assert_same_function(model, dense, x)
    assert ran == [1]


def test_masks_that_pytorch_refuses_are_refused_alike():
    model, x = block()
    dense = copy.deepcopy(model.attn)
    pack_(model, x, timer=timer())
    with torch.no_grad():
        for options in (
            {"attn_mask": torch.zeros(9, 9, dtype=torch.uint8)},
            {"attn_mask": torch.zeros(9, 8)},
            {"attn_mask": torch.zeros(3, 9, 9)},
            {"key_padding_mask": torch.zeros(2, 8)},
        ):
            with pytest.raises((AssertionError, RuntimeError)) as theirs:
                dense(x, x, x, **options)
            with pytest.raises(theirs.type):
                model.attn(x, x, x, **options)


class Encoder(nn.Module):
    """PyTorch's own encoder, which reads the weights of its linears and its attention to see if its fast path fits."""

    def __init__(self, **call):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu", norm_first=True)
        self.encoder, self.call = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), call

    def forward(self, x):
        return self.encoder(x, **self.call)


@pytest.mark.parametrize("call", [{}, {"mask": masks(2, 9)["causal"]["attn_mask"], "is_causal": True},
                                  {"src_key_padding_mask": masks(2, 9)["padding"]["key_padding_mask"]}])  # fmt: skip
def test_pytorchs_encoder_is_packed_whole(call, tmp_path):
    torch.manual_seed(0)
    model, x = pruned(Encoder(**call)), torch.randn(2, 9, 64)
    dense = copy.deepcopy(model)
    report = pack_(model, x, timer=timer())
    assert report.packed_layers == len(report.layers) == 8, [layer.reason for layer in report.layers]
    assert_same_function(model, dense, torch.randn(2, 9, 64))
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", Encoder(**call))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert unpack_(model) == 8
    assert list(model.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(a, b + 0.0) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


class Strict(nn.Module):
    """Looks at the type of what it calls."""

    def __init__(self, attn):
        super().__init__()
        self.attn, self.tail = attn, nn.Linear(64, 64)

    def forward(self, x):
        if isinstance(self.attn, nn.MultiheadAttention):
            return self.tail(x + self.attn(x, x, x, need_weights=False)[0])
        return self.tail(x)


def altered(change):
    model, x = block()
    change(model)
    return model.eval(), x


class Own(nn.MultiheadAttention):
    pass


def share(model):
    model.again = model.attn


def own_out_proj(model):
    model.attn.out_proj = nn.Linear(64, 64)


REASONS = {
    "q, k and v that are not one tensor": lambda: block(lambda attn, x: attn(x, x + 1, x + 1)[0]),
    "not a batch of sequences": lambda: block(lambda attn, x: attn(*[x[0]] * 3)[0]),
    "never calls it": lambda: block(lambda attn, x: x),
    r"other code reads its \.": lambda: block(lambda attn, x: nn.functional.linear(x, attn.in_proj_weight[:64])),
    "separate projections": lambda: block(add_zero_attn=True),
    "bias_k": lambda: block(add_bias_kv=True),
    "it has hooks or a replaced forward|has hooks": lambda: altered(
        lambda model: model.attn.register_forward_hook(lambda module, args, output: output)
    ),
    "it is a Own, whose forward may differ": lambda: altered(
        lambda model: setattr(model, "attn", Own(64, 4, batch_first=True))
    ),
    "shared under the names attn, again": lambda: altered(share),
    "out_proj is a Linear": lambda: altered(own_out_proj),
    "children of its own": lambda: altered(lambda model: model.attn.register_buffer("more", torch.zeros(1))),
    "needs nn.MultiheadAttention itself": lambda: (
        pruned(Strict(nn.MultiheadAttention(64, 4, batch_first=True))),
        torch.randn(2, 9, 64),
    ),
    "tied to": lambda: altered(lambda model: setattr(model.attn.out_proj, "weight", model.tail.weight)),
}


@pytest.mark.parametrize("words", REASONS)
def test_what_stays_whole_says_why(words):
    model, x = REASONS[words]()
    dense, kind = copy.deepcopy(model), type(model.attn)
    report = pack_(model, x, timer=timer())
    reasons = {layer.name: layer.reason for layer in report.layers if layer.name.startswith(("attn", "again"))}
    assert {"attn.in_proj", "attn.out_proj"} <= set(reasons)
    for reason in reasons.values():
        assert re.search(words, reason), reason
    assert type(model.attn) is kind and not any(isinstance(module, PackedMultihead) for module in model.modules())
    assert_same_function(model, dense, x)
    assert "tied" in words or {layer.name: layer.packed for layer in report.layers}["tail"]


def test_separate_projections_and_lone_modules():
    model, x = block(lambda attn, x: attn(x, x[..., :6], x[..., :4], need_weights=False)[0], kdim=6, vdim=4)
    report = pack_(model, x, timer=timer())
    assert [layer.name for layer in report.layers] == ["attn.out_proj", "tail"] and report.layers[1].packed
    assert "separate projections" in report.layers[0].reason
    lone = pruned(nn.MultiheadAttention(64, 4, batch_first=True))
    report = pack_(lone, (x, x, x), timer=timer())
    assert [layer.name for layer in report.layers] == ["in_proj", "out_proj"]
    assert all("wrap it in nn.Sequential" in layer.reason for layer in report.layers)


def test_a_failure_halfway_gives_the_module_back(monkeypatch):
    model, x = block()
    attn, state = model.attn, copy.deepcopy(model.state_dict())
    for place in ("measure_sites", "measure_group", "guard", "find_layers", "verify"):
        with monkeypatch.context() as patch:
            patch.setattr(f"rmtkern.packing.pack.{place}", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pack_(model, x, dtype=torch.bfloat16, timer=timer())
        assert model.attn is attn and not is_packed(model)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.attn.in_proj_weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"attn\.in_proj\.weight has NaN or Inf"):
        pack_(model, x, timer=timer())
    assert model.attn is attn


def test_the_guard_puts_the_whole_module_back():
    model, x = block()
    attn = model.attn
    report = pack_(model, x, timer=timer(whole={"original": 1.0, "dense": 2.0, "packed": 3.0}))
    assert model.attn is attn and not is_packed(model) and report.packed_layers == 0
    assert {layer.form for layer in report.layers} == {"nn.Linear"}
    assert "forward" not in vars(attn)


def kernel_wins(calls, budget_ms):
    if "attention/kernel" in calls:
        return {"attention/torch": 2.0, "attention/kernel": 1.0}
    return timer()(calls, budget_ms)


def test_the_attention_kernel_runs_in_it(monkeypatch):
    model, x = block()
    attn, dense = model.attn, copy.deepcopy(model)
    report = pack_(model, x, timer=kernel_wins)
    assert [site.used for site in report.attention] == [True]
    assert [forward.module for forward in AttentionForward.of(model)] == [model.attn]
    assert "forward" not in vars(attn)
    ran = []
    monkeypatch.setattr(
        "rmtkern.packing.attention.attention", lambda *args, **kwargs: ran.append(1) or attention(*args, **kwargs)
    )
    with torch.no_grad():
        assert_same_function(model, dense, x)
        assert ran == [1]
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
    unpack_(model)
    assert AttentionForward.of(model) == [] and not is_packed(model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rows", [192, 64])
def test_one_of_the_two_linears_may_stay_plain(rows, dtype, tmp_path):
    model, x = block()
    before = copy.deepcopy(model)
    pack_(model, x, dtype=dtype, timer=only(rows), layouts=["bitmask"])
    kinds = {192: (PackedLinear, nn.Linear), 64: (nn.Linear, PackedLinear)}[rows]
    assert (type(model.attn.in_proj), type(model.attn.out_proj)) == kinds
    path = tmp_path / "model.safetensors"
    save(model, path)
    again = load(path, block(seed=1)[0])
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        y = model.attn(x.to(dtype or x.dtype), x.to(dtype or x.dtype), x.to(dtype or x.dtype))[0]
        assert torch.isfinite(y).all()
    for packed_model in (model, again):
        assert unpack_(packed_model) > 0 and type(packed_model.attn) is nn.MultiheadAttention
        for key, value in before.state_dict().items():
            got = packed_model.state_dict()[key]
            assert torch.equal(got, value.to(dtype or value.dtype).to(value.dtype)) and got.dtype == value.dtype, key


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Tensors and record of a file of a packed block."""
    model, x = block()
    pack_(model, x, timer=kernel_wins)
    path = tmp_path_factory.mktemp("multihead") / "small.safetensors"
    save(model, path)
    return load_file(path), json.loads(read_metadata(path)["rmtkern"])


def test_files_hold_it(parts, tmp_path):
    tensors, record = copy.deepcopy(parts)
    assert record["multiheads"] == record["attention"] == ["attn"]
    assert set(record["linears"]) == {"attn.in_proj", "attn.out_proj", "tail"}
    with torch.device("meta"):
        empty = Block()
    again = load(written(tmp_path, tensors, record), empty)
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    model, x = block()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=2e-5)
    assert len(AttentionForward.of(again)) == 1 and unpack_(again) == 3
    assert torch.equal(again.attn.in_proj_weight, model.attn.in_proj_weight)


def test_a_file_from_before_attention_was_packed_loads(tmp_path):
    model, x = block()
    pack_(model, x, timer=only(), layouts=[])
    assert not is_packed(model)
    model.attn.register_forward_hook(lambda module, args, output: output)  # stays whole, as it did then
    pack_(model, x, timer=timer())
    path = tmp_path / "small.safetensors"
    save(model, path)
    tensors, record = load_file(path), json.loads(read_metadata(path)["rmtkern"])
    assert record.pop("multiheads") == [] and "attn.in_proj_weight" in tensors
    again = load(written(tmp_path, tensors, record), block(seed=1)[0])
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


CHANGES = {
    "kind": (lambda t, r: r.update(multiheads="attn"), "multiheads: expected names"),
    "entry": (lambda t, r: r.update(multiheads=[["attn"]]), "multiheads: expected names"),
    "unknown": (lambda t, r: r.update(multiheads=["attn", "7"]), "the model has no module '7'"),
    "another": (
        lambda t, r: r.update(multiheads=["attn", "tail"]),
        "'tail' cannot be taken apart .*it is a Linear, not an nn.Multihead",
    ),
    "model": (lambda t, r: r.update(multiheads=["attn", ""]), "cannot be taken apart .*it is the model itself"),
    "inside": (lambda t, r: r.update(multiheads=["attn", "attn.in_proj"]), "the model has no module 'attn.in_proj'"),
    "none": (
        lambda t, r: r.update(multiheads=[]),
        "attn.in_proj is in an nn.MultiheadAttention that the file does not",
    ),
    "shape": (lambda t, r: r["linears"]["attn.in_proj"].update(features=[64, 64]), r"attn.in_proj is \[64, 64\]"),
    "child": (
        lambda t, r: r["linears"].update({"attn.in_proj_weight": r["linears"]["tail"]}),
        "attn.in_proj_weight is in an nn.MultiheadAttention",
    ),
    "packed": (
        lambda t, r: [r["linears"].pop(name) for name in ("attn.in_proj", "attn.out_proj")],
        "attn is taken apart and none of its linears is packed",
    ),
    "one less": (lambda t, r: r["linears"].pop("attn.in_proj"), r"missing \(attn.in_proj.weight"),
    "absorbed": (lambda t, r: r.update(absorbed=["attn"]), "attn is no activation in the model"),
    "norms": (lambda t, r: r.update(norms=["attn"]), "attn is no nn.LayerNorm"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_entries_are_refused_by_name(name, parts, tmp_path):
    tensors, record = copy.deepcopy(parts)
    change, message = CHANGES[name]
    change(tensors, record)
    refused(written(tmp_path, tensors, record), message, lambda: block()[0])
