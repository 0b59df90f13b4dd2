"""load_pretrained: a packed transformers model from its folder, without dense weights and without anybody's code."""

import json
import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

import rmtkern
from rmtkern import pretrained
from rmtkern.packing import is_packed
from tests.fuzz import ours_wins

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
WORDS = {"input_ids": torch.arange(12).reshape(2, 6)}
MODELS = {
    "ViT": (lambda: ViTModel(ViTConfig(image_size=32, **SIZES)), IMAGES),
    "CLIP vision": (lambda: CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **SIZES)), IMAGES),
    "BERT": (lambda: BertModel(BertConfig(vocab_size=100, **SIZES)), WORDS),
}
"""The last two have buffers that no file holds."""


def saved(name, folder, dtype=torch.float32, inside=None, **options):
    """A packed model and its folder."""
    build, example = MODELS[name]
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    example = {key: value.to(dtype) if value.is_floating_point() else value for key, value in example.items()}
    plan = rmtkern.prune_(model, 0.6, "uniform", show_progress=False)
    rmtkern.pack_(model, example, dtype=inside, timer=ours_wins, show_progress=False)
    rmtkern.save(model, folder, plan, **options)
    return model, example


@pytest.mark.parametrize(
    ("name", "dtype", "inside", "size"),
    [
        ("ViT", torch.float32, None, None),
        ("ViT", torch.float32, torch.bfloat16, "50KB"),
        ("ViT", torch.bfloat16, None, None),
        ("CLIP vision", torch.float32, None, None),
        ("BERT", torch.float32, None, None),
    ],
)
def test_a_folder_is_enough(name, dtype, inside, size, tmp_path, monkeypatch):
    model, example = saved(name, tmp_path / "folder", dtype, inside, max_shard_size=size)
    real, seen = pretrained.load, []

    def load(folder, empty, **options):
        assert all(parameter.is_meta for parameter in empty.parameters())  # no dense weight is in memory
        assert not any(buffer.is_meta for buffer in empty.buffers())
        seen.append(options)
        return real(folder, empty, **options)

    monkeypatch.setattr(pretrained, "load", load)
    again = rmtkern.load_pretrained(tmp_path / "folder", mmap=False)
    assert seen == [{"mmap": False}] and type(again) is type(model) and is_packed(again) and not again.training
    with torch.no_grad():
        got, want = again(**example)[0], model(**example)[0]
    assert got.dtype == want.dtype == dtype and torch.equal(got, want)
    rmtkern.unpack_(again)
    again.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    ours = again.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in dense.state_dict().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "vit"
    saved("ViT", path)
    return path


def changed(folder, target, **entries):
    """A copy of a folder whose config says something else."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **entries}))
    return target


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["os"]}, r"config\.json: architectures: expected the name of a model class .* got \['os'\]"),
        ({"architectures": ["PreTrainedModel"]}, r"for a ViTConfig, got \['PreTrainedModel'\]; build the model"),
        ({"architectures": ["BertModel"]}, r"for a ViTConfig, got \['BertModel'\]"),
        ({"architectures": None}, "for a ViTConfig, got None"),
        ({"architectures": ["ViTForImageClassification"]}, r"the model has no module|no .* in the model|are missing"),
        ({"num_hidden_layers": 2}, "tensors of the model are missing"),
        ({"hidden_size": 32}, r"nn\.Linear \[32, 32\] .*in the model; give the model that was packed"),
        ({"model_type": "no such"}, r"config\.json: transformers does not take it"),
    ],
)
def test_what_does_not_fit_is_refused(entries, message, folder, tmp_path):
    before = nn.Module.register_parameter
    with pytest.raises(ValueError, match=message):
        rmtkern.load_pretrained(changed(folder, tmp_path / "other", **entries))
    assert nn.Module.register_parameter is before and torch.get_default_dtype() == torch.float32
    assert not nn.Linear(2, 2).weight.is_meta


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    other = changed(folder, tmp_path / "other", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    rmtkern.load_pretrained(other)  # by the class of transformers
    other = changed(folder, tmp_path / "mine", model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="transformers does not take it"):
        rmtkern.load_pretrained(other)
    assert not (tmp_path / "ran").exists()


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere: no config\.json in it; give the folder that rmtkern\.save wrote"):
        rmtkern.load_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"no model\.safetensors and no model\.safetensors\.index\.json in it"):
        rmtkern.load_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="load_pretrained needs transformers: pip install transformers"):
        rmtkern.load_pretrained(folder)
