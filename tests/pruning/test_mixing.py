"""Which pattern each layer gets: against brute force, by injected times, on whole models; exact and repeatable."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rmtkern import api
from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning.mixing import cheapest_steps, choose_patterns, losses_of
from rmtkern.pruning.pattern import coarsest, divides, parse_pattern, pattern_name, unit_of, whole_units
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.pruning.sensitivity import Sensitivity
from rmtkern.pruning.times import LayerTimes, PatternTimes
from rmtkern.speed import prune_to_speed_
from tests.test_api import IMAGES, MODELS, Injected, state, unchanged

MIX = ("unstructured", "1x2", "4x2")
RATES = {"unstructured": 1.15, "1x2": 1.0, "4x2": 0.85, "2:4": 1.0}


def times_of(model, targets=None, *, slow=(), sparsities=(0.3, 0.5, 0.7, 0.9)):
    """A layer takes 1 ms for 1000 entries; patterns a rate times what is left, n:m only at its sparsity."""
    layers = []
    for weight in prunable_weights(model, targets):
        dense = weight.parameter.numel() / 1000
        ms = {
            pattern: {share: dense * rate * (1 - share) * (5 if weight.name in slow else 1)
                      for share in ((0.5,) if ":" in pattern else sparsities)}
            for pattern, rate in RATES.items() if divides(pattern, weight.shape)
        }  # fmt: skip
        layers.append(LayerTimes((weight.name,), weight.shape, dense, ms))
    return PatternTimes(tuple(layers), "float32", 1, "a CPU")


points = st.tuples(st.integers(1, 40), st.integers(0, 60))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(points, min_size=0, max_size=4), min_size=1, max_size=4), st.integers(20, 40))
def test_no_choice_that_is_as_fast_loses_less(forms, dense):
    """After every step, against all choices."""
    forms = [[(float(dense), 0.0), *((float(ms), float(loss)) for ms, loss in layer)] for layer in forms]
    at, rising = [0] * len(forms), 0.0
    every = [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*forms)]
    for layer, form in cheapest_steps(forms):
        before, after = forms[layer][at[layer]], forms[layer][form]
        assert after[0] < before[0]
        rate = (after[1] - before[1]) / (before[0] - after[0])
        assert rate >= rising - 1e-9
        rising, at[layer] = rate, form
        ms, loss = map(sum, zip(*(layer[i] for layer, i in zip(forms, at, strict=True)), strict=True))
        assert loss <= min(other for taken, other in every if taken <= ms)
    assert ms_of(forms, at) == sum(min(ms for ms, _ in layer) for layer in forms)  # the steps end at the fastest


def ms_of(forms, at):
    return sum(layer[i][0] for layer, i in zip(forms, at, strict=True))


@pytest.mark.parametrize("pattern", ["unstructured", "1x2", "4x2", "2:4", "2:4x2", "1:4"])
def test_losses_are_sums_of_the_cheapest_units(pattern):
    cost = np.random.default_rng(0).random((8, 12))
    params = parse_pattern(pattern)[1]
    r, c = unit_of(params)
    found = losses_of(torch.tensor(cost), pattern)
    sums = cost.reshape(8 // r, r, 12 // c, c).sum((1, 3))
    if "n" in params:
        groups = np.sort(sums.reshape(len(sums), -1, params["m"]), axis=2)
        np.testing.assert_allclose(found, [groups[:, :, : params["m"] - params["n"]].sum()], rtol=1e-12)
    else:
        np.testing.assert_allclose(found[1:], np.cumsum(np.sort(sums.flatten())), rtol=1e-12)
        assert found[0] == 0 and len(found) == sums.size + 1


def test_a_layer_gets_the_coarsest_pattern_that_its_weights_lie_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False))
    blocks = (torch.rand(16, 16) < 0.5).repeat_interleave(4, 0).repeat_interleave(2, 1)
    model[0].weight.data[blocks] *= 1e-3
    pairs = (torch.rand(32, 32) < 0.5).repeat_interleave(2, 1)
    model[1].weight.data[pairs] *= 1e-3
    weights, times = prunable_weights(model, "all"), times_of(model, "all")
    costs = {one.name: Sensitivity(torch.ones(one.shape[0]), torch.ones(1, one.shape[1])) for one in weights}
    chosen = choose_patterns(weights, costs, MIX, times, speedup=1.55)
    assert [one.pattern for one in chosen.values()][:2] == ["4x2", "1x2"]
    assert chosen["2.weight"].zeros < 0.4 * 32 * 32  # which has no small entries
    for one in chosen.values():
        assert one.dense_ms == times.of(next(name for name, c in chosen.items() if c is one)).dense_ms
    # no plain pattern at one sparsity, and no sparsities of it by equal loss, is as fast and loses less
    ms, loss = sum(one.ms for one in chosen.values()), sum(one.loss for one in chosen.values())
    assert ms <= times.total_ms() / 1.55
    for pattern in MIX:
        for share in np.arange(20, 58) / 64:
            plain = [losses_of(costs[w.name].of(w.as_matrix()), pattern) for w in weights]
            if times.total_ms(pattern, share) <= ms:
                assert sum(one[round(share * (len(one) - 1))] for one in plain) >= loss


@pytest.mark.parametrize("name", ["timm vit", "hf vit", "timm swin", "torchvision vit"])
@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"linear_speedup": 1.5}])
def test_whole_models(name, goal):
    torch.manual_seed(0)
    dense = MODELS[name]().eval()
    times, plans = times_of(dense), []
    for _ in range(2):
        model = copy.deepcopy(dense)
        plans.append(prune_(model, pattern=list(MIX), calibration=IMAGES, timings=times, **goal))
    plan = plans[0]
    assert plan.to_json() == plans[1].to_json() and len(plan.layers) == len(prunable_weights(model))
    again = PrunePlan.from_json(plan.to_json())
    assert again.config == plan.config and again.layers == plan.layers and plan.config.pattern == MIX
    plan.verify(model)
    least = 1 - 0.5 * (1 - plan.sparsity) + 1e-9
    for layer, weight in zip(plan.layers, prunable_weights(model), strict=True):
        unit = unit_of(layer.params)
        zero = weight.as_matrix() == 0
        assert int(whole_units(zero, unit).sum()) * unit[0] * unit[1] == layer.zeros <= least * layer.total
        assert layer.ms <= layer.dense_ms == times.of(layer.name).dense_ms
        if layer.ms < layer.dense_ms and 0.3 <= layer.sparsity <= 0.9:
            assert layer.ms == pytest.approx(times.of(layer.name).at(layer.pattern, layer.sparsity))
    if "sparsity" in goal:
        assert 0 <= plan.selected.zeros - 0.5 * plan.selected.total <= 8
    else:
        assert plan.linear_speedup == pytest.approx(
            sum(x.dense_ms for x in plan.layers) / sum(x.ms for x in plan.layers)
        )
        assert 1.5 <= plan.linear_speedup < 1.7 and plan.config.sparsity == plan.sparsity
    assert "x as fast as dense by the times given" in str(plan) and "pattern unstructured or 1x2 or 4x2" in str(plan)


def test_what_gains_nothing_stays_dense_and_zeros_stay():
    model = MODELS["timm vit"]().eval()
    prune_(model, 0.2, "magnitude")
    before = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
    slow = ("blocks.0.attn.proj.weight",)
    times = times_of(model, slow=slow)
    plan = prune_(model, pattern=MIX, calibration=IMAGES, timings=times, linear_speedup=1.3, permute=False)
    plan.verify(model)
    after = [weight.as_matrix() == 0 for weight in prunable_weights(model)]
    assert all(bool((new | ~old).all()) for old, new in zip(before, after, strict=True))
    kept = next(layer for layer in plan.layers if layer.name in slow)
    assert kept.pattern == "unstructured" and kept.ms == kept.dense_ms
    assert kept.zeros == int(before[[layer.name for layer in plan.layers].index(slow[0])].sum())
    with pytest.raises(ValueError, match=r"sparsity 0.1 asks for .* zeros, but .* zero already"):
        prune_(model, 0.1, pattern=MIX, calibration=IMAGES, timings=times)


def test_n_of_m_and_other_scores_among_the_patterns():
    model = MODELS["timm vit"]().eval()
    times = times_of(model)
    for how in ({"score": "activation", "repair": "none"}, {"score": "obs"}, {"permute": False}):
        pruned = copy.deepcopy(model)
        plan = prune_(pruned, 0.5, "sensitivity", ("2:4", "4x2"), calibration=IMAGES, timings=times, **how)
        plan.verify(pruned)
        assert {layer.pattern for layer in plan.layers if layer.zeros} <= {"2:4", "4x2"}
        for layer, weight in zip(plan.layers, prunable_weights(pruned), strict=True):
            if layer.pattern == "2:4":
                assert (weight.as_matrix() == 0).reshape(-1, 4).sum(1).eq(2).all()


def test_auto_permutes_for_the_coarsest_pattern_and_max_drop_finds_a_sparsity():
    model, times = MODELS["timm vit"]().eval(), times_of(MODELS["timm vit"]())
    assert prune_(copy.deepcopy(model), 0.4, pattern=MIX, calibration=IMAGES, timings=times).config.permute
    labels = model(IMAGES).argmax(1)
    found = prune_(model, pattern=MIX, calibration=IMAGES, timings=times, max_drop=0.9, evaluate=(IMAGES, labels),
                   tolerance=0.3, permute=False)  # fmt: skip
    assert found.target is not None and len(found.target.trials) > 1
    found.verify(model)
    assert coarsest(MIX) == "4x2" and coarsest(("unstructured", "2:4")) == "2:4"
    assert [pattern_name(parse_pattern(one)[1]) for one in (*MIX, "2:4x4", "2:4")] == [*MIX, "2:4x4", "2:4"]


def test_bad_input_and_failures_change_nothing(monkeypatch):
    model = MODELS["timm vit"]()
    before, times = state(model), times_of(model)
    good = {"pattern": MIX, "calibration": IMAGES, "timings": times}

    def refuse(error, message, **changed):
        with pytest.raises(error, match=message):
            prune_(model, **{**good, **changed})

    refuse(TypeError, r"several patterns need timings=, which time_patterns", timings=None)
    refuse(TypeError, "timings: expected PatternTimes, got dict; rmtkern.time_patterns makes them", timings={})
    refuse(TypeError, "got timings and one pattern, '4x2'; pass several", pattern="4x2")
    refuse(
        ValueError, r"pattern: expected a pattern, or several that differ, got \('4x2', '4x2'\)", pattern=["4x2"] * 2
    )
    refuse(ValueError, r"pattern: expected a pattern, or several that differ, got \(\)", pattern=[])
    refuse(TypeError, "pattern: expected a string, got int", pattern=["4x2", 3])
    refuse(ValueError, "with score 'admm' needs images; pass calibration=", calibration=None)
    refuse(ValueError, "pattern: several are chosen among by measured losses, got budget 'uniform'", method="admm")
    refuse(ValueError, "got budget 'sensitivity', score 'cast' and haar 0", method="sensitivity", score="cast")
    refuse(ValueError, "linear_speedup: expected a finite number >= 1, got 0.5", linear_speedup=0.5)
    refuse(TypeError, "linear_speedup: expected a number, got str", linear_speedup="2")
    refuse(TypeError, "got a sparsity and linear_speedup", linear_speedup=1.2, sparsity=0.5)
    refuse(TypeError, "got linear_speedup and max_drop", linear_speedup=1.2, max_drop=0.1, evaluate=[])
    refuse(ValueError, r"linear_speedup 20: by these times .* reach \d.*x here", linear_speedup=20)
    refuse(ValueError, r"sparsity 0.97: by these times unstructured, 1x2, 4x2 pay up to 0\.\d+ here", sparsity=0.97)
    refuse(ValueError, "timings: no times of blocks.0.attn.qkv.weight", timings=PatternTimes(times.layers[1:]))
    other = LayerTimes(("blocks.0.attn.qkv.weight",), (4, 4), 1.0, {})
    refuse(ValueError, "qkv.weight is 96x32 .* its times are of 4x4", timings=PatternTimes((other, *times.layers[1:])))
    with pytest.raises(ValueError, match="linear_speedup: goes with several patterns to choose among, got '4x2'"):
        PruneConfig(pattern="4x2", linear_speedup=2.0)
    with pytest.raises(ValueError, match="pattern: prune_to_speed_ takes one, got unstructured, 4x2"):
        prune_to_speed_(model.eval(), 1.5, IMAGES, PruneConfig(pattern=("unstructured", "4x2")), IMAGES)
    with pytest.raises(ValueError, match="choose_patterns: expected a sparsity or a speedup, got both or none"):
        choose_patterns([], {}, MIX, times)

    def fail(*args, **kwargs):
        raise Injected

    monkeypatch.setattr(api, "prune_layerwise", fail)
    refuse(Injected, None, sparsity=0.5)
    assert unchanged(model, before)
