"""cast_mask against the enumeration of its definition in NumPy float64, its prior's limits, and CAST on models."""

import copy
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning import cast
from rmtkern.pruning.cast import cast_mask
from rmtkern.pruning.pattern import parse_pattern, unit_of, whole_units
from rmtkern.pruning.plan import PRIORS, PruneConfig, PrunePlan
from rmtkern.pruning.presets import PRESETS
from tests.pruning.test_repair import layer
from tests.test_api import IMAGES, MODELS, state, unchanged, zeros

PATTERNS = ["2:4", "1:4", "3:4", "2:3", "4:8", "8:16", "10:16", "12:16", "2:4x3"]


def chosen(weight, moment, pattern, prior=None, alpha=0.5, start=None):
    start = torch.zeros(weight.shape, dtype=torch.bool) if start is None else start
    return cast_mask(weight, moment, start, torch.tensor([0]), *parse_pattern(pattern), prior=prior, alpha=alpha)


def reference(weight, moment, pattern, prior=None, alpha=0.5, start=None):
    """The definition: c(m) = rᵀ C r of r = (1 - m) u, plus alpha * mean(c) * |m - M|, for every m with n ones."""
    _, params = parse_pattern(pattern)
    n, m, r = params["n"], params["m"], unit_of(params)[0]
    kept = np.array([np.isin(range(m), one) for one in combinations(range(m), n)], dtype=float)
    found = np.zeros(weight.shape, dtype=bool)
    for i in range(0, len(weight), r):
        for g in range(0, weight.shape[1], m):
            c, u = moment[g : g + m, g : g + m].numpy(), weight[i : i + r, g : g + m].numpy()
            gone = (1 - kept)[:, None, :] * u
            costs = np.einsum("pra,ab,prb->p", gone, c, gone)
            total = costs.copy()
            if prior is not None:
                wanted = ~prior[i : i + r, g : g + m].numpy()
                total += alpha * max(costs.mean(), 1e-12) * np.abs(kept[:, None, :] - wanted).sum((1, 2))
            if start is not None:  # what is zero goes first
                before = start[i : i + r, g : g + m].numpy().all(0)
                kept_zeros = (kept * before).sum(1)
                total[kept_zeros > kept_zeros.min()] = np.inf
            found[i : i + r, g : g + m] = kept[total.argmin()] == 0
    return torch.from_numpy(found) if start is None else torch.from_numpy(found) | start


