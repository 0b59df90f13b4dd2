"""Linears whose weight other code gives to F.linear, as attention with biases of its own for q and v does."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from rmtkern.api import analyze
from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.files import load, save
from rmtkern.nn import PackedGatedLinear, PackedLinear
from rmtkern.packing import pack_, unpack_
from rmtkern.packing.lent import LendingLinear, LentWeight
from rmtkern.packing.watch import DESCRIPTIVE
from tests.packing.test_pack import assert_same_function, prune, timer


class Attention(nn.Module):
    """Biases for q and v beside the linear, none for k, as in BEiT."""

    def __init__(self, dim=64):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = F.linear(x, weight=self.qkv.weight, bias=bias).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Functional(nn.Module):
    """All parameters handed to a function, as in torchvision's Swin."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)

    def forward(self, x):
        return F.linear(self.act(F.linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)


def packed(kind=Attention, x=None, **options):
    torch.manual_seed(0)
    model = prune(kind(), 0.9)
    dense = copy.deepcopy(model)
    report = pack_(model, torch.randn(2, 9, 64) if x is None else x, timer=timer(), **options)
    return model, dense, report


def test_a_bias_computed_outside_the_linear_is_the_one_of_the_call():
    model, dense, report = packed()
    assert report.packed_layers == 2 and type(model.qkv) is LendingLinear and type(model.proj) is PackedLinear
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(3, 5, 64)
        assert_same_function(model, dense, x)
        change = torch.randn(64)
        for module in (model, dense):
            module.q_bias.data = module.q_bias.data + change
            module.v_bias.data = module.v_bias.data - change


def test_weights_and_biases_handed_to_a_function():
    model, dense, report = packed(Functional)
    assert report.packed_layers == 2
    assert type(model.act) is nn.GELU and model.fc1.activation is None  # F.linear applies none, so none is absorbed
    assert_same_function(model, dense, torch.randn(2, 9, 64))


def test_a_linear_that_is_also_called():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(64, 64), nn.ReLU()

        def forward(self, x):
            return self.act(self.linear(x)) + F.linear(x[:1], self.linear.weight)

    model, dense, report = packed(Both)
    assert report.packed_layers == 1 and report.layers[0].tokens == (9, 18)
    assert type(model.act) is nn.ReLU
    assert_same_function(model, dense, torch.randn(2, 9, 64))


def test_each_token_count_takes_its_own_form():
    fewer, more = torch.randn(1, 2, 64), torch.randn(2, 32, 64)

    def measure(calls, budget_ms):
        found = timer()(calls, budget_ms)
        few = "original" not in calls and next(iter(calls.values()))().shape[0] == 2
        return {name: 0.5 if few and name == "dense/own" else ms for name, ms in found.items()}

    torch.manual_seed(0)
    model = prune(Attention(), 0.9)
    dense = copy.deepcopy(model)
    pack_(model, [fewer, more], timer=measure)
    assert [form.layout for form in model.qkv.forms] == ["dense", "bitmask"]
    for x in (fewer, more):
        assert_same_function(model, dense, x)


def test_a_gate_whose_weight_is_lent_stays_out_of_a_pair():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return F.silu(self.gate(x)) * self.up(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Gated()

        def forward(self, x):
            return self.mlp(F.linear(x, self.mlp.gate.weight))

    model, dense, report = packed(Outer)
    assert report.gated == () and not any(isinstance(module, PackedGatedLinear) for module in model.modules())
    assert report.packed_layers == 2
    assert_same_function(model, dense, torch.randn(2, 9, 64))


class Reader(nn.Module):
    """Does something with a linear's weight."""

    def __init__(self, use):
        super().__init__()
        self.linear, self.tail, self.use, self.kept = nn.Linear(64, 64), nn.Linear(64, 64), use, None

    def forward(self, x):
        return self.tail(self.use(self, self.linear, x))


def keep(reader, linear, x):
    reader.kept = linear.weight
    return F.linear(x, reader.kept)


def by_type(reader, linear, x):
    weight = linear.weight
    return F.linear(x, weight) if isinstance(weight, torch.Tensor) else x[:1]


LEFT = {
    "and gives it to torch.Tensor.sum": lambda r, linear, x: linear(x) * linear.weight.sum(),
    "and gives it to torch.sum": lambda r, linear, x: F.linear(x, linear.weight) * torch.sum(linear.weight),
    "and gives it to torch.cat": lambda r, linear, x: F.linear(x, torch.cat([linear.weight, linear.weight])[:64]),
    "and gives it to torch.Tensor.matmul": lambda r, linear, x: x @ linear.weight,
    "and gives it to torch.Tensor.__getitem__": lambda r, linear, x: F.linear(x[..., :32], linear.weight[:, :32]),
    "besides its own forward and gives it to torch.Tensor.__getitem__": lambda r, linear, x: F.linear(
        x, torch.cat([linear.weight[:32], linear.weight[32:]])
    ),
    "and gives it to torch.Tensor.to": lambda r, linear, x: F.linear(x, linear.weight.to(x.dtype)),
    "and gives it to torch.Tensor.chunk": lambda r, linear, x: F.linear(x, linear.weight.chunk(2)[0]).repeat(1, 1, 2),
    "and gives it to torch.Tensor.t": lambda r, linear, x: F.linear(x, linear.weight.t()),
    "and gives it to torch.Tensor.is_contiguous": lambda r, linear, x: x if linear.weight.is_contiguous() else x + 1,
    "and gives it to F.linear as its input or bias": lambda r, linear, x: x + F.linear(linear.weight, linear.weight)[0],
    "and calls F.linear with another dtype than torch.float32 or a bias that is not": lambda r, linear, x: F.linear(
        x, linear.weight, x.new_ones(1)
    ),
    "and keeps it": keep,
    "and fails or differs without a tensor there": by_type,
}


ASKED = {
    "cast to": lambda r, linear, x: F.linear(x.double().to(linear.weight.dtype), linear.weight),
    "only cast to": lambda r, linear, x: linear(x.to(linear.weight.dtype).to(linear.weight.device)),
    "sizes": lambda r, linear, x: F.linear(x[..., : linear.weight.shape[1]], linear.weight)[
        ..., : linear.weight.size(0)
    ],
    "counts": lambda r, linear, x: linear(x) * (linear.weight.numel() + linear.weight.dim() + linear.weight.ndim),
    "whole size": lambda r, linear, x: linear(x).reshape(-1, *linear.weight.size()).flatten(0, 1).view(x.shape),
    "flags": lambda r, linear, x: (
        linear(x)
        if linear.weight.is_floating_point() and not linear.weight.is_cuda and linear.weight.requires_grad
        else x
    ),
    "whether it is there": lambda r, linear, x: linear(x) if linear.weight is not None else x,
}


@pytest.mark.parametrize("use", ASKED)
def test_what_a_weight_is_can_be_asked(use):
    model, dense, report = packed(lambda: Reader(ASKED[use]), torch.randn(1, 64, 64))
    assert report.packed_layers == 2 and type(model.linear) is LendingLinear
    assert_same_function(model, dense, torch.randn(2, 64, 64))
    with torch.no_grad():
        torch._dynamo.reset()
        x = torch.randn(1, 64, 64)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_lent_weight_says_what_the_weight_is():
    model, dense, _ = packed(lambda: Reader(ASKED["sizes"]))
    for module in (model, copy.deepcopy(model)):
        lent, weight = module.linear.weight, dense.linear.weight
        for name in DESCRIPTIVE:
            got, want = getattr(lent, name), getattr(weight, name)
            assert got() == want() if callable(want) else got == want, name
        assert lent.size(1) == weight.size(1) and type(lent.shape) is torch.Size
    bf16 = model.to(torch.bfloat16)
    assert bf16.linear.weight.dtype == torch.bfloat16
    form = bf16.tail.weight  # of a packed linear that nobody was seen to read
    assert (form.dtype, form.device, form.shape) == (torch.bfloat16, torch.device("cpu"), (64, 64))


@pytest.mark.parametrize("reason", LEFT)
def test_other_uses_keep_the_linear_dense(reason):
    model, dense, report = packed(lambda: Reader(LEFT[reason]))
    by_name = {layer.name: layer for layer in report.layers}
    assert "other code reads its .weight besides its own forward and" in by_name["linear"].reason
    assert reason in by_name["linear"].reason
    assert type(model.linear) is nn.Linear and by_name["tail"].packed
    assert type(model.kept) in (type(None), torch.Tensor, nn.Parameter)
    assert_same_function(model, dense, torch.randn(2, 9, 64))


def test_one_that_needs_a_tensor_does_not_keep_the_others_dense():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.strict = Attention(), Reader(by_type)

        def forward(self, x):
            return self.strict(self.plain(x))

    model, dense, report = packed(Two)
    assert [layer.name for layer in report.layers if layer.packed] == ["plain.qkv", "plain.proj", "strict.tail"]
    assert_same_function(model, dense, torch.randn(2, 9, 64))


def test_a_use_that_the_example_did_not_show_is_refused():
    model, *_ = packed(Functional)
    weight, x = model.fc1.weight, torch.randn(2, 64)
    assert type(weight) is LentWeight
    uses = (
        lambda: torch.sum(weight),
        lambda: x @ weight,
        lambda: x + weight,
        lambda: torch.cat([weight, weight]),
        lambda: F.linear(weight, weight),
        lambda: F.linear(x, x, weight),
    )
    for use in uses:
        with pytest.raises(PackedModelError, match=r"gives a packed weight to .*: call rmtkern\.unpack_\(model\)"):
            use()
    for part in (lambda: weight[:32], lambda: weight[:, 0], lambda: F.linear(x, weight[:32])):
        with pytest.raises(PackedModelError, match=r"takes a part of a packed weight, .*: call rmtkern\.unpack_"):
            part()
    with pytest.raises(AttributeError, match=r"reads \.sum of a packed weight, which only F\.linear can use: call"):
        weight.sum()
    with pytest.raises(ValueError, match=r"bias: expected \[64\] torch\.float32, got \[1\]"):
        F.linear(x, weight, torch.ones(1))


def test_no_training_through_a_lent_weight():
    model, *_ = packed()
    x = torch.randn(2, 9, 64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    y = F.linear(x, model.qkv.weight)
    with pytest.raises(PackedModelError, match="a packed model has no backward pass"):
        y.sum().backward()
    model.train()
    with pytest.raises(PackedModelError, match="a packed model cannot train"):
        model(x)


def test_unpacked_weights_have_the_same_bits():
    model, dense, _ = packed()
    for kind in (model, copy.deepcopy(model)):
        assert_same_function(kind, dense, torch.randn(2, 9, 64))
        assert unpack_(kind) == 2
        assert all(torch.equal(a, b) for a, b in zip(kind.parameters(), dense.parameters(), strict=True))
        assert [name for name, _ in kind.named_parameters()] == [name for name, _ in dense.named_parameters()]
        assert all(parameter.requires_grad for parameter in kind.parameters())
        assert type(kind.qkv) is nn.Linear and type(kind.qkv.weight) is nn.Parameter


def test_saved_and_loaded(tmp_path):
    model, dense, _ = packed()
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", Attention())
    x = torch.randn(2, 9, 64)
    assert type(again.qkv) is LendingLinear and type(again.proj) is PackedLinear
    assert again.state_dict().keys() == model.state_dict().keys() >= {"qkv.weight.values"}
    assert torch.equal(again(x), model(x))
    unpack_(again)
    assert torch.equal(again.qkv.weight, dense.qkv.weight)


def test_together_with_our_attention_kernel():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

        def forward(self, x):
            return x + self.attn(x)

    model = prune(Outer(), 0.9)
    dense, x = copy.deepcopy(model), torch.randn(2, 9, 64)
    report = pack_(model, x, timer=timer(("bitmask", "attention/kernel")))
    assert report.attention[0].used and type(model.attn.qkv) is LendingLinear
    assert_same_function(model, dense, x)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Attention, Functional])
def test_compiled_as_one_graph(kind):
    model, _, _ = packed(kind)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_packed_model_is_not_analysed():
    model, *_ = packed(Functional)
    with pytest.raises(PackedModelError, match="fc1 is packed, and a packed weight cannot be analysed or pruned"):
        analyze(model)


def test_to_another_dtype_is_refused_by_the_kernels():
    model, *_ = packed()
    with pytest.raises(KernelUnavailable, match=r"x is torch\.float64; cast to torch\.float32"):
        model.to(torch.float64)(torch.randn(2, 9, 64, dtype=torch.float64))


def test_timm_beit_in_bfloat16():
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 7, "img_size": 64}
    model = prune(timm.create_model("beit_base_patch16_224", **options), 0.9)
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    pack_(model, x, timer=timer(), dtype=torch.bfloat16)
    assert type(model.blocks[0].attn.qkv) is LendingLinear
    with torch.no_grad():
        got, want = model(x), dense(x)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 0.05 * want.abs().max()
    unpack_(model)
    weight = dense.blocks[0].attn.qkv.weight
    assert torch.equal(model.blocks[0].attn.qkv.weight, weight.bfloat16().float())
