"""A Lipschitz bound is never below a measured slope, and what is not understood has none."""

import math

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F

from rmtkern.certificates.lipschitz import trace
from rmtkern.models import prunable_weights

F64 = {"dtype": torch.float64}


def paths(model, x):
    weights = {weight.name: weight.parameter for weight in prunable_weights(model, "all")}

    def run():
        out = model(x)
        return getattr(out, "logits", out)

    return trace(weights, [x], run)


class After(nn.Module):
    """A watched weight, then a function of its output (and of the image)."""

    def __init__(self, function, width=8):
        super().__init__()
        self.function = function
        self.first = nn.Linear(width, width, **F64)

    def forward(self, x):
        return self.function(self.first(x), x)


CONV = nn.Conv2d(2, 3, 2, padding=1, groups=1, **F64).requires_grad_(False)
LINEAR = nn.Linear(8, 5, **F64).requires_grad_(False)
NORM = nn.BatchNorm1d(8, **F64).eval().requires_grad_(False)
NORM.running_var.uniform_(0.3, 3.0)
NORM.weight.data.uniform_(-2, 2)
FOLLOWED = {
    "linear": lambda h, x: LINEAR(h),
    "addmm": lambda h, x: torch.addmm(torch.ones(5, **F64), h, LINEAR.weight.T * 1.0),
    "convolution": lambda h, x: CONV(h.reshape(-1, 2, 2, 2)).flatten(1),
    "relu": lambda h, x: F.relu(h),
    "relu in place": lambda h, x: F.relu(h, inplace=True),
    "leaky": lambda h, x: F.leaky_relu(h, 3.0),
    "elu": lambda h, x: F.elu(h, alpha=2.5),
    "gelu": lambda h, x: F.gelu(3 * h),
    "gelu tanh": lambda h, x: F.gelu(3 * h, approximate="tanh"),
    "silu": lambda h, x: F.silu(4 * h),
    "mish": lambda h, x: F.mish(4 * h),
    "hardswish": lambda h, x: F.hardswish(3 * h),
    "tanh": lambda h, x: torch.tanh(h),
    "sigmoid": lambda h, x: torch.sigmoid(h),
    "softplus": lambda h, x: F.softplus(h),
    "scale": lambda h, x: 2.5 * h / 0.5 - h * torch.linspace(-1, 1, 8, **F64),
    "residual": lambda h, x: x + h + F.relu(h),
    "in-place residual": lambda h, x: LINEAR(h).__iadd__(F.relu(LINEAR(h))),
    "alpha": lambda h, x: torch.add(h, h, alpha=-3),
    "sum": lambda h, x: h.reshape(-1, 4, 2).sum(1),
    "mean": lambda h, x: h.reshape(-1, 4, 2).mean(1),
    "slices": lambda h, x: torch.cat([h[:, 3:], -h[:, :3], h.chunk(2, 1)[0]], 1),
    "pool": lambda h, x: F.max_pool2d(h.reshape(-1, 2, 2, 2), 2).flatten(1),
    "average": lambda h, x: F.avg_pool2d(h.reshape(-1, 2, 2, 2), 2, padding=1).flatten(1),
    "batch norm": lambda h, x: NORM(h),
    "dropout": lambda h, x: F.dropout(h, 0.5, training=False),
    "clamp": lambda h, x: h.clamp(-0.1, 0.2),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_no_direction_is_steeper_than_the_bound(name):
    function = FOLLOWED[name]
    model = After(function)
    found = paths(model, torch.randn(1, 8, **F64))["first.weight"].lipschitz
    assert math.isfinite(found)
    x = torch.randn(1, 8, **F64)
    steepest = 0.0
    for _ in range(40):
        h = 2 * torch.randn(1, 8, **F64)
        slope = torch.autograd.functional.jacobian(lambda h: function(h.clone(), x), h).flatten(-2)
        steepest = max(steepest, float(slope.abs().sum(-1).max()))
    assert steepest <= found * (1 + 1e-9)
    assert found <= 5 * steepest + 1e-9  # no wild excess in one operation either


UNKNOWN = {
    "softmax": lambda h, x: F.softmax(h, -1),
    "layer norm": lambda h, x: F.layer_norm(h, (8,)),
    "product with itself": lambda h, x: h * h,
    "gate from the image": lambda h, x: h * torch.sigmoid(x),
    "matrix from the image": lambda h, x: F.linear(h, x.expand(8, 8)),
    "attention": lambda h, x: h @ (h.T @ h),
    "division by it": lambda h, x: 1 / (2 + h.abs()),
    "written into another": lambda h, x: torch.zeros(1, 8, **F64).index_copy_(1, torch.arange(8), h),
    "setitem": lambda h, x: _setitem(h),
    "decides by value": lambda h, x: h if float(h.sum()) > 1e9 else h + 0,
    "in place on shared memory": lambda h, x: _shared(h),
    "training dropout": lambda h, x: F.dropout(h, 0.5, training=True),
    "lower precision": lambda h, x: h.to(torch.float32),
    "where": lambda h, x: torch.where(h > 0, h, 100.0),
    "factor that hides the image": lambda h, x: h * torch.zeros(1, 8, **F64).copy_(x),
    "image decides": lambda h, x: h if float(x.sum()) > 1e9 else h + 0,
    "divisor": lambda h, x: F.avg_pool2d(h.reshape(1, 2, 2, 2), 2, divisor_override=1).flatten(1),
}


def _setitem(h):
    out = torch.zeros(1, 8, **F64)
    out[:, :] = 7 * h
    return h + out


def _shared(h):
    view = h.view(2, 4)
    h.add_(h)
    return view.reshape(1, 8)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_has_no_bound(name):
    assert paths(After(UNKNOWN[name]), torch.randn(1, 8, **F64))["first.weight"].lipschitz == math.inf


def test_a_weight_used_twice_has_no_bound():
    model = nn.Sequential(nn.Linear(8, 8, **F64), nn.ReLU())
    model.append(model[0])
    path = paths(model, torch.randn(1, 8, **F64))["0.weight"]
    assert path.calls == 2 and path.lipschitz == math.inf


def test_a_weight_used_in_parts_has_no_bound():
    model = After(lambda h, x: F.linear(x, model.first.weight[:4]))
    assert paths(model, torch.randn(1, 8, **F64))["first.weight"].lipschitz == math.inf


def test_mlp_by_hand():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)
    ).double()
    found = paths(model, torch.randn(1, 2, 3, **F64))
    last = float(model[5].weight.detach().abs().sum(1).max())
    middle = float(model[3].weight.detach().abs().sum(1).max())
    assert [path.lipschitz for path in found.values()] == pytest.approx([middle * 1.1291 * last, last * 1.1291, 1.0])


