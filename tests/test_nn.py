import copy

import pytest
import torch
from torch import nn

from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import AbsorbedActivation, PackedLinear
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse

W, B = random_sparse(48, 64, 0.6), torch.randn(48)


def packed(**options):
    return PackedLinear(LAYOUTS["bitmask"].pack(W), B, "gelu", **options)


def test_forward_under_grad_and_without():
    module, x = packed(), torch.randn(2, 5, 64)
    with torch.no_grad():
        y = module(x)
    assert not y.requires_grad
    assert_as_accurate_as_dense(y, x, W, B, "gelu")
    under_grad = module(x)
    assert under_grad.requires_grad  # as with the nn.Linear that it replaces
    assert torch.equal(under_grad, y)
    with torch.inference_mode():
        assert torch.equal(module(x), y)


@pytest.mark.parametrize("x_grad", [False, True])
def test_backward_is_refused(x_grad):
    x = torch.randn(3, 64, requires_grad=x_grad)
    with pytest.raises(PackedModelError, match=r"has no backward pass; call rmtkern.unpack_"):
        packed()(x).sum().backward()
    assert x.grad is None


def test_backward_is_refused_in_the_middle_of_a_model():
    model = nn.Sequential(nn.Linear(64, 64), packed(), nn.Linear(48, 2)).eval()
    y = model(torch.randn(3, 64))
    with pytest.raises(PackedModelError, match=r"has no backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backward_is_refused_when_compiled(backend):
    torch._dynamo.reset()
    y = torch.compile(packed(), fullgraph=True, backend=backend)(torch.randn(3, 64))
    with pytest.raises(PackedModelError, match=r"has no backward pass"):
        y.sum().backward()


def test_a_frozen_linear_needs_no_grad():
    y = packed(requires_grad=(False, False))(torch.randn(3, 64))
    assert not y.requires_grad


def test_train_mode_is_refused():
    module = packed().train()
    with pytest.raises(PackedModelError, match=r"cannot train; call eval\(\), or call rmtkern.unpack_"):
        module(torch.randn(3, 64))
    module.eval()(torch.randn(3, 64))


def test_a_cast_model_says_what_to_do():
    with pytest.raises(KernelUnavailable, match=r"x is torch.float64; cast to torch.float32"):
        packed().to(torch.float64)(torch.randn(3, 64).double())


def test_state_dict_and_copies():
    module, x = packed(), torch.randn(3, 64)
    assert set(module.state_dict()) == {"bias", *(f"weight.{part}" for part in module.weight.parts)}
    assert list(module.parameters()) == []
    twin = copy.deepcopy(module)
    module.weight.values.zero_()
    assert_as_accurate_as_dense(twin(x).detach(), x, W, B, "gelu")
    with pytest.raises(AssertionError):
        assert_as_accurate_as_dense(module(x).detach(), x, W, B, "gelu")


def test_repr_names_what_matters():
    text = repr(packed())
    assert "in_features=64, out_features=48, bias=True, activation=gelu, layout=bitmask" in text


def test_the_nearest_measured_token_count_decides():
    forms = [LAYOUTS["dense"].pack(W, form=form) for form in range(3)]
    module = PackedLinear(forms[0], B, tokens=10, others={100: forms[1], 1000: forms[2]})
    for tokens, form in ((1, 0), (10, 0), (55, 0), (56, 1), (100, 1), (500, 1), (551, 2), (9999, 2)):
        assert module.form(tokens) is forms[form], tokens
    for tokens in (3, 90, 800):
        x = torch.randn(tokens, 64)
        assert_as_accurate_as_dense(module(x).detach(), x, W, B)
    assert set(module.state_dict()) == {"bias", "weight.dense", "others.0.dense", "others.1.dense"}
    torch._dynamo.reset()
    x = torch.randn(90, 64)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_unpack_restores_the_linear():
    for bias in (B, None):
        module = PackedLinear(LAYOUTS["bitmask"].pack(W), bias, requires_grad=(False, True))
        plain = module.unpack()
        assert type(plain) is nn.Linear and not plain.training
        assert torch.equal(plain.weight, W) and not plain.weight.requires_grad
        assert (plain.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(plain.bias, B) and plain.bias.requires_grad
    assert packed().train().unpack().training


def test_bad_arguments():
    weight = LAYOUTS["bitmask"].pack(W)
    with pytest.raises(TypeError, match=r"weight: expected a PackedWeight, got Tensor"):
        PackedLinear(W)
    with pytest.raises(ValueError, match=r"bias: expected \[48\], got \[3\]"):
        PackedLinear(weight, torch.ones(3))
    with pytest.raises(ValueError, match=r"unknown activation 'tanh'; valid: None, gelu"):
        PackedLinear(weight, activation="tanh")
    with pytest.raises(ValueError, match=r"others: expected shape \(48, 64\), got \(8, 64\)"):
        PackedLinear(weight, others={7: LAYOUTS["bitmask"].pack(torch.ones(8, 64))})


def test_an_absorbed_activation_is_an_identity():
    gelu, x = nn.GELU(), torch.randn(3)
    stand_in = AbsorbedActivation(gelu)
    assert stand_in(x) is x and stand_in.original is gelu
