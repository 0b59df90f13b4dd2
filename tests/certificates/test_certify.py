"""certify on whole models: every number against its definition, no proof ever broken, nothing changed, all refusals."""

import copy
import json
import math

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rmtkern.api import prune_
from rmtkern.certificates import Certificate, certify
from rmtkern.errors import PackedModelError
from rmtkern.models import prunable_weights

F64 = torch.float64
SLACK = 1 - 1e-9  # float64 on both sides of every inequality
HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
      "patch_size": 16, "num_labels": 5}  # fmt: skip
MODELS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 24), nn.ReLU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(6 * 36, 5),
    ),
    "timm": lambda: timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=32, num_heads=2, num_classes=5
    ),
    "transformers": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=5),
}  # fmt: skip
X, Y = torch.randn(9, 3, 32, 32), torch.randint(0, 5, (9,))


def pair(name, sparsity=0.5, targets="all", seed=0):
    """(pruned, dense), with weights large enough to matter."""
    torch.manual_seed(seed)
    dense = MODELS[name]().eval()
    for parameter in dense.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pruned = copy.deepcopy(dense)
    prune_(pruned, sparsity, "magnitude", targets=targets)
    return pruned, dense


def logits(model, x):
    with torch.no_grad():
        out = copy.deepcopy(model).double()(x.double())
    return getattr(out, "logits", out)


def rows(certificate):
    return {bound.name: bound for bound in certificate.bounds}


@pytest.mark.parametrize("name", MODELS)
def test_what_was_measured_and_the_end_to_end_bounds(name):
    pruned, dense = pair(name)
    found = certify(pruned, dense, (X, Y), dtype=F64, batch_size=4)
    before, after = logits(dense, X), logits(pruned, X)
    eta = (after - before).abs().amax(1)
    m = found.measured
    assert found.images == 9 and found.classes == 5 and found.dtype == "float64"
    assert m.logit == pytest.approx(float(eta.mean())) and m.logit_max == pytest.approx(float(eta.max()))
    assert m.kept == pytest.approx(float((before.argmax(1) == after.argmax(1)).double().mean()))
    assert m.loss_change == pytest.approx(float(F.cross_entropy(after, Y) - F.cross_entropy(before, Y)))
    assert m.accuracy == pytest.approx(float((before.argmax(1) == Y).double().mean()))
    assert m.accuracy_pruned == pytest.approx(float((after.argmax(1) == Y).double().mean()))
    gap = before.topk(2).values.diff(dim=1).neg()[:, 0]
    osc = (after - before).amax(1) - (after - before).amin(1)
    assert rows(found)["end to end, osc"].certified == pytest.approx(float((gap > osc).double().mean()))
    assert rows(found)["end to end, 2 eta"].certified == pytest.approx(float((gap > 2 * eta).double().mean()))
    assert rows(found)["end to end, 2 eta"].loss == pytest.approx(2 * float(eta.mean()))


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_logit_changes_of_one_weight_after_another(name):
    pruned, dense = pair(name)
    found = certify(pruned, dense, X, dtype=F64, restore=True)
    state, goal = copy.deepcopy(dense), dict(pruned.named_parameters())
    assert {step.name for step in found.steps} == {weight.name for weight in prunable_weights(dense, "all")}
    previous, total = logits(dense, X), 0.0
    for step in found.steps:
        assert step.mask
        removed = (state.get_parameter(step.name) - goal[step.name]).detach().double()
        assert step.removed_l2 == pytest.approx(float(removed.norm()))
        assert step.removed_l1 == pytest.approx(float(removed.abs().sum()))
        state.get_parameter(step.name).data = goal[step.name].detach()
        now = logits(state, X)
        eta = float((now - previous).abs().amax(1).mean())
        assert step.logit == pytest.approx(eta, rel=1e-6)
        assert step.budget == pytest.approx(2 * eta, rel=1e-6)
        previous, total = now, total + eta
        restored = copy.deepcopy(pruned)
        restored.get_parameter(step.name).data = dense.get_parameter(step.name).detach()
        rest = float((logits(restored, X) - logits(dense, X)).abs().amax(1).mean())
        assert step.restoring_saves == pytest.approx(2 * (found.measured.logit - rest), abs=1e-9)
        assert step.restoring_helps == (step.restoring_saves > 0)
    assert rows(found)["stepwise, 2 eta"].logit == pytest.approx(total, rel=1e-6)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from(["mlp", "cnn", "timm", "torchvision"]), st.floats(0.05, 0.95))
