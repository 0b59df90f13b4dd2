"""The demo's assets, and the whole demo on a reduced image count."""

import gzip
import hashlib
import json
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from rmtkern.demo import DemoViT, load_demo_model, load_test_images
from rmtkern.demo.run import QUICK, SPARSITIES, run_demo
from rmtkern.demo.train import augment, parse_idx
from rmtkern.evaluation import evaluate


def test_test_images():
    x, y = load_test_images()
    assert x.shape == (10_000, 1, 28, 28) and x.dtype == torch.float32
    assert y.shape == (10_000,) and y.dtype == torch.int64
    assert float(x.min()) == 0.0 and float(x.max()) == 1.0
    assert torch.bincount(y).tolist() == [1_000] * 10  # as its authors describe it
    first, labels = load_test_images(3)
    assert torch.equal(first, x[:3]) and torch.equal(labels, y[:3])


def test_assets_are_whole_and_have_their_licence():
    assets = files("rmtkern.demo").joinpath("assets")
    # of what Debian's dataset-fashion-mnist unpacks to: a changed byte would change every accuracy
    for name, sha256 in (
        ("t10k-images-idx3-ubyte.gz", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        ("t10k-labels-idx1-ubyte.gz", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ):
        assert hashlib.sha256(gzip.decompress(assets.joinpath(name).read_bytes())).hexdigest() == sha256
    licence = assets.joinpath("FASHION_MNIST_LICENSE").read_text()
    assert "Copyright" in licence and "2017 Zalando SE" in licence and "Permission is hereby granted" in licence
    assert len(assets.joinpath("demo_vit.safetensors").read_bytes()) < 8_000_000


def test_demo_model():
    model = load_demo_model()
    assert isinstance(model, DemoViT) and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # 1,000 images: one standard error is 1 point
    assert evaluate(model, load_test_images(1_000), show_progress=False).top1 > 0.87


def test_idx_files():
    raw = b"\x00\x00\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    assert np.array_equal(parse_idx(raw, "x"), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="x: expected an idx file of unsigned bytes, got magic b'PNG!'"):
        parse_idx(b"PNG!" + raw, "x")
    with pytest.raises(ValueError, match=r"x: an idx file of shape \(2, 3\) has other than 17 bytes; copy it again"):
        parse_idx(raw[:-1], "x")


def test_augment_moves_and_flips_only():
    x = load_test_images(64)[0]
    changed = augment(x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape and not torch.equal(changed, x)
    assert float(changed.max()) <= 1.0
    again = augment(x, torch.Generator().manual_seed(0))
    assert torch.equal(changed, again)


SMALL = replace(QUICK, images=128, curve_images=32, batches=(4, 1), pack_ms=1.0, latency_ms=1.0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    said: list[str] = []
    record = run_demo(folder, said.append, effort=SMALL)
    return folder, "\n".join(said), record


def test_demo_accuracy_is_what_the_masked_model_scores(outcome):
    _, _, record = outcome
    from rmtkern.api import prune_

    x, y = load_test_images(SMALL.images)
    # dense float32 libraries round differently: at most one image of 128 may flip
    assert record["dense"]["top1"] == pytest.approx(evaluate(load_demo_model(), (x, y)).top1, abs=1.1 / SMALL.images)
    for sparsity in SPARSITIES:
        found = record[f"sparsity_{sparsity:g}"]
        model = load_demo_model()
        prune_(model, sparsity)
        assert found["accuracy"]["count"] == SMALL.images
        assert found["accuracy"]["top1"] == pytest.approx(evaluate(model, (x, y)).top1, abs=1.1 / SMALL.images)
        zeros, total = (found["plan"]["selected"][key] for key in ("zeros", "total"))
        assert zeros == round(sparsity * total)


def test_demo_latency(outcome):
    _, _, record = outcome
    for sparsity in SPARSITIES:
        rows = record[f"sparsity_{sparsity:g}"]["latency"]
        assert [row["batch"] for row in rows] == list(SMALL.batches)
        for row in rows:
            assert min(row["torch_ms"], row["strongest_dense_ms"], row["packed_ms"]) > 0
            dense = min(row["torch_ms"], row["strongest_dense_ms"])
            assert row["speedup_over_strongest_dense"] == pytest.approx(dense / row["packed_ms"])
            # float32 through three blocks: 1e-5 at most; a wrong kernel is off by 1e-2
            assert row["relative_difference_of_logits"] < 1e-4
        assert 0 <= record[f"sparsity_{sparsity:g}"]["packed_share"] <= 1


def test_demo_curves(outcome):
    _, _, record = outcome
    for points in record["curves"].values():
        assert [sparsity for sparsity, _ in points] == [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
        assert all(0 <= top1 <= 1 for _, top1 in points) and points[-1][1] < points[0][1]


def test_demo_writes_and_tells(outcome):
    folder, said, record = outcome
    assert json.loads((folder / "rmtkern-demo.json").read_text()) == json.loads(json.dumps(record))
    if "matplotlib" in sys.modules:
        assert (folder / "rmtkern-demo.png").read_bytes().startswith(b"\x89PNG")
    for word in ("Marchenko-Pastur", "blocks.0.mlp.fc1", "Prune to 50%", "Prune to 70%", "top-1", "strongest dense"):
        assert word in said
    for sparsity in SPARSITIES:
        assert f"At {sparsity:.0%}: top-1" in said
    assert record["environment"]["cpu"] and record["environment"]["torch"] == torch.__version__


def test_demo_without_matplotlib(tmp_path, monkeypatch, outcome):
    from rmtkern.api import analyze
    from rmtkern.demo.run import _picture

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = load_demo_model()
    text = _picture(tmp_path, model, analyze(model), {"one": [(0.0, 0.9)]}, 10)
    assert text == "No picture: plots need matplotlib: pip install 'rmtkern[report]'"
    assert list(tmp_path.iterdir()) == []


def test_demo_verdict_says_no_when_it_is_slower(outcome):
    from types import SimpleNamespace

    from rmtkern.demo.run import _verdict
    from rmtkern.evaluation import Evaluation

    row = {"batch": 64, "speedup_over_strongest_dense": 0.8, "speedup_over_torch": 1.5}
    result = SimpleNamespace(report=SimpleNamespace(packed_share=0.3), score=Evaluation(0.8, 1, 1, 10), latency=[row])
    text = _verdict(Evaluation(0.9, 1, 1, 10), {0.7: result})
    assert text == (
        "At 70%: top-1 -10.00 points; 30% of the linear weights are packed (less than half).\n"
        "  Batch 64: slower than the strongest dense form (0.80x), 1.50x PyTorch's nn.Linear."
    )


@pytest.mark.parametrize("images", [0, -3, 10_001])
def test_demo_refuses_impossible_counts(tmp_path, images):
    with pytest.raises(ValueError, match=f"images: expected 1 to 10000 test images, got {images}"):
        run_demo(tmp_path / "out", print, effort=replace(QUICK, images=images))
    assert not (tmp_path / "out").exists()
