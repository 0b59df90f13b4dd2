"""Configs, plans and their JSON."""

import hashlib

import pytest
import torch
from torch import nn

from rmtkern.pruning.budget import BUDGETS
from rmtkern.pruning.plan import Count, LayerPlan, PruneConfig, PrunePlan, mask_hash
from rmtkern.pruning.presets import AUTO, AUTO_CALIBRATED, AUTO_NM, PRESETS
from rmtkern.pruning.score import CALIBRATED, SCORES
from rmtkern.spectrum.fit import SpectralFits, fit_spectra


@pytest.mark.parametrize("fields, error, message", [
    ({"sparsity": 1.0}, ValueError, r"sparsity: expected a fraction in \[0, 1\), got 1.0"),
    ({"sparsity": -0.1}, ValueError, r"sparsity: expected a fraction in \[0, 1\), got -0.1"),
    ({"sparsity": float("nan")}, ValueError, r"sparsity: expected a fraction in \[0, 1\), got nan"),
    ({"sparsity": "0.5"}, TypeError, "sparsity: expected a number, got str"),
    ({"sparsity": True}, TypeError, "sparsity: expected a number, got bool"),
    ({"method": "magic"}, ValueError, "unknown method 'magic'; expected one of auto, magnitude, uniform, row"),
    ({"method": None}, TypeError, "method: expected a string, got NoneType"),
    ({"budget": "all"}, ValueError, "unknown budget 'all'; expected one of global, uniform, row, edge, cycle"),
    ({"score": "size"}, ValueError, "unknown score 'size'; expected one of magnitude, activation, obs, admm"),
    ({"pattern": "2-4"}, ValueError, "unknown pattern '2-4'; expected 'unstructured', n:m"),
    ({"pattern": "2:4", "sparsity": 0.6}, ValueError, "pattern '2:4' takes only sparsity 0.5, got 0.6"),
    ({"pattern": "1:4"}, ValueError, "pattern '1:4' takes only sparsity 0.75, got 0.5"),
    ({"targets": 3}, TypeError, "targets: expected strings .* got int"),
    ({"targets": ["mlp", 3]}, TypeError, r"targets: expected strings .* got \('mlp', 3\)"),
    ({"targets": ()}, ValueError, "targets: expected at least one role"),
    ({"ignore": [None]}, TypeError, "ignore: expected strings"),
    ({"haar": -1.0}, ValueError, "haar: expected a finite number >= 0, got -1.0"),
    ({"haar": float("inf")}, ValueError, "haar: expected a finite number >= 0, got inf"),
    ({"haar": "0.5"}, TypeError, "haar: expected a number, got str"),
    ({"alpha_regime": 1}, TypeError, "alpha_regime: expected a bool, got int"),
    ({"theta": "radians"}, ValueError, "unknown theta 'radians'; expected one of haar, legacy"),
    ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
])  # fmt: skip
def test_bad_configs(fields, error, message):
    with pytest.raises(error, match=message):
        PruneConfig(**fields)


def test_words_may_be_one_string_or_any_iterable():
    config = PruneConfig(targets="mlp", ignore=iter(["head", "embed"]))
    assert (config.targets, config.ignore) == (("mlp",), ("head", "embed"))


def test_presets_name_budgets_and_scores_that_exist():
    assert {AUTO, AUTO_CALIBRATED, AUTO_NM} <= set(PRESETS)
    for preset in PRESETS.values():
        assert preset.budget in BUDGETS and preset.score in SCORES
    assert PRESETS[AUTO].score not in CALIBRATED and PRESETS[AUTO_NM].score not in CALIBRATED
    assert PRESETS[AUTO_CALIBRATED].score in CALIBRATED


def test_resolve_names_everything():
    assert PruneConfig().resolve(False).method == AUTO
    assert PruneConfig().resolve(True).method == AUTO_CALIBRATED
    assert PruneConfig(pattern="2:4").resolve(False).method == AUTO_NM
    seb = PruneConfig(method="seb", score="random").resolve(False)
    assert (seb.budget, seb.score, seb.needs_fits, seb.needs_calibration) == ("edge", "random", True, False)
    plain = PruneConfig(method="magnitude").resolve(False)
    assert not plain.needs_fits and PruneConfig(method="magnitude", haar=0.5).resolve(False).needs_fits
    assert seb.resolve(False) == seb


def test_resolve_asks_for_images():
    with pytest.raises(
        ValueError, match=r"method 'wanda' with score 'activation' needs images; pass calibration=.*magnit"
    ):
        PruneConfig(method="wanda").resolve(False)


def test_mask_hash_is_the_hash_of_the_packed_bits():
    mask = torch.tensor([[True, False, False], [False, False, True]])  # 100001 and two bits of padding
    assert mask_hash(mask) == hashlib.sha256(bytes([0b10000100])).hexdigest()


def example():
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16))
    model[0].weight.data[:, :8] = 0
    mask = model[0].weight == 0
    layer = LayerPlan("0.weight", "linear", (12, 16), int(mask.sum()), mask_hash(mask), {"n": 2, "m": 4})
    fits = fit_spectra({"0.weight": torch.randn(64, 64), "tiny": torch.randn(3, 3)})
    config = PruneConfig(targets=("0",), pattern="2:4").resolve(False)
    return model, PrunePlan(config, (layer,), Count(96, 384), Count(96, 412), fits, 7)


def test_json_round_trip():
    _, plan = example()
    again = PrunePlan.from_json(plan.to_json())
    assert again.config == plan.config
    assert again.layers == plan.layers
    assert (again.prunable, again.parameters, again.calibration_images) == (Count(96, 384), Count(96, 412), 7)
    assert dict(again.fits) == dict(plan.fits) and len(again.fits) == 2
    assert again.to_json() == plan.to_json()
    assert isinstance(again.fits, SpectralFits)


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"config": {"speed": 3}, "layers": []}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="not the JSON of a PrunePlan"):
        PrunePlan.from_json(text)


def test_the_table_has_every_layer_and_all_accountings():
    _, plan = example()
    text = str(plan)
    assert "0.weight" in text and "12x16" in text
    assert "over selected weights: 50.00 % (96 of 192)" in text
    assert "over prunable weights with patch embedding and head: 25.00 % (96 of 384)" in text
    assert "over all parameters: 23.30 % (96 of 412)" in text
    assert (plan.sparsity, plan.layers[0].sparsity) == (0.5, 0.5)
    assert Count(0, 0).sparsity == 0.0


def test_verify_finds_another_zero_pattern():
    model, plan = example()
    plan.verify(model)
    model[0].weight.data[0, 0] = 1e-30
    with pytest.raises(ValueError, match=r"the zeros of 0.weight \(1 of 1 weights\) differ from the plan"):
        plan.verify(model)
    with pytest.raises(ValueError, match="differ from the plan"):
        plan.verify(nn.Linear(3, 3))
