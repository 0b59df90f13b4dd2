"""||R psi||_inf and the norms of psi for each image, against a model whose weight simply is R."""

import pytest
import timm
import torch
import transformers
from torch import nn

from rmtkern.certificates.inputs import InputWatch, gains_of
from rmtkern.models import prunable_weights


def watch(model, x, removed=None, name=None):
    weights = prunable_weights(model, "all")
    weight = weights[0] if name is None else next(one for one in weights if one.name == name)
    removed = torch.randn(weight.shape, dtype=torch.float64) if removed is None else removed
    seen = InputWatch(weight, removed, len(x))
    with torch.no_grad(), seen:
        model(x)
    return seen, removed


def close(found, expected):
    torch.testing.assert_close(found, expected.detach().double(), rtol=1e-9, atol=1e-12)  # both sides in float64


def largest(y):
    return y.abs().flatten(1).amax(1)


def test_linear_with_tokens():
    x = torch.randn(5, 7, 6).double()
    seen, removed = watch(nn.Sequential(nn.Linear(6, 4)).double(), x)
    close(seen.change, largest(x @ removed.T))
    close(seen.sup, largest(x))
    close(seen.two, x.norm(dim=2).amax(1))


def test_conv1d_of_transformers():
    x = torch.randn(5, 7, 6).double()
    seen, removed = watch(nn.Sequential(transformers.pytorch_utils.Conv1D(4, 6)).double(), x)
    close(seen.change, largest(x @ removed.T))


def test_windows_belong_to_their_image_and_odd_counts_to_all():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(6, 3, 6).double()
    seen = InputWatch(prunable_weights(model, "all")[0], torch.ones(4, 6).double(), 2)
    with torch.no_grad(), seen:
        model(x)
    close(seen.sup, largest(x).reshape(2, 3).amax(1))
    seen = InputWatch(prunable_weights(model, "all")[0], torch.ones(4, 6).double(), 4)
    with torch.no_grad(), seen:
        model(x)
    close(seen.sup, x.abs().max().expand(4))


def test_a_weight_used_twice_counts_its_larger_use():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer).double()
    x = torch.randn(4, 6).double() / 10
    seen, removed = watch(model, x)
    both = [x, torch.tanh(layer(x))]
    close(seen.change, torch.stack([largest(one @ removed.T) for one in both]).amax(0))
    close(seen.sup, torch.stack([largest(one) for one in both]).amax(0))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": 3, "groups": 4},
    ],
)
def test_convolutions(options):
    model = nn.Sequential(nn.Conv2d(4, 8, **options)).double()
    x = torch.randn(5, 4, 12, 11).double()
    seen, removed = watch(model, x)
    only = nn.Conv2d(4, 8, bias=False, dtype=torch.float64, **options)
    only.weight.data = removed.reshape(only.weight.shape)
    close(seen.change, largest(only(x)))
    only.weight.data.fill_(1.0)
    ones = removed.shape[1]
    assert bool((seen.two >= seen.sup - 1e-12).all()) and bool((seen.two <= ones**0.5 * seen.sup + 1e-12).all())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["0.in_proj_weight", "0.out_proj.weight"])
def test_multi_head_attention(name, batch_first):
    class Attention(nn.ModuleList):
        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            return self[0](x, x, x)[0]

    model = Attention([nn.MultiheadAttention(8, 2, batch_first=batch_first)]).double().eval()
    x = torch.randn(5, 7, 8).double()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        seen, removed = watch(model, x, name=name)
        if name == "0.in_proj_weight":
            expected = largest(x @ removed.T)
        else:
            attention = model[0]
            attention.out_proj.weight.data = removed
            attention.out_proj.bias.data.zero_()
            y = model(x)
            expected = largest(y if batch_first else y.transpose(0, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    close(seen.change, expected)


def test_separate_projections_and_cross_attention():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True).double().eval()
    weights = {weight.name: weight for weight in prunable_weights(nn.ModuleList([attention]), "all")}
    inputs = [torch.randn(3, 5, size).double() for size in (8, 6, 4)]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name, x in zip("qkv", inputs, strict=True):
            removed = torch.randn(8, x.shape[2]).double()
            seen = InputWatch(weights[f"0.{name}_proj_weight"], removed, 3)
            with torch.no_grad(), seen:
                attention(*inputs)
            close(seen.change, largest(x @ removed.T))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_weight_that_no_product_uses_is_not_seen():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=32, num_heads=2).eval()
    weights = {weight.name: weight for weight in prunable_weights(model, "all")}
    other = prunable_weights(nn.Sequential(nn.Linear(4, 4)), "all")[0]
    seen = InputWatch(other, torch.ones(4, 4).double(), 2)
    with torch.no_grad(), seen:
        model(torch.randn(2, 3, 32, 32))
    assert seen.change is None and weights


def test_norms_of_r_bound_every_input():
    removed = torch.randn(5, 9).double()
    gains = gains_of(removed)
    assert gains.row_l1 == pytest.approx(float(torch.linalg.matrix_norm(removed, torch.inf)))
    assert gains.spectral == pytest.approx(float(torch.linalg.matrix_norm(removed, 2)))
    assert gains.row_l2 <= gains.spectral
    for psi in torch.randn(200, 9).double():
        change = float((removed @ psi).abs().max())
        for bound in (gains.row_l1 * psi.abs().max(), gains.row_l2 * psi.norm(), gains.spectral * psi.norm()):
            assert change <= float(bound) * (1 + 1e-12)
    worst = removed[removed.norm(dim=1).argmax()]
    assert float((removed @ worst).abs().max()) == pytest.approx(gains.row_l2 * float(worst.norm()))  # V2 is attained