def test_no_proof_is_broken_by_its_images(seed, name, sparsity):
    """T7: mean and every single image (slack_least), every kind of proof, any model, sparsity and seed."""
    pruned, dense = pair(name, sparsity, seed=seed)
    x, y = torch.randn(6, 3, 32, 32), torch.randint(0, 5, (6,))
    found = certify(pruned, dense, (x, y), dtype=F64, l2=1e-4, l1=1e-4)
    m = found.measured
    for bound in found.bounds:
        assert bound.holds.startswith("proof")
        assert bound.slack is None or bound.slack >= SLACK
        assert bound.slack_least is None or bound.slack_least >= SLACK
        assert bound.certified <= m.kept + 1e-12
        assert abs(m.accuracy_pruned - m.accuracy) <= bound.accuracy + 1e-12
        assert abs(m.loss_change) <= m.loss + 1e-12 <= bound.loss / SLACK + 2e-12
        assert found.objective_change <= bound.objective + 1e-9
    order = ["end to end, osc", "stepwise, osc", "stepwise, 2 eta"]
    certified = [rows(found)[one].certified for one in order]
    assert certified == sorted(certified, reverse=True)
    for step in found.steps:
        assert step.change <= min(step.v1, step.v2) / SLACK and step.v2 <= step.v3 / SLACK
        assert step.any_input is None or step.change <= step.any_input / SLACK
        if step.lipschitz is not None:
            assert step.logit <= step.a_priori / SLACK and step.a_priori <= step.a_priori_norms / SLACK


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_networks_without_attention_have_a_priori_bounds(name):
    pruned, dense = pair(name)
    found = certify(pruned, dense, X, dtype=F64)
    assert {"a priori, L ||R psi||", "a priori, L and norms of R"} <= set(rows(found))
    assert all(step.lipschitz is not None for step in found.steps)
    head = found.steps[-1]
    assert head.lipschitz == 1.0 and head.a_priori == pytest.approx(head.logit)  # exact at the last layer


class Normed(nn.Module):
    """A hidden layer, a norm, a head: pruning the head has a bound for every image whatsoever."""

    def __init__(self, affine=True):
        super().__init__()
        self.hidden, self.norm = nn.Linear(6, 12), nn.LayerNorm(12, elementwise_affine=affine)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.hidden(x))))


@pytest.mark.parametrize("affine", [True, False])
def test_no_input_at_all_breaks_a_bound_for_every_input(affine):
    """Random images, and images pushed uphill by gradients; the bound is also not far away."""
    torch.manual_seed(5)
    dense = Normed(affine).double()
    if affine:
        nn.init.normal_(dense.norm.weight)
        nn.init.normal_(dense.norm.bias)
    pruned = copy.deepcopy(dense)
    prune_(pruned, 0.6, targets="head")
    found = certify(pruned, dense, torch.randn(5, 6))
    (bound,) = [one for one in found.bounds if one.holds == "proof for every input"]
    assert found.steps[0].any_input == pytest.approx(bound.logit) and found.steps[0].lipschitz == 1.0
    x = (10 ** torch.linspace(-2, 2, 60)[:, None] * torch.randn(60, 6)).double().requires_grad_()
    climb = torch.optim.Adam([x], lr=0.1)
    for _ in range(150):
        moved = (dense(x) - pruned(x)).abs().amax(1)
        assert float(moved.detach().max()) <= bound.logit * (1 + 1e-12)
        climb.zero_grad()
        (-moved.sum()).backward()
        climb.step()
    assert bound.logit <= 3 * float(moved.detach().max())


def test_certified_labels_survive_in_every_intermediate_network():
    """The stepwise margin test speaks of the whole sequence, not of its end alone."""
    pruned, dense = pair("timm", 0.15, seed=3)
    dense.head.weight.data *= 8
    pruned.head.weight.data = dense.head.weight.data.clone()
    x = torch.randn(40, 3, 32, 32)
    found = certify(pruned, dense, x, dtype=F64)
    assert 0 < rows(found)["stepwise, osc"].certified < 1
    before, state, budget, change = logits(dense, x), copy.deepcopy(dense), 0.0, []
    previous = before
    for step in found.steps:
        state.get_parameter(step.name).data = pruned.get_parameter(step.name).detach()
        now = logits(state, x)
        budget = budget + (now - previous).amax(1) - (now - previous).amin(1)
        previous = now
        change.append(now.argmax(1) != before.argmax(1))
    gap = before.topk(2).values.diff(dim=1).neg()[:, 0]
    certified = gap > budget
    assert float(certified.double().mean()) == pytest.approx(rows(found)["stepwise, osc"].certified)
    assert not bool((torch.stack(change).any(0) & certified).any())


