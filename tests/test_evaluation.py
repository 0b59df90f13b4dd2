"""evaluate: all three kinds of input, the scores against a direct computation, and every refusal."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmtkern import evaluation
from rmtkern.demo.model import DemoViT
from rmtkern.evaluation import Evaluation, Preprocessing, evaluate, folder_batches, preprocessing_of

Image = pytest.importorskip("PIL.Image")


class Mean(nn.Module):
    """Logits from the image's mean colour: class 0 red, 1 green, 2 blue."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}

    def forward(self, x):
        return x.mean((2, 3))


def linear_model(classes=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()


def pair(count=23, classes=7):
    return torch.randn(count, 3, 2, 2), torch.randint(0, classes, (count,))


@pytest.fixture
def folder(tmp_path):
    """Three classes whose sorted names are red, green, blue in this order; two images each, not square."""
    for name, colour in (("a_red", (255, 0, 0)), ("b_green", (0, 255, 0)), ("c_blue", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (12 + 5 * index, 20), colour).save(tmp_path / name / f"{index}.png")
    (tmp_path / "a_red" / "notes.txt").write_text("not an image")
    return tmp_path


def direct(model, x, y, k=5):
    with torch.no_grad():
        logits = model(x).double()
    rank = (logits > logits.gather(1, y[:, None])).sum(1)
    return (rank < 1).double().mean(), (rank < k).double().mean(), F.cross_entropy(logits, y)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_pair_against_a_direct_computation(batch_size):
    model, (x, y) = linear_model(), pair()
    found = evaluate(model, (x, y), batch_size=batch_size)
    top1, top5, loss = direct(model, x, y)
    assert (found.top1, found.top5, found.count) == (top1, top5, 23)
    assert 0 < found.top1 < found.top5 < 1  # the example can tell the two apart
    # fp32 sums of 23 terms: a few eps
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


def test_loader_gives_the_same_as_the_pair():
    model, (x, y) = linear_model(), pair()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    # the loss is summed in other batches: a few eps of fp32
    one, other = evaluate(model, loader), evaluate(model, (x, y))
    assert (one.top1, one.top5, one.count) == (other.top1, other.top5, other.count)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    with_lists = evaluate(model, ([xs, ys] for xs, ys in zip(x.split(4), y.split(4), strict=True)))
    assert with_lists.top1 == other.top1


def test_folder(folder):
    found = evaluate(Mean(), folder)
    assert (found.top1, found.top5, found.count) == (1.0, 1.0, 6)
    assert evaluate(Mean(), str(folder), classes=["b_green", "a_red", "c_blue"]).top1 == pytest.approx(1 / 3)
    assert evaluate(Mean(), folder, limit=3).count == 3


def test_folder_preprocessing(folder):
    how = Preprocessing(size=(8, 6), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5), crop=0.8)
    batches = list(folder_batches(folder, how, batch_size=4))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 8, 6), (2, 3, 8, 6)]
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 1, 1, 2, 2]
    # red: (1 - 0.5) / 0.25 and (0 - 0.5) / 0.5; a constant image stays constant under resizing
    assert torch.equal(batches[0][0][0, :, 3, 3], torch.tensor([2.0, -1.0, -1.0]))
    (grey, _), *_ = folder_batches(folder, Preprocessing(size=(4, 4), mean=(0.0,), std=(1.0,)))
    assert grey.shape[1] == 1


def test_centre_crop(tmp_path):
    (tmp_path / "only").mkdir()
    image = Image.new("RGB", (24, 8))
    image.paste((255, 255, 255), (8, 0, 16, 8))  # the middle third is white
    image.save(tmp_path / "only" / "wide.png")
    (x, _), *_ = folder_batches(tmp_path, Preprocessing(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0))
    assert torch.equal(x, torch.ones(1, 3, 8, 8))


def test_limit_spreads_over_the_classes_of_a_folder(folder):
    labels = torch.cat([y for _, y in folder_batches(folder, Preprocessing((4, 4)), limit=3)])
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["pair", "loader"])
def test_limit_takes_the_first(kind):
    model, (x, y) = linear_model(), pair()
    images = (x, y) if kind == "pair" else list(zip(x.split(4), y.split(4), strict=True))
    assert evaluate(model, images, limit=10, batch_size=4).to_dict() == pytest.approx(
        evaluate(model, (x[:10], y[:10])).to_dict(), rel=1e-5
    )


def test_few_classes_have_top5_of_one():
    assert evaluate(linear_model(3), pair(classes=3)).top5 == 1.0


def test_modes_are_restored_each_by_itself_also_after_a_failure():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(), nn.Linear(12, 7)).train()
    model[1].eval()  # a frozen norm in a training model
    evaluate(model, pair())
    assert [module.training for module in model] == [True, False, True, True]
    with pytest.raises(ValueError, match="labels must lie"):
        evaluate(model, pair(classes=90))
    assert model.training and not model[1].training


def test_no_graph_is_kept():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.training))
            return super().forward(x)

    evaluate(nn.Sequential(nn.Flatten(), Spy(12, 7)).train(), pair())
    assert seen == [(False, True, False)]


