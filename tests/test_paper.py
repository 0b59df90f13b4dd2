"""The papers' experiments: each runs and confirms its claims; a number outside of its bounds does not."""

import csv
import gzip

import numpy as np
import pytest
import torch

from benchmarks import accuracy_tables, record
from benchmarks.accuracy import unpack_hits
from benchmarks.paper import compression, fully_connected, ordering, outer_scale
from benchmarks.paper.__main__ import EXPERIMENTS, ON_IMAGES, main
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


def test_fully_connected_networks(few_images, capsys, monkeypatch):
    """Rows, which are not run again when they are known, and the tables made of them."""
    monkeypatch.setattr(record, "RESULTS", few_images)
    path, small_path = (few_images / f"{name}-{accuracy_tables.FULLY_CONNECTED}.csv"
                        for name in ("fully-connected", "fully-connected-small"))  # fmt: skip
    argv = ["--data", str(few_images), "--width", "40", "--epochs", "4", "--batch", "20", "--gate", "1"]
    argv += ["--held-out", "20", "--network", "He", "--strength", "1e-5", "--out", str(path)]
    assert fully_connected.main([*argv, "none"]) == 0  # nothing to compare
    small = ["--compress", "factors + calibrated", "--max-drop", "0.5", "--compressed-out", str(small_path)]
    fully_connected.main([*argv, "MP + L1 + L2", *small])
    with path.open(newline="") as file:
        none, cut = csv.DictReader(file)
    weights = 784 * 40 + 3 * 40 * 40 + 40 * 10 + 10 * 10
    assert none["weights"] == str(weights) and (none["train_images"], none["cut_gate"]) == ("60", "")
    assert int(cut["cut_values"]) > 0 and cut["stopped"] == ""
    assert (none["strength"], cut["strength"]) == ("", "1e-05")
    assert fully_connected.scaled_strength(100, 60_000) == 1e-6 and fully_connected.scaled_strength(10, 6_000) == 1e-4
    assert unpack_hits(none["hits"], 20).mean() == pytest.approx(float(none["test_top1"]) / 100)
    assert 1 <= int(none["classes"]) <= 10
    assert (none["published_test_top1"], cut["published_test_top1"]) == ("71.64", "90.53")
    assert float(none["noise_growth"]) == pytest.approx(1, abs=0.3)  # and twice the weights times the noise
    assert 0 <= float(none["noise_0.01_test_top1"]) <= 100
    with small_path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["numbers"], row["held_out"]) == (str(weights + 4 * 40 + 2 * 10), "20")
    assert 0 < int(row["small_numbers"]) < int(row["numbers"]) and 0 < float(row["share"]) <= 0.15
    assert float(row["tuned_loss"]) == pytest.approx(float(row["tuned_top1"]) - float(row["small_top1"]), abs=0.01)
    capsys.readouterr()
    code = fully_connected.main([*argv, "MP", "none", "MP + L1 + L2", *small])
    out = capsys.readouterr().out
    assert ("none < MP: holds" in out and "\nMP < MP + L1 + L2: holds" in out) is (code == 0)
    assert "MP, seed 0: test" in out and "none, seed 0: test" in out  # not compressed yet
    assert "MP + L1 + L2, seed 0: test" not in out  # which is known
    table = accuracy_tables.fully_connected()
    assert [row[3] for row in table.rows] == ["MP + L1 + L2", "MP", "none"]
    assert float(table.rows[-1][6]) == float(none["test_top1"])
    assert {row[3] for row in accuracy_tables.fully_connected_order().rows} == {"none < MP", "MP < MP + L1 + L2"}
    cells = dict(zip((table := accuracy_tables.fully_connected_small()).columns, table.rows[0], strict=True))
    assert cells["small numbers"] == f"{int(row['small_numbers']):,}" and float(cells["small"]) == float(
        row["small_top1"]
    )
    assert cells["lost against tuned"].startswith(f"{float(row['tuned_loss']):.2f} ± ")
    with pytest.raises(SystemExit):
        fully_connected.main([*argv, "all"])


def test_outputs_behind_a_relu_are_not_negative():
    x = torch.randn(30, 784)
    plain, ended = (fully_connected.network(30, kind, 0) for kind in ("He", "He, ReLU at the end"))
    assert torch.equal(plain(x).clamp(min=0), ended(x)) and (plain(x) < 0).any()


def test_the_scale_of_the_outer_layers(few_images):
    """tau from its parts; a wider network has to have a smaller one."""
    findings = list(ON_IMAGES["C4"](0, few_images, widths=(20, 30), epochs=1, images=40))
    tau = [finding for finding in findings if finding.quantity == "tau"]
    assert tau[0].holds and tau[1].high == tau[0].measured and len(findings) == 7
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for a, b in ((5, 8), (8, 8), (8, 3))))
    net = torch.nn.Sequential(net[0], torch.nn.ReLU(), net[1], torch.nn.ReLU(), net[2])
    image = torch.rand(5)
    w1, w3 = (net[index].weight.detach().double().numpy() for index in (0, 4))
    outer = np.linalg.norm(w3, np.inf) * np.linalg.norm(w1 @ image.double().numpy())
    expected = outer * np.sqrt(np.log(16) / 8), outer / 8**0.375
    assert outer_scale.outer_scales(net, image) == pytest.approx(expected)


