"""The papers' experiments: each runs and confirms its claims; a number outside of its bounds does not."""

import csv
import gzip

import numpy as np
import pytest
import torch

from benchmarks.paper import compression, fully_connected
from benchmarks.paper.__main__ import EXPERIMENTS, main
from benchmarks.paper.finding import Finding


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_confirms_its_claims(name):
    findings = list(EXPERIMENTS[name](1))
    assert findings and {finding.experiment for finding in findings} == {name}
    assert [finding for finding in findings if not finding.holds] == []
    assert all(finding.low is not None or finding.high is not None for finding in findings if finding.published is None)


@pytest.mark.parametrize(
    ("measured", "low", "high", "holds"),
    [(1, None, None, True), (1, 1, 1, True), (1, 2, None, False), (1, None, 0, False), (float("nan"), 0, 1, False)],
)
def test_bounds(measured, low, high, holds):
    assert Finding("X", "", "", measured, low, high).holds is holds


def test_rows_are_stored_and_a_failed_claim_is_the_exit_status(tmp_path, monkeypatch):
    path = tmp_path / "paper.csv"
    monkeypatch.setitem(EXPERIMENTS, "T6", lambda seed: iter([Finding("T6", "a", "b", seed, 0, 0)]))
    assert main(["T6", "--out", str(path)]) == 0
    assert main(["T6", "--seeds", "2", "--out", str(path)]) == 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["holds"]) for row in rows] == [("0", "True"), ("1", "False")] and rows[0]["torch"]
    with pytest.raises(SystemExit):
        main(["T99"])


@pytest.fixture
def few_images(tmp_path):
    """The four idx files of Fashion-MNIST with 80 images of two grey levels per class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 80), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = (rng.integers(0, 30, (count, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return tmp_path


def test_fully_connected_networks(few_images, capsys):
    path = few_images / "fc.csv"
    argv = ["--data", str(few_images), "--width", "40", "--epochs", "4", "--batch", "20", "--gate", "1"]
    argv += ["--held-out", "20"]
    assert fully_connected.main([*argv, "none", "He, MP + L1 + L2", "--out", str(path)]) == 0  # nothing to compare
    with path.open(newline="") as file:
        none, cut = csv.DictReader(file)
    weights = 784 * 40 + 3 * 40 * 40 + 40 * 10 + 10 * 10
    assert none["weights"] == str(weights) and none["numbers"] == str(weights + 4 * 40 + 2 * 10)
    assert (none["train_images"], none["held_out"], none["cut_gate"]) == ("60", "20", "")
    assert int(cut["cut_values"]) > 0 and cut["stopped"] == ""
    assert all(0 < int(row["small_numbers"]) < int(row["numbers"]) for row in (none, cut))
    assert (none["published_test_top1"], cut["published_test_top1"]) == ("71.64", "")
    assert float(none["noise_growth"]) == pytest.approx(1, abs=0.3)  # and twice the weights times the noise
    assert 0 <= float(none["noise_0.01_test_top1"]) <= 100
    capsys.readouterr()
    code = fully_connected.main([*argv, "MP", "none", "--out", str(path)])
    out = capsys.readouterr().out
    assert ("none < MP: holds" in out) is (code == 0)
    assert "MP: test" in out and "none: test" not in out  # which is known
    with pytest.raises(SystemExit):
        fully_connected.main([*argv, "all"])


def test_a_small_network_is_no_worse_and_computes_what_its_numbers_say():
    torch.manual_seed(0)
    first, middle, last = torch.nn.Linear(30, 60), torch.nn.Linear(60, 60), torch.nn.Linear(60, 4)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), middle, torch.nn.ReLU(), last)
    with torch.no_grad():  # rank 3 and noise that no class depends on
        middle.weight.copy_(8 * torch.randn(60, 3) @ torch.randn(3, 60) / 60 + 0.001 * torch.randn(60, 60))
    x = torch.randn(400, 30)
    y = net(x).argmax(1)
    before = [parameter.clone() for parameter in net.parameters()]
    small = compression.compress(net, (x, y), max_drop=0.01)
    assert all(map(torch.equal, before, net.parameters()))
    assert (small(x).argmax(1) == y).float().mean() >= 0.99
    ranks = [layer.out_features for layer in small if isinstance(layer, torch.nn.Linear) and layer.bias is None]
    assert 3 in ranks  # two factors
    left = compression.numbers(small)
    assert left == sum(int((p != 0).sum()) for p in small.parameters()) < 0.9 * compression.numbers(net)
