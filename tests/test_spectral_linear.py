"""Pattern "spectral": factors of the spikes plus a sparse rest, from prune_ through fine-tuning, files and packing."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmtkern import api
from rmtkern.api import prune_
from rmtkern.certificates import certify
from rmtkern.cli import main
from rmtkern.files import load, save
from rmtkern.loading import load_model, load_state_, save_dense
from rmtkern.packing import pack_, unpack_
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.spectral_linear import SpectralLinear, merge_factors_, spectral_linears
from rmtkern.spectrum.fit import fit_spectrum
from rmtkern.speed import prune_to_speed_
from rmtkern.training.loop import finetune_

X = torch.randn(96, 48, generator=torch.Generator().manual_seed(1))
NAMES = ("0.weight", "2.weight")


def net():
    """Linears of two spikes, few large entries, and noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 4)).eval()
    for one in (model[0], model[2]):
        n, k = one.weight.shape
        spikes = torch.randn(n, 2) @ torch.randn(2, k) / 6
        rest = torch.randn(n, k) * (torch.rand(n, k) < 0.15) / 6
        one.weight.data = spikes + rest + 0.002 * torch.randn(n, k)
    return model


def divided(sparsity=0.8, **options):
    model = net()
    options = {"pattern": "spectral", "calibration": X, "targets": NAMES, **options}
    return model, prune_(model, sparsity, **options)


def unchanged(model):
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))
    return same and not spectral_linears(model)


def loss(model):
    wanted = net()(X)
    return float(((model(X) - wanted).square().sum() / wanted.square().sum()).detach())


def test_without_pruning_the_model_is_the_same_and_its_factors_are_the_spikes():
    dense = net()
    model, plan = divided(0.0, method="obs")
    assert loss(model) < 1e-10
    for index, layer in zip((0, 2), plan.layers, strict=True):
        weight, one = dense[index].weight.detach().double(), model[index]
        rank = fit_spectrum(dense[index].weight).n_spikes
        assert one.rank == rank == layer.params["rank"] >= 2 and layer.pattern == "spectral"
        u, s, vh = torch.linalg.svd(weight)
        best = (u[:, :2] * s[:2]) @ vh[:2]  # the planted ones stand out far; those near the edge mix with it
        b, a = one.factor_b.double(), one.factor_a.double()
        u, s, vh = torch.linalg.svd(b @ a)
        torch.testing.assert_close((u[:, :2] * s[:2]) @ vh[:2], best, rtol=0, atol=1e-3 * float(best.abs().max()))
        torch.testing.assert_close(one.weight.double(), weight - b @ a, rtol=0, atol=1e-6)
    half, _ = divided(0.0, method="obs", spikes=0.5)
    assert [half[i].rank for i in (0, 2)] == [max(1, round(0.5 * model[i].rank)) for i in (0, 2)]


@pytest.mark.parametrize("method", ["auto", "obs", "wanda", "magnitude"])
def test_counts_are_those_of_the_rests_and_less_is_lost(method):
    model, plan = divided(0.8, method=method)
    total = 48 * 96 + 96 * 64
    assert plan.selected.zeros == round(0.8 * total) == sum(int((model[i].weight == 0).sum()) for i in (0, 2))
    plain = net()
    prune_(plain, 0.8, method, targets=NAMES, calibration=X)
    assert loss(model) < 0.5 * loss(plain)
    assert PrunePlan.from_json(plan.to_json()) == plan and plan.config.pattern == "spectral"
    plan.verify(model)
    numbers = sum(model[i].rank * sum(model[i].weight.shape) for i in (0, 2))
    assert f"{numbers:,} numbers more" in str(plan) and "pattern spectral" in str(plan)


def test_again_at_a_higher_sparsity_the_factors_stay():
    model, _ = divided(0.5)
    before = copy.deepcopy(model)
    plan = prune_(model, 0.8, pattern="spectral", calibration=X, targets=NAMES)
    for i in (0, 2):
        assert torch.equal(model[i].factor_a, before[i].factor_a)
        assert bool((model[i].weight[before[i].weight == 0] == 0).all())
    assert plan.layers[0].params == {"rank": model[0].rank}


