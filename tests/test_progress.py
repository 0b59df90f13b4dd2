"""Every long call shows bars where stderr is a terminal or when it is asked to, and is silent elsewhere."""

import inspect
import sys

import pytest
import torch
from torch import nn

import rmtkern
from rmtkern.progress import progress
from rmtkern.sweep import sweep

X, Y = torch.randn(32, 16), torch.arange(32) % 4


class Tokens(nn.Module):
    """Linears that see tokens, so that blocks can be permuted and shrunk."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x + self.mlp(x))


def net():
    torch.manual_seed(0)
    return Tokens().eval()


def timer(calls, budget_ms):
    for call in calls.values():
        call()
    return {name: 2.0 if name == "original" or name.startswith("dense") else 1.0 for name in calls}


def pruned():
    model = net()
    rmtkern.prune_(model, 0.5, "row", show_progress=False)
    return model


SHORT = rmtkern.FinetuneConfig(epochs=1, batch_size=16)
CALLS = {
    "advise": lambda show: rmtkern.advise(net(), X, sparsities=(0.5,), timer=timer, budget_ms=1, show_progress=show),
    "analyze": lambda show: rmtkern.analyze(net(), show_progress=show),
    "certify": lambda show: rmtkern.certify(pruned(), net(), (X, Y), show_progress=show),
    "compare": lambda show: rmtkern.compare(pruned(), X, ("torch",), budget_ms=1, show_progress=show),
    "evaluate": lambda show: rmtkern.evaluate(net(), (X, Y), show_progress=show),
    "finetune_": lambda show: rmtkern.finetune_(pruned(), None, (X, Y), config=SHORT, show_progress=show),
    "fit_spectra": lambda show: rmtkern.fit_spectra({"w": torch.randn(20, 30)}, show_progress=show),
    "pack_": lambda show: rmtkern.pack_(pruned(), X, timer=timer, show_progress=show),
    "prune_": lambda show: rmtkern.prune_(net(), 0.5, pattern="4x2", calibration=X, show_progress=show),
    "prune_gradually_": lambda show: rmtkern.prune_gradually_(
        net(), (X, Y), (0.3,), "row", finetune=SHORT, show_progress=show
    ),
    "prune_to_speed_": lambda show: rmtkern.prune_to_speed_(
        net(), 1.5, X, tolerance=0.5, timer=timer, show_progress=show
    ),
    "shrink_": lambda show: rmtkern.shrink_(net(), 0.5, calibration=X, show_progress=show),
    "time_patterns": lambda show: rmtkern.time_patterns(
        net(), X, ("4x1",), sparsities=(0.5,), timer=timer, budget_ms=1, show_progress=show
    ),
}
"""Public name -> a small call of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("progress")


def test_no_long_call_is_missing(folder):
    long = {name for name in rmtkern.__all__ if "show_progress" in _parameters(getattr(rmtkern, name))}
    assert long - {"write_report"} == set(CALLS)


def _parameters(value):
    return inspect.signature(value).parameters if inspect.isfunction(value) else {}


def calls(folder):
    yield from CALLS.items()
    options = {"sparsities": (0.5,), "methods": ("row",)}
    yield "sweep", lambda show: sweep(net(), (X, Y), folder / f"{show}.csv", **options, show_progress=show)
    yield "write_report", lambda show: rmtkern.write_report(net(), folder / "r.html", show_progress=show)


def test_bars_on_request_and_silence_without_a_terminal(folder, capsys):
    said = {}
    for name, call in calls(folder):
        call(None)
        assert capsys.readouterr() == ("", ""), name
        call(True)
        out, said[name] = capsys.readouterr()
        assert out == "" and "it/s]" in said[name], name
    for label in ("timing:", "timing the whole model:", "packing:"):
        assert label in said["pack_"], label
    for label in ("measure layer by layer:", "permute:", "prune layer by layer:"):
        assert label in said["prune_"], label


def test_bars_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    rmtkern.analyze(net())
    assert "spectra:" in capsys.readouterr().err
    rmtkern.analyze(net(), show_progress=False)
    assert capsys.readouterr().err == ""


def test_progress_hands_every_item_on():
    assert list(progress("abc", "label", show=False)) == ["a", "b", "c"]
    assert list(progress(range(3), "label", total=3, show=None)) == [0, 1, 2]