def test_experiments_on_images_are_run_where_they_are(few_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.paper.__main__.EXPERIMENTS", {})
    seen = []
    monkeypatch.setitem(ON_IMAGES, "C4", lambda seed, data: seen.append(data) or iter([Finding("C4", "", "", 0, 0, 0)]))
    assert main(["--data", str(few_images)]) == 0 and seen == [few_images]
    assert main(["--data", str(tmp_path / "none")]) == 0 and len(seen) == 1
    assert main(["C4", "--data", str(few_images)]) == 0 and len(seen) == 2


def test_a_difference_over_images_and_seeds():
    """The interval covers the truth at least as often as it says, where seeds and images both vary; p agrees."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        seeds, hard = 0.05 * rng.standard_normal((2, 3, 1)), rng.random(400)
        first, second = (hard < 0.7 + add + seed for add, seed in zip((0.0, 0.05), seeds, strict=True))
        found = ordering.compare(first.astype(float), second.astype(float))
        covered.append(found.low <= 5 <= found.high)
        assert (found.p < 0.05) is (found.low > 0 or found.high < 0)
    assert np.mean(covered) >= 0.93
    one = ordering.compare(np.zeros((1, 100)), np.eye(1, 100))
    assert (one.points, one.seeds) == (1, 1) and one.p == pytest.approx(
        0.3197, abs=1e-3
    )  # t = 1, 99 degrees of freedom
    same = ordering.compare(np.ones((2, 9)), np.ones((2, 9)))
    assert (same.low, same.high, same.p) == (0, 0, 1)


def test_claims_are_judged_together():
    def difference(points, p):
        return ordering.Difference(points, 0, 0, p, 3)

    claims = [difference(1, 0.03), difference(1, 0.01), difference(-1, 0.001), difference(1, 0.9)]
    # 0.001 against 0.05 / 4, 0.01 against 0.05 / 3, and 0.03 is above 0.05 / 2
    assert ordering.decide(claims) == ["undecided", "holds", "reversed", "undecided"]
    assert ordering.decide(claims[:1]) == ["holds"] and ordering.decide([]) == []


@pytest.fixture
def low_rank():
    """A network whose middle matrix is of rank 3 but for noise that no class depends on; images and labels."""
    torch.manual_seed(0)
    first, middle, last = torch.nn.Linear(30, 60), torch.nn.Linear(60, 60), torch.nn.Linear(60, 4)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), middle, torch.nn.ReLU(), last).eval()
    with torch.no_grad():
        middle.weight.copy_(8 * torch.randn(60, 3) @ torch.randn(3, 60) / 60 + 0.001 * torch.randn(60, 60))
    x = torch.randn(400, 30)
    return net, (x, net(x).argmax(1))


def test_what_is_smaller_as_factors_becomes_two_linears(low_rank):
    net, (x, y) = low_rank
    before = [parameter.clone() for parameter in net.parameters()]
    small = compression.factored(net, (x, y), 0.01)
    assert all(map(torch.equal, before, net.parameters()))
    assert (small(x).argmax(1) == y).float().mean() >= 0.99
    ranks = [layer.out_features for layer in small if isinstance(layer, torch.nn.Linear) and layer.bias is None]
    assert 3 in ranks
    assert compression.numbers(small) == sum(int((p != 0).sum()) for p in small.parameters())
    assert compression.numbers(small) < compression.numbers(net)


def test_the_smallest_network_that_is_good_enough(low_rank):
    net, images = low_rank
    weights, how = 30 * 60 + 60 * 60 + 60 * 4, compression.TUNING
    options = {"method": "magnitude", "weights": weights, "shares": (0.8, 0.7, 0.01), "how": how}
    before = [parameter.clone() for parameter in net.parameters()]
    found = compression.smallest(net, images, images, allowed=0.7, **options)
    assert found is not None and found[1] in (0.8, 0.7)  # with one weight in a hundred it is not
    assert (found[0](images[0]).argmax(1) == images[1]).float().mean() >= 0.7
    left = sum(int(layer.weight.count_nonzero()) for layer in found[0] if isinstance(layer, torch.nn.Linear))
    assert left == weights - round((1 - found[1]) * weights)
    assert compression.smallest(net, images, images, allowed=1.1, **options) is None
    factors = compression.factored(net, images, 0.01)
    own = sum(layer.weight.numel() for layer in factors if isinstance(layer, torch.nn.Linear))
    found = compression.smallest(factors, images, images, allowed=0.0, **{**options, "shares": (own / weights + 0.1,)})
    assert found is None  # it is below that already
    assert all(map(torch.equal, before, net.parameters()))


def test_a_compressed_network_is_compared_with_one_that_was_trained_as_long(low_rank):
    net, images = low_rank
    data = dict.fromkeys(("train", "held out", "test"), images)
    control = compression.tuned(net, *(data["train"], data["held out"]), compression.TUNING)
    row = compression.compressed(net, control, data, "magnitude", 0.05, compression.TUNING)
    assert (row["factors"], row["factored_numbers"], row["test_images"]) == (0, None, 400)
    assert row["trained_loss"] == pytest.approx(row["trained_top1"] - row["small_top1"], abs=0.01)
    row = compression.compressed(net, control, data, "factors + calibrated", -1, compression.TUNING)
    assert row["share"] == 1 and row["tuned_loss"] == 0  # nothing is good enough