def test_a_sparsity_is_found_for_an_accuracy():
    model, y = net(), net()(X).argmax(1)
    plan = prune_(
        model, pattern="spectral", method="obs", calibration=X, targets=NAMES, max_drop=0.1, evaluate=(X, y),
        tolerance=0.1,
    )  # fmt: skip
    assert plan.target is not None and len(plan.target.trials) >= 3
    assert float((model(X).argmax(1) == y).float().mean()) >= 0.9 - 1e-6
    plan.verify(model)


def test_merged_it_is_a_plain_model_that_computes_the_same():
    model, _ = divided()
    expected, whole = model(X), copy.deepcopy(model)
    assert merge_factors_(whole) == 2 and not spectral_linears(whole) and merge_factors_(whole) == 0
    torch.testing.assert_close(whole(X), expected, rtol=1e-5, atol=1e-5)
    assert whole.state_dict().keys() == net().state_dict().keys() and whole[0].bias is not model[0].bias
    with pytest.raises(ValueError, match="a lone SpectralLinear cannot be swapped in place"):
        merge_factors_(model[0])
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got int"):
        merge_factors_(3)
    with pytest.raises(ValueError, match=r"expected factors \[96, R\] and \[R, 48\] and a rest \[96, 48\]"):
        SpectralLinear(net()[0], torch.ones(96, 2), torch.ones(3, 48), torch.ones(96, 48))
    with pytest.raises(ValueError, match="expected a rank of 1 to 48"):
        SpectralLinear(net()[0], torch.ones(96, 50), torch.ones(50, 48), torch.ones(96, 48))


def test_fine_tuning_holds_the_zeros_and_trains_the_factors(tmp_path):
    model, plan = divided()
    save_dense(net(), tmp_path / "dense.safetensors")
    before = copy.deepcopy(model)
    finetune_(model, plan, X, teacher=tmp_path / "dense.safetensors", epochs=20, lr=1e-4, holdout=0)
    for i in (0, 2):
        assert torch.equal(model[i].weight == 0, before[i].weight == 0)
        assert not torch.equal(model[i].factor_a, before[i].factor_a)
        assert not torch.equal(model[i].weight, before[i].weight)
    assert loss(model) < loss(before)


def test_a_checkpoint_is_loaded_into_the_plain_architecture(tmp_path):
    model, plan = divided()
    save_dense(model, tmp_path / "s.safetensors", plan.to_json())
    other = net()
    load_state_(other, tmp_path / "s.safetensors", "net")
    plan.verify(other)
    assert torch.equal(other(X), model(X))
    narrow = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 5)).eval()
    kinds = [type(module) for module in narrow]
    with pytest.raises(ValueError, match=r"does not fit narrow: 2 wrong shape \(3.weight"):
        load_state_(narrow, tmp_path / "s.safetensors", "narrow")
    assert [type(module) for module in narrow] == kinds


@pytest.fixture
def prefer():
    """A timer to which the spectral form is the fastest, or which runs everything alike."""

    def timer(calls, budget_ms):
        for call in calls.values():
            call()
        return {label: 0.5 if "spectral" in label or label == "packed" else 1.0 for label in calls}

    return timer


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_packed_as_it_is_and_kept_in_files(prefer, tmp_path, dtype):
    model, plan = divided(0.9)
    expected, parts = model(X), [(model[i].factor_b, model[i].factor_a, model[i].weight) for i in (0, 2)]
    report = pack_(model, X, dtype=dtype, timer=prefer, attention=False, norms=False, mlps=False)
    assert [layer.form.split("(")[0] for layer in report.layers[:2]] == ["spectral", "spectral"]
    for i, wanted in zip((0, 2), parts, strict=True):
        found = model[i].weight.split()
        assert all(torch.equal(a, b.detach().to(a.dtype)) for a, b in zip(found, wanted, strict=True))
    tolerance = 1e-5 if dtype is None else 3e-2
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(model(X), expected, rtol=0, atol=tolerance * scale)
    save(model, tmp_path / "p.safetensors", plan)
    again = net()
    load(tmp_path / "p.safetensors", again)
    assert torch.equal(again(X), model(X))
    assert unpack_(model) >= 2 and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(X), expected, rtol=0, atol=tolerance * scale)


