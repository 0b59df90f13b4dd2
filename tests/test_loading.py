"""Models from names, functions and checkpoints; what is written is complete and loads in unmodified libraries."""

import json
import os
import stat
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rmtkern.api import prune_
from rmtkern.demo import load_demo_model
from rmtkern.loading import input_size_of, load_model, random_input, save_dense
from rmtkern.pruning.plan import PrunePlan
from rmtkern.storage import read_metadata


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `toys` in the current folder with functions that return good and bad things."""
    (tmp_path / "toys.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).train()\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("toys", None)


def test_function(module):
    model = load_model("toys:net")
    assert isinstance(model, nn.Sequential) and not model.training


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toys:number", "expected the function to return a torch.nn.Module, got int"),
        ("toys:missing", "expected an importable module:function that returns a model .*no attribute 'missing'"),
        ("no_such_module_here:net", "expected an importable module:function .*No module named"),
    ],
)
def test_bad_function(module, spec, message):
    with pytest.raises(ValueError, match=message):
        load_model(spec)


def test_demo_model():
    model = load_model("demo")
    assert not model.training
    assert input_size_of(model, 5) == random_input(model, 5).shape == (5, 1, 28, 28)
    for name, tensor in load_demo_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_timm_names():
    timm = pytest.importorskip("timm")
    model = load_model("vit_tiny_patch16_224", random_weights=True)
    assert isinstance(model, timm.models.VisionTransformer) and not model.training
    assert input_size_of(model, 2) == (2, 3, 224, 224)
    with pytest.raises(
        ValueError, match=r"vit_tinny: no timm model of that name; similar: .*vit.*or give module:function"
    ):
        load_model("vit_tinny")


def test_text_models_get_token_ids():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    ids = random_input(model, 3)
    assert ids.shape == (3, 128) and ids.dtype == torch.int64 and set(ids.flatten().tolist()) == set(range(9))
    assert torch.equal(random_input(model, 3), ids)
    model.append(nn.Conv2d(3, 4, 1))
    assert random_input(model, 3).shape == (3, 3, 224, 224)


def test_no_hub(monkeypatch):
    timm = pytest.importorskip("timm")

    def unreachable(name, pretrained):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        ValueError, match=r"could not load pretrained weights .*no route.*--random-weights where no model"
    ):
        load_model("vit_tiny_patch16_224")
    with pytest.raises(OSError, match="no route"):  # not the hub's fault: the error itself
        load_model("vit_tiny_patch16_224", random_weights=True)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ValueError, match=r"timm names need timm: pip install 'rmtkern\[models\]'; or give module:function"
    ):
        load_model("vit_tiny_patch16_224")


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested"])
def test_checkpoint(module, kind):
    state = {name: torch.randn_like(tensor) for name, tensor in load_model("toys:net").state_dict().items()}
    path = module / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file({name: tensor.half() for name, tensor in state.items()}, path)
    else:
        torch.save(state if kind == "pt" else {"state_dict": state, "epoch": 3}, path)
    model = load_model("toys:net", checkpoint=path)
    for name, tensor in model.state_dict().items():
        expected = state[name].half().float() if kind == "safetensors" else state[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_no_code_of_a_pickle_runs(module):
    torch.save({"w": Evil(str(module / "pwned"))}, module / "evil.pt")
    with pytest.raises(ValueError, match="expected safetensors or a weights-only torch file"):
        load_model("toys:net", checkpoint=module / "evil.pt")
    assert not (module / "pwned").exists()


def test_bad_checkpoints(module):
    with pytest.raises(ValueError, match=r"gone.safetensors: no such file; give the path of a safetensors file"):
        load_model("toys:net", checkpoint=module / "gone.safetensors")
    state = dict(load_model("toys:net").state_dict())
    save_file(state, module / "cut.safetensors")
    (module / "cut.safetensors").write_bytes((module / "cut.safetensors").read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"cut.safetensors: not a complete safetensors file: tensor .* ends 4 bytes after"
    ):
        load_model("toys:net", checkpoint=module / "cut.safetensors")
    torch.save([1, 2], module / "list.pt")
    with pytest.raises(
        ValueError, match=r"list.pt: expected a state dict of tensors; convert the checkpoint to safetensors"
    ):
        load_model("toys:net", checkpoint=module / "list.pt")
    del state["1.bias"]
    state["2.bias"], state["0.bias"] = torch.zeros(2), torch.zeros(9)
    save_file(state, module / "other.safetensors")
    with pytest.raises(
        ValueError,
        match=r"does not fit toys:net: 1 missing \(1.bias\); 1 unexpected \(2.bias\); 1 wrong shape "
        r"\(0.bias \(9,\) instead of \(4,\)\); give the model",
    ):
        load_model("toys:net", checkpoint=module / "other.safetensors")


def test_saved_file_loads_in_unmodified_timm(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    plan = prune_(model, 0.5)
    path = tmp_path / "pruned.safetensors"
    save_dense(model, path, plan.to_json())
    fresh = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, checkpoint_path=str(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    again = PrunePlan.from_json(read_metadata(path)["rmtkern"])
    again.verify(fresh)
    assert again == plan or again.to_json() == plan.to_json()
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_saved_file_loads_in_unmodified_torchvision_and_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = pytest.importorskip("torchvision").models
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, **sizes)

    def theirs():
        return vision.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=3)

    model, other = theirs(), transformers.ViTModel(config)
    for one in (model, other):
        prune_(one, 0.5)
    save_dense(model, tmp_path / "vit.safetensors")
    fresh = theirs()
    fresh.load_state_dict(load_file(tmp_path / "vit.safetensors"))  # strict
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    (tmp_path / "hub").mkdir()
    save_dense(other, tmp_path / "hub" / "model.safetensors")
    config.save_pretrained(tmp_path / "hub")
    again, said = transformers.ViTModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))


def test_saved_shared_tensors_are_stored_under_every_key(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_dense(model, tmp_path / "tied.safetensors")
    state = load_file(tmp_path / "tied.safetensors")
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert read_metadata(tmp_path / "tied.safetensors") == {"format": "pt"}


def test_save_is_all_or_nothing(tmp_path, monkeypatch):
    model, path = nn.Linear(4, 4), tmp_path / "model.safetensors"
    save_dense(model, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("rmtkern.storage._sync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_dense(nn.Linear(4, 4), path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_saved_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save_dense(nn.Linear(4, 4), tmp_path / "model.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


def test_metadata_of_damaged_files(tmp_path):
    (tmp_path / "short").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_metadata(tmp_path / "short")
    (tmp_path / "cut").write_bytes((30).to_bytes(8, "little") + json.dumps({"__metadata__": {}}).encode()[:-3])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_metadata(tmp_path / "cut")