def test_a_resnet_has_a_bound_everywhere():
    found = paths(torchvision.models.resnet18(num_classes=4).eval(), torch.randn(1, 3, 32, 32))
    assert len(found) == 21 and all(math.isfinite(path.lipschitz) for path in found.values())
    assert found["fc.weight"].lipschitz == 1.0


HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
      "patch_size": 16}  # fmt: skip
VITS = {
    "timm": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=32, num_heads=2),
        {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "head.weight"},
    ),
    "transformers": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)),
        {f"vit.layers.0.attention.{name}_proj.weight" for name in "qkv"}
        | {"vit.layers.0.mlp.fc1.weight", "classifier.weight"},
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=10),
        {"encoder.layers.encoder_layer_0.mlp.0.weight", "heads.head.weight"},
    ),
}


@pytest.mark.parametrize("library", VITS)
def test_in_a_transformer_only_the_head_has_a_bound_and_norms_are_found(library):
    make, fed = VITS[library]
    found = paths(make().eval(), torch.randn(1, 3, 32, 32))
    assert {name for name, path in found.items() if path.norm is not None} == fed
    head = next(name for name in found if name.endswith(("head.weight", "classifier.weight")))
    assert found[head].lipschitz == 1.0
    blocks = [path for name, path in found.items() if ".mlp." in name]
    assert blocks and all(path.lipschitz in (math.inf, 0.0) for path in blocks)  # 0: a head of zeros hides it all


def _zeroed(y):
    y[:, :, 0] = 9.0
    return y


def _doubled(y):
    y.view(-1).mul_(2)
    return y


NORMED = {
    "rows": (lambda y: y[:, 0], True),
    "dropout": (lambda y: F.dropout(y, 0.5, training=False), True),
    "mean over tokens": (lambda y: y.mean(1), True),
    "columns": (lambda y: y.transpose(1, 2)[:, :8, 0], False),
    "scaled": (lambda y: 2 * y, False),
    "mixed": (lambda y: y[:, :, torch.randperm(8)], False),
    "written into": (lambda y: _zeroed(y), False),
    "changed through a view": (lambda y: _doubled(y), False),
    "flattened": (lambda y: y.flatten(1)[:, 3:11], False),
}


@pytest.mark.parametrize("name", NORMED)
def test_whether_a_layer_norm_still_feeds_the_weight(name):
    between, fed = NORMED[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(between(self.norm(x)))

    assert (paths(Model().eval(), torch.randn(1, 16, 8))["fc.weight"].norm is not None) == fed