def test_a_failure_while_packing_leaves_the_parts(prefer, monkeypatch):
    model, plan = divided()
    modules, expected = list(model), model(X)
    monkeypatch.setattr("rmtkern.packing.pack.guard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack_(model, X, timer=prefer)
    assert all(one is two for one, two in zip(model, modules, strict=True)) and torch.equal(model(X), expected)
    plan.verify(model)


class Reads(nn.Module):
    """Code that multiplies with .weight itself."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = net()[0], net()[2]

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight)


def test_what_cannot_be_divided_is_refused_and_nothing_changes(monkeypatch):
    options = {"pattern": "spectral", "targets": NAMES}
    model = net()
    for error, message, more in (
        (ValueError, r"pattern 'spectral' needs images, at least to see that the model.*; pass calibration=", {}),
        (ValueError, r"spikes: expected a share in \(0, 1\], got 0", {"calibration": X, "spikes": 0}),
        (ValueError, "permute: pattern 'spectral' has no mini-blocks", {"calibration": X, "permute": True}),
        (ValueError, "does not take a batch of float32", {"calibration": X[:, :9]}),
        (ValueError, "unknown pattern 'spectral'", {"calibration": X, "pattern": ["spectral", "4x1"]}),
        (ValueError, "spikes: goes with pattern 'spectral', got pattern '4x1'", {"pattern": "4x1", "spikes": 0.5}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            prune_(model, 0.5, **{**options, **more})
        assert unchanged(model)
    with pytest.raises(ValueError, match="the search times stand-ins, which have no factors"):
        prune_to_speed_(model, 1.5, X, PruneConfig(pattern="spectral", targets=NAMES), X)
    monkeypatch.setattr(api, "prune_layerwise", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune_(model, 0.5, calibration=X, **options)
    assert unchanged(model)
    monkeypatch.undo()
    reads = Reads().eval()
    with pytest.raises(ValueError, match=r"the model's outputs change by .* does other code read a .weight itself"):
        prune_(reads, 0.5, pattern="spectral", calibration=X, targets="all")
    assert type(reads.fc1) is nn.Linear and torch.equal(reads.fc1.weight, net()[0].weight)
    convolution = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(64, 4)).eval()
    with pytest.raises(ValueError, match=r"0.weight belongs to a Conv2d, and only the weight of an nn.Linear inside"):
        prune_(convolution, 0.5, pattern="spectral", calibration=torch.randn(4, 3, 4, 4), targets="all")
    tied = net()
    tied.append(nn.Linear(48, 96))
    tied[4].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0.weight belongs to a Linear and is 4.weight too"):
        prune_(tied, 0.5, pattern="spectral", calibration=X, targets=NAMES)
    changed, _ = divided()
    with pytest.raises(ValueError, match=r"call rmtkern.merge_factors_ on a copy"):
        certify(changed, net(), X)
    merge_factors_(changed)
    assert certify(changed, net(), X[:8]) is not None


def test_a_loader_that_shuffles_will_do():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=16, shuffle=True)
    model, plan = divided(calibration=loader)
    plan.verify(model)
    assert plan.calibration_images == len(X) and len(spectral_linears(model)) == 2


def test_a_weight_without_spikes_stays_plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 4)).eval()
    model[0].weight.data = torch.randn(64, 48) / 7
    assert fit_spectrum(model[0].weight).n_spikes == 0
    plan = prune_(model, 0.5, pattern="spectral", calibration=X, targets="0.weight")
    assert type(model[0]) is nn.Linear and plan.layers[0].params == {} and plan.sparsity == 0.5


def test_command_line(tmp_path, capsys):
    spec, file = "tests.test_spectral_linear:net", str(tmp_path / "s.safetensors")
    # the toy takes no images, so the folder's are not for it
    argv = ["prune", spec, "--targets", *NAMES, "--pattern", "spectral", "-o", file]
    assert main(argv) == 2
    assert "pattern 'spectral' needs images" in capsys.readouterr().err
    model, plan = divided()
    save_dense(model, file, plan.to_json())
    again = load_model(spec, checkpoint=file)
    np.testing.assert_array_equal(again(X).detach().numpy(), model(X).detach().numpy())