def small(pattern):
    _, params = parse_pattern(pattern)
    return layer(6, 4 * params["m"], seed=3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_choice_is_that_of_the_enumerated_definition(pattern):
    weight, _, moment = small(pattern)
    generator = torch.Generator().manual_seed(1)
    prior = torch.rand(weight.shape, generator=generator) < 0.4
    zero = torch.rand(weight.shape, generator=generator) < 0.2
    for case in (
        {},
        {"prior": prior},
        {"prior": prior, "alpha": 0.1},
        {"prior": prior, "start": zero},
        {"start": zero},
    ):
        values = weight.masked_fill(case["start"], 0) if "start" in case else weight
        assert torch.equal(chosen(values, moment, pattern, **case), reference(values, moment, pattern, **case)), case


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("floats", [1, 500])
def test_counts_are_exact_however_it_is_cut(monkeypatch, pattern, floats):
    weight, _, moment = small(pattern)
    whole = chosen(weight, moment, pattern)
    monkeypatch.setattr(cast, "_FLOATS", floats)
    assert torch.equal(chosen(weight, moment, pattern), whole)
    _, params = parse_pattern(pattern)
    groups = whole.reshape(6, -1, params["m"])
    assert groups.sum(2).eq(params["m"] - params["n"]).all()
    if "r" in params:
        assert whole_units(whole, unit_of(params)).sum() * params["r"] == whole.sum()


def test_groups_with_more_zeros_than_the_pattern_asks_keep_them():
    weight, _, moment = layer(4, 16)
    start = torch.zeros(4, 16, dtype=torch.bool)
    start[0, :3] = start[1, :4] = True
    for near in (None, ~start):  # a prior cannot bring zeros back
        mask = chosen(weight.masked_fill(start, 0), moment, "2:4", prior=near, alpha=1e3, start=start)
        assert mask[start].all()
        assert mask.reshape(4, 4, 4).sum(2).flatten().tolist() == [3, 2, 2, 2, 4, *[2] * 11]


def test_the_limits_of_the_prior():
    weight, _, moment = layer(8, 32)
    free = chosen(weight, moment, "4:8")
    other = chosen(weight.abs(), torch.eye(32, dtype=torch.float64), "4:8")
    assert not torch.equal(free, other)
    assert torch.equal(chosen(weight, moment, "4:8", other, 1e6), other)  # it has the pattern: nothing else is as close
    assert torch.equal(chosen(weight, moment, "4:8", other, 0.0), free)
    loose = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < 0.4
    near = chosen(weight, moment, "4:8", loose, 1e6).reshape(8, 4, 8)
    wanted = loose.reshape(8, 4, 8)
    assert torch.equal((near ^ wanted).sum(2), (wanted.sum(2) - 4).abs())  # as close as 4 of 8 allows
    cost = [loss(weight, moment, chosen(weight, moment, "4:8", loose, alpha), 8) for alpha in (0.0, 0.1, 0.5, 1e6)]
    assert cost == sorted(cost) and cost[0] < cost[-1]
    for alpha in (0.0, 0.5, 100.0):  # every pattern differs from a prior that keeps all in m - n entries
        assert torch.equal(chosen(weight, moment, "4:8", torch.zeros_like(free), alpha), free)
    dead = torch.zeros_like(moment)
    assert torch.equal(chosen(weight, dead, "4:8", other, 0.5), other)  # nothing costs anything


def loss(weight, moment, mask, m=None):
    """What goes costs: group by group, or all inputs together."""
    gone = torch.where(mask, weight, 0)
    if m is None:
        return float(((gone @ moment) * gone).sum())
    parts = range(0, weight.shape[1], m)
    return sum(loss(weight[:, at : at + m], moment[at : at + m, at : at + m], mask[:, at : at + m]) for at in parts)


def test_units_of_weight_and_input_do_not_matter():
    weight, _, moment = layer(8, 32)
    near = chosen(weight.abs(), torch.eye(32, dtype=torch.float64), "2:4")
    expected = chosen(weight, moment, "2:4", near)
    for factor in (1e-9, 1e9):
        assert torch.equal(chosen(factor * weight, moment, "2:4", near), expected)
        assert torch.equal(chosen(weight, factor * moment, "2:4", near), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    weight, _, moment = layer(16, 64)
    mask = chosen(weight.to(dtype), moment.float(), "4:8")
    assert mask.reshape(16, 8, 8).sum(2).eq(4).all()
    best = loss(weight.to(dtype).double(), moment, chosen(weight.to(dtype).double(), moment, "4:8"), 8)
    assert loss(weight.to(dtype).double(), moment, mask, 8) < (1 + 1e-5) * best


@pytest.mark.parametrize("pattern", ["4:8", "8:16", "12:16", "2:4x3"])
def test_descent_ends_where_no_swap_helps_and_close_to_the_best(monkeypatch, pattern):
    _, params = parse_pattern(pattern)
    m = params["m"]
    weight, _, moment = layer(48, 8 * m, tokens=2000)
    prior = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    best = chosen(weight, moment, pattern)
    monkeypatch.setattr(cast, "_ENUMERATED", 0)
    found = chosen(weight, moment, pattern)
    assert found.reshape(48, -1, m).sum(2).eq(m - params["n"]).all()
    diagonal = chosen(weight, torch.diag(moment.diagonal()), pattern)
    costs = [loss(weight, moment, mask, m) for mask in (best, found, diagonal)]
    assert costs[0] <= costs[1] < costs[2]
    assert costs[1] < 1.1 * costs[0]
    assert chosen(weight, moment, pattern, prior).reshape(48, -1, m).sum(2).eq(m - params["n"]).all()
    if pattern == "4:8":
        for i, g, a, b in np.ndindex(8, 8, 8, 8):
            group = slice(g * m, g * m + m)
            mask, c = found[i : i + 1, group], moment[group, group]
            if mask[0, a] and not mask[0, b]:
                other = mask.clone()
                other[0, a], other[0, b] = False, True
                assert loss(weight[i : i + 1, group], c, other) > (1 - 1e-9) * loss(weight[i : i + 1, group], c, mask)


def test_patterns_too_many_to_compare_are_descended():
    weight, _, moment = layer(8, 64, tokens=2000)
    mask = chosen(weight, moment, "16:32")
    assert mask.reshape(8, 2, 32).sum(2).eq(16).all()
    assert loss(weight, moment, mask, 32) < loss(
        weight, moment, chosen(weight, torch.diag(moment.diagonal()), "16:32"), 32
    )


def test_correlations_decide():
    """Two large weights whose inputs are one: they cancel, so both can go; a product of norms keeps them."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    outputs = {}
    for method in ("wanda", "cast"):
        model = nn.Sequential(nn.Linear(4, 1, bias=False))
        model[0].weight.data = torch.tensor([[1.0, -1.0, 0.5, 0.4]])
        before = model(x).detach()
        prune_(model, 0.5, method, "2:4", "all", calibration=x)
        outputs[method] = float((model(x).detach() - before).square().mean())
    assert outputs["cast"] < 1e-10 < 0.1 < outputs["wanda"]


def test_never_more_is_lost_in_the_groups_than_by_norms():
    for seed in range(5):
        weight, _, moment = layer(16, 64, seed=seed)
        for pattern in ("2:4", "8:16"):
            m = parse_pattern(pattern)[1]["m"]
            norms = chosen(weight, torch.diag(moment.diagonal()), pattern)
            ours = chosen(weight, moment, pattern)
            assert loss(weight, moment, ours, m) <= loss(weight, moment, norms, m)


def test_inputs_that_are_always_zero_go_first():
    x = torch.eye(8) * torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0])
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    prune_(model, 0.5, "cast", "2:4", "all", calibration=x)
    assert (model[0].weight[:, [2, 7]] == 0).all()


# -- whole models ------------------------------------------------------------------------------------------------------


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=32, num_heads=2).eval()


@pytest.mark.parametrize(
    "pattern, sparsity", [("2:4", 0.5), ("4:8", 0.5), ("8:16", 0.5), ("10:16", 0.375), ("2:4x4", 0.5)]
)
def test_a_vit_has_the_pattern_and_its_plan_makes_the_round_trip(pattern, sparsity):
    model = vit()
    before = state(model)
    plan = prune_(model, sparsity, "cast", pattern, calibration=IMAGES)
    plan.verify(model)
    assert (plan.config.budget, plan.config.score, plan.config.repair) == ("uniform", "cast", "none")
    assert plan.sparsity == sparsity and plan.calibration_images == len(IMAGES)
    m, gone = parse_pattern(pattern)[1]["m"], round(sparsity * parse_pattern(pattern)[1]["m"])
    for weight in prunable_weights(model):
        mask = weight.as_matrix() == 0
        assert mask.reshape(-1, m).sum(1).eq(gone).all()
        assert torch.equal(weight.parameter, before[weight.name].masked_fill(weight.to_parameter(mask), 0))
    again = PrunePlan.from_json(plan.to_json())
    assert again.config == plan.config and again.layers == plan.layers
    again.verify(model)


def test_survivors_can_be_refit():
    dense, x = vit(), torch.randn(16, 3, 32, 32)
    lost = {}
    for repair in ("none", "obs"):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, "cast", "2:4", calibration=x, repair=repair)
        plan.verify(model)
        with torch.no_grad():
            lost[repair] = float((model(x) - dense(x)).square().mean())
    assert lost["obs"] < lost["none"]


def test_without_repair_inputs_are_those_of_the_dense_model():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).double()
    x = torch.randn(300, 16, dtype=torch.float64)
    found = {}
    for repair in ("none", "obs"):
        model = copy.deepcopy(dense)
        prune_(model, 0.5, "cast", "2:4", "all", calibration=x, repair=repair).verify(model)
        found[repair] = model
    with torch.no_grad():
        for repair, prefix in (("none", dense), ("obs", found["obs"])):
            inputs = prefix[1](prefix[0](x))
            expected = reference(dense[2].weight.detach(), inputs.t() @ inputs / 300, "2:4")
            assert torch.equal(found[repair][2].weight == 0, expected), repair
    assert not torch.equal(found["none"][2].weight == 0, found["obs"][2].weight == 0)


def test_grouped_convolutions_and_other_models():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    prune_(model, 0.5, "cast", "2:4", "all", calibration=torch.randn(4, 8, 9, 9)).verify(model)
    for name in ("torchvision vit", "hf vit"):
        model = MODELS[name]()
        prune_(model, 0.5, "cast", "2:4", calibration=IMAGES).verify(model)


@pytest.mark.parametrize("prior", PRIORS)
def test_a_method_as_prior(prior):
    dense = vit()
    unstructured, near, free, hard = (copy.deepcopy(dense) for _ in range(4))
    prune_(unstructured, 0.5, prior, calibration=IMAGES if PRESETS[prior].score == "activation" else None)
    plan = prune_(near, 0.5, "cast", "2:4", calibration=IMAGES, prior=prior)
    assert (plan.config.prior, plan.config.alpha) == (prior, 0.5)
    assert PrunePlan.from_json(plan.to_json()).config == plan.config
    assert f"prior {prior} x 0.5" in str(plan)
    prune_(free, 0.5, "cast", "2:4", calibration=IMAGES, prior=prior, alpha=0.0)
    prune_(hard, 0.5, "cast", "2:4", calibration=IMAGES, prior=prior, alpha=1e4)
    differing = [distance(model, unstructured) for model in (free, near, hard)]
    assert differing[0] > differing[1] >= differing[2]
    for weight, wanted in zip(prunable_weights(hard), prunable_weights(unstructured), strict=True):
        mask, prior_mask = (one.as_matrix().reshape(-1, 4) == 0 for one in (weight, wanted))
        assert torch.equal((mask ^ prior_mask).sum(1), (prior_mask.sum(1) - 2).abs())


def distance(model, other):
    pairs = zip(prunable_weights(model), prunable_weights(other), strict=True)
    return sum(int(((one.parameter == 0) ^ (two.parameter == 0)).sum()) for one, two in pairs)


def test_tensors_as_prior_and_free_restoration():
    """The papers' way: a pruned and trained model, its zeros filled from the dense one, projected close to its mask."""
    dense = vit()
    sparse = copy.deepcopy(dense)
    prune_(sparse, 0.35, "magnitude")
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.01)  # stands for training
    prior = state(sparse)
    model = copy.deepcopy(sparse)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.where(parameter == 0, dense.get_parameter(name), parameter))
    filled = state(model)
    plan = prune_(model, 0.5, "cast", "2:4", calibration=IMAGES, prior=prior)
    assert plan.config.prior == "given" and PrunePlan.from_json(plan.to_json()).config == plan.config
    restored = 0
    for weight in prunable_weights(model):
        kept = weight.parameter != 0
        assert kept.reshape(-1, 4).sum(1).eq(2).all()
        assert torch.equal(weight.parameter[kept], filled[weight.name][kept])
        restored += int((kept & (prior[weight.name] == 0)).sum())
    assert restored > 0
    again = copy.deepcopy(sparse)
    again.load_state_dict(filled)
    config = PruneConfig(0.5, "cast", pattern="2:4", prior="given")
    assert prune_(again, config=config, calibration=IMAGES, prior=prior).layers == plan.layers


