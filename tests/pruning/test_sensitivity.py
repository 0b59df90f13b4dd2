"""What entries cost the model's outputs, against derivatives and least squares in float64; the budget made of it."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning import sensitivity
from rmtkern.pruning.calibrate import output_gradients
from rmtkern.pruning.pattern import parse_pattern, unit_of, whole_units
from rmtkern.pruning.presets import AUTO_NO_GRADIENTS
from rmtkern.pruning.sensitivity import Sensitivity, sensitivities
from tests.pruning.test_layerwise import PATTERNS
from tests.pruning.test_stages import waiting_threads
from tests.test_api import IMAGES, MODELS, state, unchanged


def energies(model, x):
    found = output_gradients(model, prunable_weights(model, "all"), x)
    assert found.images == len(x) and all(parameter.grad is None for parameter in model.parameters())
    return [one[0].numpy() for one in found.features.values()]


def same(found, expected):
    """Models of one output: a random sign leaves its squared derivatives as they are. Float64: sums in other orders."""
    for one, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, value.detach(), rtol=1e-9, atol=1e-15)


def test_energies_of_linears_frozen_ones_too_and_of_outputs_that_are_overwritten():
    x = torch.randn(11, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)).double()
    for trainable in (True, False):
        model.requires_grad_(trainable)
        with torch.no_grad():
            expected = ((model[0](x) > 0) * model[2].weight.square()).mean(0)
        same(energies(model, x), [expected, torch.ones(1)])


def test_energies_of_convolutions_and_addmm_are_sums_over_places():
    x = torch.randn(9, 3, 5, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)).double()
    with torch.no_grad():
        steep = (1 - model[1](model[0](x)).square()) * model[3].weight.reshape(4, 3, 3)
    same(energies(model, x), [steep.square().sum((2, 3)).mean(0), torch.ones(1)])
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(8, 6), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        steep = (1 - model[1](model[0](x)).square()) * model[2].weight
    same(energies(model, x), [steep.square().mean(0), torch.ones(1)])


@pytest.mark.parametrize("options", [{}, {"bias": False, "kdim": 4}])
def test_energies_of_attention_that_functions_hide(options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
            self.end = nn.Linear(8, 1)

        def forward(self, x):
            return self.end(self.attn(x, x[..., : self.attn.kdim], x)[0])[:, 0]

    model, x = Model().double().eval(), torch.randn(7, 5, 8, dtype=torch.float64)
    attn, biases = model.attn, torch.zeros(3, 8, dtype=torch.float64)
    matrices = [attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight]
    if attn.in_proj_weight is not None:
        matrices, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (
        nn.functional.linear(one, matrix, bias)
        for one, matrix, bias in zip((x, x[..., : attn.kdim], x), matrices, biases, strict=True)
    )
    heads = [one.reshape(7, 5, 2, 4).transpose(1, 2) for one in (q, k, v)]
    mixed = (heads[0] @ heads[1].transpose(2, 3) / 2).softmax(-1) @ heads[2]
    out = attn.out_proj(mixed.transpose(1, 2).reshape(7, 5, 8))
    parts = torch.autograd.grad(model.end(out)[:, 0].sum(), [q, k, v, out])
    *projections, last = [part.square().sum((0, 1)) / 7 for part in parts]
    if attn.in_proj_weight is not None:
        projections = [torch.cat(projections)]
    assert torch.allclose(model(x), model.end(out)[:, 0])
    same(energies(model, x), [*projections, last, torch.ones(1)])


def test_random_signs_give_the_frobenius_norm_of_the_jacobian():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 200)), torch.randn(64, 3)
    expected = model[1].weight.detach().square().sum(0)
    # 64 draws of a quadratic form of relative deviation about sqrt 2 each: 5 deviations are 0.9
    np.testing.assert_allclose(energies(model, x)[0], expected, rtol=0.9)
    model = nn.ModuleDict({"a": nn.Linear(3, 1)})
    model.forward = lambda x: {"y": (model["a"](x), None), "n": 3}
    assert energies(model, x)[0] == pytest.approx(1)


def test_one_entry_costs_what_the_best_of_the_others_leaves():
    x = torch.randn(300, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    (found,) = sensitivities(model, prunable_weights(model, "all"), [x]).values()  # one batch, all of which counts
    moment = (x.t() @ x / 300).numpy()
    moment += 0.01 * np.diag(moment).mean() * np.eye(6)
    matrix = model[0].weight.detach()
    costs = found.of(matrix)
    for n, k in ((0, 0), (3, 4)):
        others = [j for j in range(6) if j != k]
        change = -matrix.numpy()[n]
        change[others] = np.linalg.solve(moment[np.ix_(others, others)], moment[others, k] * matrix.numpy()[n, k])
        np.testing.assert_allclose(costs[n, k], change @ moment @ change * found.rows[n], rtol=1e-5)  # float32
    two = Sensitivity(torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    assert two.of(torch.ones(2, 2)).tolist() == [[1, 2], [12, 15]]
    expected = torch.tensor([[0.5, 0.5], [1.5, 1.5]])
    assert torch.allclose(two.weighted(torch.ones(2, 2)).square(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_exact_counts_for_every_pattern_on_real_models(name):
    dense = MODELS[name]().train()
    for pattern, sparsity in PATTERNS:
        model = copy.deepcopy(dense)
        plan = prune_(model, sparsity, "sensitivity", pattern, calibration=IMAGES)
        unit = unit_of(parse_pattern(pattern)[1])
        units = [whole_units(weight.as_matrix() == 0, unit) for weight in prunable_weights(model)]
        assert sum(int(one.sum()) for one in units) == round(sparsity * sum(one.numel() for one in units)) or (
            ":" in pattern and plan.sparsity == sparsity
        )
        plan.verify(model)
        assert model.training and waiting_threads() == 0
        assert max(layer.sparsity for layer in plan.layers) <= 1 - 0.5 * (1 - sparsity) + 0.01  # whole mini-blocks


class Branches(nn.Module):
    """Two layers of which the second counts a tenth, and rows 0 and 1 of the first nothing."""

    def __init__(self):
        super().__init__()
        self.strong, self.weak, self.end = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 4)
        self.end.weight.data[:, :2] = 0

    def forward(self, x):
        return self.end(self.strong(x) + 0.1 * self.weak(x))


def test_what_the_outputs_do_not_need_goes_first_and_the_outputs_lose_less():
    torch.manual_seed(0)
    dense, x = Branches().eval(), torch.randn(256, 16)
    lost = {}
    for method in ("admm", "sensitivity"):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, method, targets="all", ignore="end", calibration=x)
        lost[method] = float((model(x) - dense(x)).detach().square().mean())
    assert lost["sensitivity"] < 0.7 * lost["admm"]
    assert plan.layers[1].sparsity > 0.6 and plan.layers[0].sparsity < 0.4
    gone = (model.strong.weight == 0).float().mean(1)
    assert gone[:2].min() > gone[2:].max()
    # other scores take the same counts and choose by themselves
    other = copy.deepcopy(dense)
    again = prune_(other, 0.5, "wanda", budget="sensitivity", targets="all", ignore="end", calibration=x)
    assert [layer.zeros for layer in again.layers] == [layer.zeros for layer in plan.layers]


def test_zeros_stay_and_all_ways_to_pass_images_give_the_same():
    model = MODELS["timm vit"]().eval()
    prune_(model, 0.3, "magnitude")
    before = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
    plans = []
    for images in (IMAGES, [IMAGES], iter([{"x": IMAGES}])):
        one = copy.deepcopy(model)
        plans.append(prune_(one, 0.6, "sensitivity", calibration=images))
        after = [weight.as_matrix() == 0 for weight in prunable_weights(one)]
        assert all(bool((new | ~old).all()) for old, new in zip(before, after, strict=True))
    assert len({plan.layers[0].mask_hash for plan in plans}) == 1
    assert plans[0].sparsity == pytest.approx(0.6, abs=1e-4)


def test_auto_takes_what_needs_no_gradients_where_there_are_none_and_says_so(caplog):
    model = nn.Sequential(nn.Linear(8, 8), NoGrad(), nn.Linear(8, 8))
    plan = prune_(model, 0.5, targets="all", calibration=torch.randn(64, 8))
    assert plan.config.method == "sensitivity" and not caplog.text
    model.append(NoGrad())
    plan = prune_(model, 0.75, targets="all", calibration=torch.randn(64, 8))
    assert plan.config.method == AUTO_NO_GRADIENTS == "admm" and plan.config.budget == "uniform"
    assert "got none (does it run under no_grad?)" in caplog.text and "pruning by method 'admm' instead" in caplog.text
    with pytest.raises(ValueError, match="expected a model whose outputs have gradients, got none"):
        prune_(model, 0.8, budget="sensitivity", targets="all", calibration=torch.randn(64, 8))
    plan.verify(model)


class NoGrad(nn.Module):
    """Nothing behind it has a gradient."""

    def forward(self, x):
        return x.detach()


class NoBackward(torch.autograd.Function):
    """The mean of x, which needs a gradient and cannot give one."""

    @staticmethod
    def forward(ctx, x):
        return x.mean()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no way back")


def test_bad_input_changes_nothing(monkeypatch):
    model = MODELS["timm vit"]()
    before = state(model)
    with pytest.raises(ValueError, match=r"method 'seb' with budget 'sensitivity' needs images; pass calibration="):
        prune_(model, 0.5, "seb", budget="sensitivity")
    forward = model.forward
    model.forward = torch.no_grad()(forward)
    with pytest.raises(ValueError, match="expected a model whose outputs have gradients, got none"):
        prune_(model, 0.5, "sensitivity", calibration=IMAGES)
    model.forward = lambda x: NoBackward.apply(forward(x))
    with pytest.raises(ValueError, match=r"the model cannot run backward \(.*no way back"):
        prune_(model, 0.5, "sensitivity", calibration=IMAGES)
    model.forward = lambda x: forward(x) * torch.inf
    with pytest.raises(ValueError, match=r"the gradients at blocks.0.attn.qkv.weight have NaN or Inf"):
        prune_(model, 0.5, "sensitivity", calibration=IMAGES)
    del model.forward
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="second moments are singular; pass more"):
        patched.setattr(sensitivity, "damped", torch.zeros_like)
        prune_(model, 0.5, "sensitivity", calibration=IMAGES)
    model.forward = lambda x: x.mean() + 0 * model.head.weight.sum()
    with pytest.raises(ValueError, match=r"no image reached blocks.0.attn.qkv.weight; add it to ignore="):
        prune_(model, 0.5, "sensitivity", calibration=IMAGES)
    del model.forward
    assert unchanged(model, before) and waiting_threads() == 0


def test_no_more_images_are_read_than_the_widest_weight_looks_at():
    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                self.read = getattr(self, "read", 0) + 1
                yield batch

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    images = Loader(torch.randn(8, 20, 6, dtype=torch.float64))  # of the 160 inputs, 8 for each of 6 entries are 48
    weights = prunable_weights(model, "all")
    gradients = output_gradients(model, weights, images)
    assert gradients.inputs == {"0.weight": 140, "2.weight": 140}  # 128 images, by whole batches
    images.read = 0
    found = sensitivities(model, weights, images)
    assert images.read == 7 + 3
    for name, one in sensitivities(model, weights, list(images)[:3]).items():
        assert torch.equal(found[name].columns, one.columns)
