"""finetune_(cut_every=): when spectra are cut, what the report says, and that masks and resumed runs stay exact."""

import pytest
import torch
from torch import nn

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.training import loop
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_
from rmtkern.training.report import FinetuneReport

OPTIONS = {"epochs": 4, "lr": 1e-3, "holdout": 0.0, "cut_every": 2, "cut_until": 4, "cut_gate": 1.0,
           "show_progress": False}  # fmt: skip


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 4))


def data():
    x = torch.randn(48, 24, generator=torch.Generator().manual_seed(2))
    return x, x[:, :4].argmax(1)


def ranks(model):
    values = [torch.linalg.svdvals(weight.as_matrix().double()) for weight in prunable_weights(model, "all")]
    return [int((one > 1e-6 * one[0]).sum()) for one in values]


def test_spectra_are_cut_in_their_epochs_and_only_then():
    model = net()
    report = finetune_(model, None, data(), **OPTIONS)
    cuts = [row.cut for row in report.epochs]
    assert cuts[0] is cuts[1] is cuts[3] is None and cuts[2] > 0 and cuts[4] > 0
    # after epoch 4 = cut_until nothing is left below the edge; the head, 4 x 32, is too small for a fit
    first, second, head = ranks(model)
    assert 24 + 32 - first - second == cuts[4] and head == 4
    assert f"after epoch 4: cut {cuts[4]} singular values" in str(report)
    assert FinetuneReport.from_json(report.to_json()) == report


def test_without_it_nothing_is_cut():
    model = net()
    report = finetune_(model, None, data(), **{**OPTIONS, "cut_every": None})
    assert ranks(model) == [24, 32, 4] and all(row.cut is None for row in report.epochs)


def test_pruned_weights_stay_zero_through_cuts_and_a_resume_has_the_same_bits(tmp_path, monkeypatch):
    models = []
    for interrupted in (False, True):
        model = net()
        plan = prune_(model, 0.4, "uniform", targets="all")
        path = tmp_path / f"{interrupted}.safetensors"
        if interrupted:
            seeded = loop.seed_epoch

            def crash(seed, epoch, rank, seeded=seeded):
                if epoch == 4:
                    raise KeyboardInterrupt
                seeded(seed, epoch, rank)

            monkeypatch.setattr(loop, "seed_epoch", crash)
            with pytest.raises(KeyboardInterrupt):
                finetune_(model, plan, data(), checkpoint=path, **OPTIONS)
            monkeypatch.undo()
            model = net()
            prune_(model, 0.4, "uniform", targets="all")
        report = finetune_(model, plan, data(), checkpoint=path, resume=True, **OPTIONS)
        assert report.epochs[2].cut > 0
        plan.verify(model)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_group_blocks_are_cut_one_by_one():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(32, 64, 2, groups=2), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    model = Grouped()
    x = torch.randn(12, 32, 3, 3, generator=torch.Generator().manual_seed(3))
    report = finetune_(model, None, (x, torch.arange(12) % 3), **{**OPTIONS, "epochs": 2, "cut_until": 2})
    halves = model.conv.weight.detach().reshape(2, 32, 64).double()
    kept = [int((values > 1e-6 * values[0]).sum()) for values in map(torch.linalg.svdvals, halves)]
    assert 64 - sum(kept) == report.epochs[2].cut > 0 and max(kept) < 32


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr(loop, "is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match="cut_every: the weights are sharded, and a spectrum needs whole ones"):
        finetune_(net(), None, data(), **OPTIONS)


@pytest.mark.parametrize(("fields", "error", "message"), [
    ({"cut_every": 0}, ValueError, "cut_every: expected at least 1, got 0"),
    ({"cut_every": 2.0}, TypeError, "cut_every: expected an int, got float"),
    ({"cut_until": 0}, ValueError, "cut_until: expected at least 1, got 0"),
    ({"cut_gate": 1.5}, ValueError, r"cut_gate: expected a number in \[0, 1\], got 1.5"),
])  # fmt: skip
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        FinetuneConfig(**fields)