def test_the_local_estimate_is_the_gradients_row_sum():
    pruned, dense = pair("mlp")
    found = certify(pruned, dense, X, dtype=F64, local=True)
    net = copy.deepcopy(dense).double()
    hidden = net[:2](X.double()).detach()
    for i in range(len(X)):
        jacobian = torch.autograd.functional.jacobian(lambda h: net[2:](h[None])[0], hidden[i])
        expected = float(jacobian.abs().sum(1).max())
        removed = (dense[1].weight - pruned[1].weight).double()
        hidden[i, 0] = expected * float((removed.detach() @ X[i].double().flatten()).abs().max())
    step = next(one for one in found.steps if one.name == "1.weight")
    assert step.local == pytest.approx(float(hidden[:, 0].detach().mean()))
    last = found.steps[-1]
    assert last.local == pytest.approx(last.logit)
    assert rows(found)["local gradients"].holds == "estimate, no proof"


@pytest.mark.parametrize("name", MODELS)
def test_the_local_estimate_runs_everywhere_and_needs_no_gradients_of_ours(name):
    pruned, dense = pair(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    found = certify(pruned, dense, X, local=True)
    assert any(step.local is not None for step in found.steps)
    assert all(parameter.grad is None for model in (pruned, dense) for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_the_proxy_is_the_papers():
    pruned, dense = pair("mlp", targets=["0", "1", "3", "5"][1:])
    found = certify(pruned, dense, X, dtype=F64)
    sup = X.double().abs().flatten(1).amax(1).mean()
    removed = (dense[1].weight - pruned[1].weight).detach().double()
    assert found.steps[0].proxy == pytest.approx(float(torch.linalg.matrix_norm(removed, 2) * sup))
    assert found.proxy == pytest.approx(sum(step.proxy for step in found.steps))


def test_penalties_as_numbers_names_and_tensors():
    pruned, dense = pair("mlp", targets="3")
    a, b = dense[3].weight.detach().double(), pruned[3].weight.detach().double()
    weights = torch.rand_like(a)
    for l2, expected in (
        (0.5, 0.5 * (a.square().sum() - b.square().sum())),
        ({"3.weight": 0.5, "5.weight": 7.0}, 0.5 * (a.square().sum() - b.square().sum())),
        ({"3.weight": weights}, (weights * (a.square() - b.square())).sum()),
    ):
        found = certify(pruned, dense, (X, Y), l2=l2)
        assert found.steps[0].penalty == pytest.approx(float(expected))
        assert found.objective_change == pytest.approx(found.measured.loss_change - float(expected))
        assert rows(found)["end to end, osc"].objective == pytest.approx(
            rows(found)["end to end, osc"].loss - float(expected)
        )
    pruned[5].bias.data += 0.5  # the penalty is of all parameters, those that are no matrices too
    found = certify(pruned, dense, (X, Y), l2=0.5)
    more = 0.5 * (dense[5].bias.square().sum() - pruned[5].bias.square().sum())
    assert found.steps[-1].penalty == pytest.approx(float(more.detach()), rel=1e-5)
    pruned[5].bias.data -= 0.5
    decrease = certify(pruned, dense, (X, Y), l2=1e3, l1=1e3)
    assert all(bound.objective < 0 for bound in decrease.bounds)  # certified decrease: the penalty outweighs all
    assert rows(certify(pruned, dense, (X, Y)))["end to end, osc"].objective is None


def test_weights_that_change_and_do_not_vanish_are_no_mask():
    pruned, dense = pair("timm")
    pruned.blocks[0].mlp.fc1.weight.data *= 1.01
    pruned.blocks[0].mlp.fc1.bias.data += 0.1
    pruned.norm.weight.data *= 1.1
    found = certify(pruned, dense, (X, Y), dtype=F64, l2=1e-3)
    steps = {step.name: step for step in found.steps}
    assert not steps["blocks.0.mlp.fc1.weight"].mask and steps["blocks.0.mlp.fc2.weight"].mask
    assert found.steps[-1].name == "(other parameters)" and found.steps[-1].shape is None
    assert all(bound.slack_least >= SLACK for bound in found.bounds)
    after = logits(pruned, X)
    assert found.measured.loss_change == pytest.approx(
        float(F.cross_entropy(after, Y) - F.cross_entropy(logits(dense, X), Y))
    )


def test_batch_statistics_count_as_a_step():
    pruned, dense = pair("cnn", targets="5")
    pruned[1].running_mean += 0.3
    found = certify(pruned, dense, X, dtype=F64)
    assert [step.name for step in found.steps] == ["5.weight", "(other parameters)"]
    assert found.measured.logit == pytest.approx(float((logits(pruned, X) - logits(dense, X)).abs().amax(1).mean()))


def test_all_ways_to_give_images_agree():
    pruned, dense = pair("transformers")
    whole = certify(pruned, dense, (X, Y), dtype=F64).to_json()
    ways = [
        [(X[:5], Y[:5]), (X[5:], Y[5:])],
        iter([[X[:5], Y[:5]], [X[5:], Y[5:]]]),  # read once: a generator will do
        [{"pixel_values": X, "labels": Y}],
    ]
    for images in ways:
        found = json.loads(certify(pruned, dense, images, dtype=F64, batch_size=3).to_json())
        for one, other in zip(found["bounds"], json.loads(whole)["bounds"], strict=True):
            assert one == pytest.approx(other)
    assert certify(pruned, dense, X).measured.accuracy is None
    assert certify(pruned, dense, [X, X]).images == 18


def test_the_models_are_left_alone():
    pruned, dense = pair("cnn")
    pruned.train()
    keep = [{key: value.clone() for key, value in model.state_dict().items()} for model in (pruned, dense)]
    pointers = [parameter.data_ptr() for model in (pruned, dense) for parameter in model.parameters()]
    certify(pruned, dense, (X, Y), restore=True, local=True)
    for model, before in zip((pruned, dense), keep, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pointers == [parameter.data_ptr() for model in (pruned, dense) for parameter in model.parameters()]
    assert all(module.training for module in pruned.modules()) and not dense.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_state_dict_or_a_plan_will_do():
    pruned, dense = pair("timm")
    expected = certify(pruned, dense, (X, Y)).to_json()
    assert certify(pruned, dense.state_dict(), (X, Y)).to_json() == expected
    copied = copy.deepcopy(dense)
    plan = prune_(copied, 0.5, "magnitude", targets="all")
    assert certify(dense, plan, (X, Y)).to_json() == expected


def test_half_precision_in_its_own_dtype_and_mixed_with_help():
    pruned, dense = pair("timm")
    low = [copy.deepcopy(model).bfloat16() for model in (pruned, dense)]
    found = certify(*low, X)
    assert (
        found.dtype == "bfloat16" and rows(found)["stepwise, 2 eta"].slack_least >= SLACK
    )  # of the logits as computed
    with pytest.raises(
        ValueError, match=r"float32 in the dense model and torch.bfloat16 in the pruned one; pass dtype="
    ):
        certify(low[0], dense, X)
    assert certify(low[0], dense, X, dtype=F64).dtype == "float64"


def test_the_report_prints_and_says_what_is_proven():
    pruned, dense = pair("timm")
    found = certify(pruned, dense, (X, Y), restore=True, local=True, l1=1e-6)
    text = str(found)
    for words in ("proof for these images", "proof for every input", "estimate, no proof", "slack", "loss slack",
                  "1 of 10 weights have one", "restoring saves", "objective change", "blocks.1.mlp.fc2.weight",
                  "they say nothing about other images", "either side of the truth"):  # fmt: skip
        assert words in text, words
    data = json.loads(found.to_json(), parse_constant=lambda constant: pytest.fail(constant))
    assert data["images"] == 9 and len(data["steps"]) == 10 and data["bounds"][0]["slack"] == pytest.approx(1.0)
    assert data["steps"][0]["lipschitz"] is None
    assert isinstance(found, Certificate)
    with pytest.raises(AttributeError):
        found.images = 3


def test_dead_inputs_preserve_everything():
    """R psi = 0 on the images: a zero budget, so every label and the loss are certified."""
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    pruned = copy.deepcopy(dense)
    pruned[0].weight.data[:, 2:] = 0
    x = torch.randn(5, 6)
    x[:, 2:] = 0
    found = certify(pruned, dense, x)
    exact = [bound for bound in found.bounds if "norms" not in bound.name]  # norms do not see which inputs are dead
    assert len(exact) == 5
    assert all(bound.certified == 1 and bound.loss == 0 and bound.slack is None for bound in exact)


# -- refusals ----------------------------------------------------------------------------------------------------------


def tiny():
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    pruned = copy.deepcopy(dense)
    pruned[0].weight.data[:4] = 0
    return pruned, dense


x6, y3 = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (5, TypeError, "images: expected a tensor, a pair"),
        ("folder", TypeError, "expected a tensor, a pair .* got str"),
        ([5], TypeError, "images: expected batches that are tensors"),
        ([(x6, torch.rand(4))], TypeError, r"labels \[B\] of integers"),
        ([], ValueError, "images: expected at least one image, got none"),
        (x6[:0], ValueError, "images: expected at least one image, got none"),
        ((x6, y3[:2]), ValueError, "one label and one row of every input per image"),
        ([(x6, y3), x6], ValueError, "labels in every batch or in none"),
        ((x6, y3 + 1), ValueError, r"labels: expected 4 class numbers in 0..2, .* values 1..3"),
        ((x6, y3 - 1), ValueError, r"labels: expected 4 class numbers in 0..2, .* values -1..1"),
        (x6 * math.inf, ValueError, "NaN or Inf logits"),
        (x6[:, None, None], ValueError, r"expected the model to return logits \[B, classes\]"),
    ],
)
def test_refuses_bad_images(images, error, message):
    pruned, dense = tiny()
    with pytest.raises(error, match=message):
        certify(pruned, dense, images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": True}, ValueError, "batch_size: expected an integer"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected a floating-point"),
        ({"dtype": "float64"}, TypeError, "dtype: expected a floating-point"),
        ({"l2": -1.0}, ValueError, r"l2: expected finite numbers >= 0, got -1"),
        ({"l1": math.nan}, ValueError, "l1: expected finite numbers >= 0"),
        ({"l1": {"0.weight": -torch.ones(8, 6)}}, ValueError, "l1: expected finite numbers >= 0, got -1"),
        ({"l2": "much"}, TypeError, "l2: expected a number, .* got str"),
    ],
)
def test_refuses_bad_options(options, error, message):
    pruned, dense = tiny()
    with pytest.raises(error, match=message):
        certify(pruned, dense, x6, **options)