def test_a_method_as_prior_with_channels_that_change_places():
    model = vit()
    plan = prune_(model, 0.5, "cast", "2:4", calibration=IMAGES, prior="magnitude", permute=True)
    plan.verify(model)
    assert PrunePlan.from_json(plan.to_json()).config == plan.config and plan.config.permute


def test_zeros_stay_and_a_prior_of_fewer_zeros_than_the_model_has():
    model = vit()
    prune_(model, 0.6, "magnitude")
    before = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
    prune_(model, 0.5, "cast", "2:4", calibration=IMAGES, prior="magnitude").verify(model)
    for old, weight in zip(before, prunable_weights(model), strict=True):
        mask = weight.as_matrix() == 0
        assert mask[old].all()
        assert torch.equal(mask.reshape(-1, 4).sum(1), old.reshape(-1, 4).sum(1).clamp(min=2))


@pytest.mark.parametrize("options, error, message", [
    ({"pattern": "unstructured"}, ValueError, "score 'cast' compares whole n:m groups, got pattern 'unstructured'"),
    ({"pattern": "4x1"}, ValueError, "score 'cast' compares whole n:m groups, got pattern '4x1'"),
    ({"calibration": None}, ValueError, "method 'cast' with score 'cast' needs images; pass calibration="),
    ({"prior": "ser"}, ValueError, "unknown prior 'ser'; expected one of magnitude, uniform, row, random, seb"),
    ({"prior": "cast"}, ValueError, "unknown prior 'cast'; expected one of magnitude"),
    ({"prior": "given"}, TypeError, "prior: a config with prior='given' needs the tensors too"),
    ({"method": "wanda", "prior": "seb"}, ValueError, "prior 'seb': score 'activation' takes no prior"),
    ({"prior": 3}, TypeError, "prior: expected the name of a method or tensors by parameter name.*got int"),
    ({"prior": {"a": 3}}, TypeError, "prior: expected the name of a method or tensors by parameter name.*got dict"),
    ({"prior": {}}, ValueError, r"prior: expected a tensor of shape \(96, 32\) for blocks.0.attn.qkv.weight, got no"),
    ({"prior": {"blocks.0.attn.qkv.weight": torch.ones(2)}}, ValueError, r"got shape \(2,\)"),
    ({"prior": "dense"}, ValueError, "prior: the tensors have no zero in the selected weights"),
    ({"prior": {}, "permute": True}, ValueError, "permute: channels change places, and a prior that is given"),
    ({"alpha": -1.0}, ValueError, "alpha: expected a finite number >= 0, got -1.0"),
    ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number >= 0, got nan"),
    ({"alpha": "0.5"}, TypeError, "alpha: expected a number, got str"),
])  # fmt: skip
def test_bad_requests_change_nothing(options, error, message):
    model = vit()
    before = state(model)
    options = {"method": "cast", "pattern": "2:4", "calibration": IMAGES, **options}
    if options.get("prior") == "dense":
        options["prior"] = before
    with pytest.raises(error, match=message):
        prune_(model, 0.5, **options)
    assert unchanged(model, before) and zeros(model) == 0


def test_tensors_and_a_config_that_names_a_method():
    with pytest.raises(TypeError, match="prior: got tensors and a PruneConfig with prior='seb'; give it prior='given'"):
        config = PruneConfig(0.5, "cast", pattern="2:4", prior="seb")
        prune_(vit(), config=config, calibration=IMAGES, prior=state(vit()))


def test_the_mask_alone_refuses_other_patterns():
    weight, _, moment = layer()
    with pytest.raises(ValueError, match="score 'cast' compares whole n:m groups, got a pattern of kind 'rxc'"):
        chosen(weight, moment, "2x1")