def test_outputs_with_logits_and_tuples():
    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.inner, self.wrap = linear_model(), wrap

        def forward(self, x):
            return self.wrap(self.inner(x))

    for wrap in (lambda logits: SimpleNamespace(logits=logits), lambda logits: (logits, None)):
        model = Wrapped(wrap)
        images = pair()
        assert evaluate(model, images) == evaluate(model.inner, images)


def test_evaluation_prints_and_serialises():
    found = Evaluation(0.5, 1.0, 0.25, 4)
    assert str(found) == "top-1 50.00%, top-5 100.00%, loss 0.2500 on 4 images"
    assert json.loads(json.dumps(found.to_dict())) == {"top1": 0.5, "top5": 1.0, "loss": 0.25, "count": 4}


def test_preprocessing_of_each_library():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    vision = pytest.importorskip("torchvision")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=96)
    how = preprocessing_of(vit)
    assert how == Preprocessing((96, 96), (0.5,) * 3, (0.5,) * 3, 0.9)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[32, 48]
    )
    assert preprocessing_of(transformers.ViTForImageClassification(config)).size == (32, 48)
    config.num_channels = 1
    assert preprocessing_of(SimpleNamespace(config=config)).mean == (0.5,)
    torchvision_vit = vision.models.VisionTransformer(64, 32, 1, 1, 8, 8)
    assert preprocessing_of(torchvision_vit).size == (64, 64)
    assert preprocessing_of(nn.Linear(2, 2)) == Preprocessing()
    assert preprocessing_of(DemoViT()) == Preprocessing((28, 28), (0.0,), (1.0,), 1.0)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 3, 2, 2), TypeError, r"a loader of \(x, y\), a pair of tensors or an image folder, got Tensor"),
        (7, TypeError, "images: expected a loader of .* got int"),
        ([], ValueError, "no images to evaluate: the loader or tensor pair is empty"),
        ((torch.zeros(0, 3, 2, 2), torch.zeros(0).long()), ValueError, "no images to evaluate"),
        ((torch.zeros(3, 3, 2, 2), torch.zeros(2).long()), ValueError, r"labels \[B\], got \(3, 3, 2, 2\) and \(2,\)"),
        ((torch.zeros(3, 3, 2, 2), torch.zeros(3, 7).long()), ValueError, r"and \(3, 7\)"),
        ([torch.zeros(3, 3, 2, 2)], TypeError, r"loader to give pairs of tensors \(x, y\), got Tensor"),
        ([(torch.zeros(3, 3, 2, 2), [0, 0, 0])], TypeError, "pairs of tensors"),
        ([(torch.zeros(3, 3, 2, 2), torch.zeros(2).long())], ValueError, r"images \[B, ...\] and labels \[B\], got"),
        ((torch.zeros(3, 3, 2, 2), torch.zeros(3)), TypeError, r"expected integer class numbers, got torch.float32"),
        ((torch.zeros(2, 3, 2, 2), torch.tensor([0, 7])), ValueError, r"labels must lie in 0..6, got 0..7"),
        ((torch.zeros(2, 3, 2, 2), torch.tensor([-1, 3])), ValueError, r"labels must lie in 0..6, got -1..3"),
        ((torch.full((2, 3, 2, 2), torch.nan), torch.tensor([1, 3])), ValueError, "model returned NaN or Inf logits"),
    ],
)  # fmt: skip
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        evaluate(linear_model(), images)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"limit": 0}])
def test_bad_options(option):
    with pytest.raises(ValueError, match="batch_size and limit must be at least 1"):
        evaluate(linear_model(), pair(), **option)


def test_bad_models():
    with pytest.raises(ValueError, match=r"return logits \[B, classes\], got \(23, 3, 2, 2\); evaluate a classifier"):
        evaluate(nn.Identity(), pair())
    with pytest.raises(ValueError, match=r"got dict"):
        evaluate(SimpleModel(), pair())
    with pytest.raises(ValueError, match=r"expected logits \[23, classes\], one row per image, got \(1, 12\)"):
        evaluate(nn.Sequential(nn.Flatten(), FirstRow()), pair())


class SimpleModel(nn.Module):
    def forward(self, x):
        return {"features": x}


class FirstRow(nn.Module):
    def forward(self, x):
        return x[:1]


def test_bad_folders(tmp_path, folder):
    with pytest.raises(ValueError, match="no such folder; expected one with a sub-folder of images per class"):
        evaluate(Mean(), folder / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected one sub-folder of images per class, found none"):
        evaluate(Mean(), tmp_path / "empty")
    with pytest.raises(ValueError, match="expected one sub-folder of images per class, missing d_grey"):
        evaluate(Mean(), folder, classes=["a_red", "d_grey"])
    (tmp_path / "empty" / "a").mkdir()
    with pytest.raises(ValueError, match=r"found no image \(.*\.png.*\) in its class sub-folders"):
        evaluate(Mean(), tmp_path / "empty")
    (folder / "c_blue" / "1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"1\.png: not a readable image .* remove or repair it"):
        evaluate(Mean(), folder)


def test_folder_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"reading an image folder needs Pillow: pip install pillow"):
        evaluate(Mean(), folder)


def test_the_public_names():
    assert set(evaluation.__all__) <= set(dir(evaluation))


def test_a_function_is_no_module():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        evaluate(lambda x: x, pair())