def test_refuses_models_that_do_not_belong_together():
    pruned, dense = tiny()
    with pytest.raises(ValueError, match="the two models have the same weights; pass the pruned model and the dense"):
        certify(dense, copy.deepcopy(dense), x6)
    with pytest.raises(ValueError, match=r"the dense weights do not fit the other model: 0.weight"):
        certify(pruned, nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), x6)
    with pytest.raises(ValueError, match=r"the dense weights do not fit .* missing or of another shape"):
        certify(pruned, {}, x6)
    with pytest.raises(TypeError, match="reference: expected the dense model, its state dict, or a PrunePlan"):
        certify(pruned, 3, x6)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        certify(3, dense, x6)


def test_refuses_a_model_of_one_class():
    pruned, dense = (nn.Sequential(model, nn.Linear(3, 1)) for model in tiny())
    dense[1].load_state_dict(pruned[1].state_dict())
    with pytest.raises(ValueError, match="logits of at least two classes, got 1"):
        certify(pruned, dense, x6)


def test_refuses_a_plan_that_cannot_be_repeated():
    _, dense = tiny()
    pruned = copy.deepcopy(dense)
    plan = prune_(pruned, 0.5, "wanda", calibration=x6, targets="all")
    with pytest.raises(ValueError, match="the plan used 4 calibration images, so it cannot be repeated"):
        certify(dense, plan, x6)
    plan = prune_(copy.deepcopy(dense), 0.5, "magnitude", targets="all")
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"the plan cannot be repeated on this model .* must be the dense one"):
        certify(other, plan, x6)
    prune_(pruned, 0.8, targets="all")
    with pytest.raises(ValueError, match="the plan cannot be repeated on this model"):
        certify(pruned, plan, x6)


@pytest.mark.parametrize("which", [0, 1])
def test_refuses_a_packed_model(which):
    models = tiny()
    models[which][0] = type("PackedLinear", (nn.Module,), {})()
    with pytest.raises(PackedModelError, match=r"0 is packed.*unpack_\(model\) first"):
        certify(*models, x6)
