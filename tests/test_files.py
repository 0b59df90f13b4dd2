"""save and load: bit-identical models back on real architectures, and damaged or hostile files refused whole."""

import copy
import json
import struct
import zlib

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import VisionTransformer
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import rmtkern
from rmtkern import files
from rmtkern.errors import PackedModelError
from rmtkern.files import load, save
from rmtkern.layouts import LAYOUTS
from rmtkern.loading import load_plan
from rmtkern.nn import AbsorbedActivation, PackedLinear
from rmtkern.packing import pack_, unpack_
from rmtkern.packing.gated import fused
from rmtkern.packing.sites import KernelForward
from rmtkern.storage import read_metadata
from rmtkern.testing import random_sparse


def timm_vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, img_size=64).eval()


def transformers_vit():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64)
    return ViTModel(config).eval()


def torchvision_vit():
    torch.manual_seed(0)
    return VisionTransformer(64, 16, 2, 2, 64, 128, num_classes=5).eval()


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def timer(cheap):
    """Runs every call once; candidates in `cheap` are the fastest, earlier ones first."""

    def measure(calls, budget_ms):
        for call in calls.values():
            call()
        if "original" in calls:
            return {name: {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}[name] for name in calls}
        cost = {label: min((i for i, name in enumerate(cheap) if name in label), default=9) for label in calls}
        return {label: 1.0 + value for label, value in cost.items()}

    return measure


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def packed(build, cheap=("kernel", "bitmask"), dtype=None, pattern="unstructured", example=IMAGES):
    model = build()
    plan = rmtkern.prune_(model, 0.5, "uniform", pattern, show_progress=False)
    pack_(model, example, dtype=dtype, timer=timer(cheap), show_progress=False)
    return model, plan


@pytest.mark.parametrize("build", [timm_vit, transformers_vit, torchvision_vit])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_packed_model_comes_back_bit_for_bit(build, dtype, tmp_path):
    model, plan = packed(build, dtype=dtype)
    path = tmp_path / "model.safetensors"
    save(model, path, plan)
    again = load(path, build())
    assert not again.training
    with torch.no_grad():
        assert torch.equal(first(again(IMAGES)), first(model(IMAGES)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in again.named_modules()} == kinds
    assert len(KernelForward.of(again)) == len(KernelForward.of(model)) > 0
    assert load_plan(path) == plan
    assert unpack_(again) == unpack_(model) > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype, name
    for name, parameter in model.named_parameters():
        assert again.get_parameter(name).requires_grad == parameter.requires_grad, name


def swiglu_vit():
    torch.manual_seed(0)
    return timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=56, num_classes=5).eval()


def dinov2():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, use_swiglu_ffn=True
    )
    return Dinov2Model(config).eval()


def fused_is_fastest(calls, budget_ms):
    for call in calls.values():
        call()
    if "original" in calls:
        return {name: {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}[name] for name in calls}
    return {label: 4.0 if "dense" in label else 3.0 if label == "separate" else 1.0 for label in calls}


@pytest.mark.parametrize(("build", "size"), [(swiglu_vit, 56), (dinov2, 64)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gate_up_pairs_come_back(build, size, dtype, tmp_path):
    images = torch.randn(2, 3, size, size)
    model = build()
    rmtkern.prune_(model, 0.5, "uniform", show_progress=False)
    report = pack_(model, images, dtype=dtype, timer=fused_is_fastest, show_progress=False)
    assert len(report.gated) == 2 and len(fused(model)) == 2
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", build())
    assert fused(again) == fused(model)
    with torch.no_grad():
        assert torch.equal(first(again(images)), first(model(images)))
    unpack_(again), unpack_(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


PAIR_CHANGES = {
    "parts": ({"tail": ["fc9"]}, "has other parts in the model"),
    "outputs": ({"outputs": 5}, "is another linear in the model"),
    "outputs kind": ({"outputs": 0}, "outputs: expected a positive integer"),
    "stacked": ({"stacked": "both"}, "stacked: expected 'gate', 'up' or null"),
    "two": ({"linears": ["fc1", "fc2"]}, "linears: expected 1 names"),
    "head": ({"head": [1]}, "head: expected names"),
    "grads": ({"requires_grad": [True] * 4}, "requires_grad: expected two for each linear"),
}


@pytest.mark.parametrize("name", PAIR_CHANGES)
def test_pairs_that_do_not_fit_are_refused_by_name(name, tmp_path):
    change, message = PAIR_CHANGES[name]
    model = swiglu_vit()
    rmtkern.prune_(model, 0.5, "uniform", show_progress=False)
    pack_(model, torch.randn(2, 3, 56, 56), timer=fused_is_fastest, show_progress=False)
    path = tmp_path / "small.safetensors"
    save(model, path)
    tensors, record = load_file(path), json.loads(read_metadata(path)["rmtkern"])
    record["pairs"]["blocks.1.mlp"].update(change)
    refused(written(tmp_path, tensors, record), message, swiglu_vit)


@pytest.mark.parametrize(
    ("cheap", "dtype", "pattern"),
    [
        (("block(r=4",), None, "4x1"),
        (("nofm",), None, "2:4"),
        (("dense/own",), None, "unstructured"),
        (("dense/onednn_prepacked",), None, "unstructured"),
        (("block(r=1",), torch.bfloat16, "unstructured"),
        (("nofm(n=2,m=4,r=4)",), torch.bfloat16, "2:4x4"),
        (("nofm(n=2,m=4)",), torch.bfloat16, "2:4"),
    ],
)
def test_every_form_comes_back(cheap, dtype, pattern, tmp_path):
    model, _ = packed(timm_vit, cheap, dtype, pattern)
    labels = {module.weight.label for module in model.modules() if isinstance(module, PackedLinear)}
    assert any(cheap[0] in label for label in labels)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", timm_vit())
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_several_forms_for_several_token_counts(tmp_path):
    def by_tokens(calls, budget_ms):
        for call in calls.values():
            call()
        if "original" in calls:
            return {name: {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0}[name] for name in calls}
        by_tokens.count += 1
        cheap = ("bitmask", "dense/own")[by_tokens.count % 2]
        return {label: 1.0 if label == cheap else 3.0 for label in calls}

    by_tokens.count = 0
    model = nn.Sequential(nn.Linear(128, 64)).eval()
    model[0].weight.data = random_sparse(64, 128, 0.9)
    pack_(model, [torch.randn(1, 128), torch.randn(50, 128)], timer=by_tokens)
    assert len(model[0].tokens) == 2
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(128, 64)))
    assert again[0].tokens == model[0].tokens
    for tokens in (1, 50):
        x = torch.randn(tokens, 128)
        assert torch.equal(again(x), model(x))


def test_a_model_on_the_meta_device_is_filled_without_dense_weights(tmp_path):
    model, _ = packed(timm_vit)
    save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = timm_vit()
    again = load(tmp_path / "model.safetensors", empty)
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_tied_parameters_are_tied_again(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, words):
            return self.head(self.fc(self.table(words)))

    model, words = Tied().eval(), torch.arange(6).reshape(2, 3)
    rmtkern.prune_(model, 0.9, targets="fc", show_progress=False)
    pack_(model, words, timer=timer(["bitmask"]))
    save(model, tmp_path / "tied.safetensors")
    with torch.device("meta"):
        empty = Tied()
    for other in (Tied(), empty):
        served = load(tmp_path / "tied.safetensors", other)
        assert served.head.weight is served.table.weight and torch.equal(served(words), model(words))
    state = model.state_dict()
    del model.head.weight
    model.head.weight = nn.Parameter(2 * state["head.weight"])
    save(model, tmp_path / "untied.safetensors")
    served = load(tmp_path / "untied.safetensors", Tied())
    assert served.head.weight is not served.table.weight and torch.equal(served(words), model(words))
    unpack_(model)
    rmtkern.prune_(model, 0.9, targets="*head*", show_progress=False)
    pack_(model, words, timer=timer(["bitmask"]))  # the head too, which takes the place of one of two
    save(model, tmp_path / "untied.safetensors")
    with torch.device("meta"):
        empty = Tied()
    served = load(tmp_path / "untied.safetensors", empty)
    assert isinstance(served.head, PackedLinear) and torch.equal(served(words), model(words))


def test_buffers_that_no_file_holds_are_asked_for(tmp_path):
    class WithBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("scale", torch.ones(64), persistent=False)

        def forward(self, x):
            return self.linear(x) * self.scale

    model = WithBuffer().eval()
    model.linear.weight.data = random_sparse(64, 64, 0.9)
    pack_(model, torch.randn(3, 64), timer=timer(["bitmask"]))
    save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = WithBuffer()
    with pytest.raises(PackedModelError, match="the buffers scale are on the meta device and not in any state_dict"):
        load(tmp_path / "model.safetensors", empty)
    load(tmp_path / "model.safetensors", WithBuffer())


def test_bytes_of_a_half_sparse_checkpoint(tmp_path):
    for dtype, most in ((torch.bfloat16, 0.57), (torch.float32, 0.54)):
        model = nn.Sequential(nn.Linear(768, 768)).to(dtype).eval()
        model[0].weight.data = random_sparse(768, 768, 0.5).to(dtype)
        pack_(model, torch.randn(3, 768).to(dtype), timer=timer(["bitmask"]))
        save(model, tmp_path / "model.safetensors")
        parts = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if k.startswith("0.weight")}
        assert sum(part.nbytes for part in parts.values()) <= most * 768 * 768 * dtype.itemsize


def test_a_file_is_plain_safetensors_with_the_models_names(tmp_path):
    model, plan = packed(timm_vit)
    path = tmp_path / "model.safetensors"
    save(model, path, plan)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(model.state_dict())
    record = json.loads(read_metadata(path)["rmtkern"])
    assert record["format"] == "rmtkern packed model" and record["version"] == 1
    assert set(record["linears"]) == {n for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert set(record["absorbed"]) == {n for n, m in model.named_modules() if isinstance(m, AbsorbedActivation)}


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    model, _ = packed(timm_vit)
    path = tmp_path / "model.safetensors"
    save(model, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("rmtkern.storage._sync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_state_that_is_not_all_tensors_is_refused_by_name(tmp_path):
    class Stateful(nn.Sequential):
        def get_extra_state(self):
            return {"steps": 3}

    for build, message in ((Stateful, "_extra_state is no tensor but a dict"), (nn.Sequential, "tensor odd has dtype")):
        model = build(nn.Linear(64, 64)).eval()
        rmtkern.prune_(model, 0.9, targets="all", show_progress=False)
        if build is nn.Sequential:
            model.register_buffer("odd", torch.zeros(3).to(torch.float8_e4m3fnuz))
        pack_(model, torch.randn(4, 64), timer=timer(["bitmask"]))
        with pytest.raises(ValueError, match=f"odd.safetensors: {message}.*, which safetensors does not hold"):
            save(model, tmp_path / "odd.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_save_and_load_refuse(tmp_path):
    model, plan = packed(timm_vit)
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        save({}, path)
    with pytest.raises(ValueError, match=r"the model is not packed, so there is nothing .*; call rmtkern.pack_"):
        save(timm_vit(), path)
    save(model, path)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        load(path, {})
    with pytest.raises(PackedModelError, match=r"the model is packed already; call rmtkern\.unpack_"):
        load(path, model)
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "other.safetensors", timm_vit())
    with pytest.raises(ValueError, match=r"it holds no plan; give the file that rmtkern.save"):
        load_plan(path)
    dense = tmp_path / "dense.safetensors"
    save_file({"a": torch.ones(1)}, dense)
    with pytest.raises(ValueError, match=r"dense\.safetensors: it has no rmtkern metadata; give a file"):
        load(dense, timm_vit())
    save_file({"a": torch.ones(1)}, dense, metadata={"rmtkern": plan.to_json()})
    with pytest.raises(ValueError, match="it holds no packed model"):
        load(dense, timm_vit())
    assert load_plan(dense) == plan


SMALL = (("0", 96, 64), ("2", 40, 96))


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40), nn.LayerNorm(40)).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Tensors and record of a small packed file."""
    model = small()
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.data = random_sparse(module.out_features, module.in_features, 0.8)
    pack_(model, torch.randn(5, 64), timer=timer(["bitmask", "kernel"]))
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    save(model, path)
    return load_file(path), json.loads(read_metadata(path)["rmtkern"])


def written(tmp_path, tensors, record):
    """A file with these tensors and this record (or text), and checksums that fit, as an attacker would write it."""
    path = tmp_path / "small.safetensors"
    if not isinstance(record, str):
        record["checksums"] = {name: files._checksum(tensor) for name, tensor in tensors.items()}
        record = json.dumps(record)
    save_file(tensors, path, metadata={"rmtkern": record, "rmtkern.crc32": str(zlib.crc32(record.encode()))})
    return path


def refused(path, message, build=small):
    """Loading says `message` with the file's name, and leaves the model as it was."""
    model = build()
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"small.safetensors: .*{message}"):
        load(path, model)
    assert [type(module) for module in model.modules()] == kinds
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


CHANGES = {
    "version": (lambda t, r: r.update(version=2), "format version 2, this rmtkern reads 1; update rmtkern"),
    "version kind": (lambda t, r: r.update(version=True), "format version True"),
    "linears": (lambda t, r: r.update(linears=[]), "linears: expected an object"),
    "attention": (lambda t, r: r.update(attention=[1]), "attention: expected names"),
    "attention name": (lambda t, r: r.update(attention=["9"]), "the model has no module '9'"),
    "norms": (lambda t, r: r.update(norms="3"), "norms: expected names"),
    "norms kind": (lambda t, r: r.update(norms=["1"]), "1 is no nn.LayerNorm in the model"),
    "lent": (lambda t, r: r.update(lent=[0]), "lent: expected names"),
    "lent kind": (lambda t, r: r.update(lent=["3"]), "'3' lends its weight and is no packed linear"),
    "absorbed": (lambda t, r: r.update(absorbed=["3"]), "3 is no activation in the model"),
    "cast": (lambda t, r: r.update(cast={"inside": "int8", "outside": "float32", "names": []}), "cast: expected"),
    "merging": (lambda t, r: r.update(merging={"r": 8}), "merging: expected r, protected and restore, got"),
    "merging less": (
        lambda t, r: r.update(merging={"r": -1, "protected": 0, "restore": True}),
        "merging: expected r, protected and restore, got",
    ),
    "merging where nothing can": (
        lambda t, r: r.update(merging={"r": 8, "protected": 1, "restore": False}),
        "Sequential has no blocks of norm1, attn, .* cannot be merged; give the model that was packed",
    ),
    "module": (lambda t, r: r["linears"].update({"7": r["linears"]["0"]}), "the model has no module '7'"),
    "kind": (lambda t, r: r["linears"].update({"3": r["linears"]["0"]}), "3 is .* and LayerNorm in the model"),
    "shape": (lambda t, r: r["linears"]["0"].update(features=[96, 65]), r"0 is \[96, 65\] with a bias in the file"),
    "huge": (lambda t, r: r["linears"]["0"].update(features=[2**62, 2**62]), "0 is .* in the file and nn.Linear"),
    "negative": (lambda t, r: r["linears"]["0"].update(features=[-1, 64]), "0.features: expected two positive"),
    "bias": (lambda t, r: r["linears"]["0"].update(bias=False), "0 is .* without a bias in the file"),
    "bias kind": (lambda t, r: r["linears"]["0"].update(bias=1), "0.bias: expected true or false"),
    "activation": (lambda t, r: r["linears"]["0"].update(activation="exec"), "0.activation: expected a known"),
    "grad": (
        lambda t, r: r["linears"]["0"].update(requires_grad=[1, 0]),
        "0.requires_grad: expected two booleans",
    ),
    "no forms": (lambda t, r: r["linears"]["0"].update(forms=[]), "0.forms: expected a list"),
    "layout": (lambda t, r: r["linears"]["0"]["forms"][0].update(layout="os"), "0.forms: expected a layout of"),
    "params": (lambda t, r: r["linears"]["0"]["forms"][0].update(params={"n": "2"}), "0.params: expected integers"),
    "tokens": (lambda t, r: r["linears"]["0"]["forms"][0].update(tokens=0), "0.tokens: expected a positive"),
    "twice": (lambda t, r: r["linears"]["0"]["forms"].append(r["linears"]["0"]["forms"][0]), "is missing"),
    "a part": (lambda t, r: t.pop("0.weight.masks"), "0.weight.masks is missing"),
    "part shape": (lambda t, r: t.update({"0.weight.rows": t["0.weight.rows"][:-1]}), "0.weight: part 'rows' must"),
    "part dtype": (lambda t, r: t.update({"0.weight.values": t["0.weight.values"].double()}), "0.weight: expected"),
    "masks": (lambda t, r: t["0.weight.masks"].fill_(-1), "0.weight: bitmask: masks, rows, starts and values"),
    "rows": (lambda t, r: t["0.weight.rows"].fill_(255), "0.weight: bitmask: masks, rows, starts and values"),
    "starts": (lambda t, r: t["0.weight.starts"].fill_(2**60), "0.weight: bitmask: masks, rows, starts"),
    "nan": (lambda t, r: t["0.weight.values"].fill_(float("nan")), "0.weight has NaN or Inf entries"),
    "another": (lambda t, r: t.update(more=torch.ones(1)), r"0 tensors .* and 1 are unknown to it \('more'\)"),
    "one less": (lambda t, r: t.pop("3.weight"), r"1 tensors of the model are missing \(3.weight\)"),
    "other shape": (lambda t, r: t.update({"3.weight": torch.ones(41)}), r"3.weight: expected '\[40\]'|3.weight"),
    "other dtype": (lambda t, r: t.update({"3.weight": torch.ones(40).double()}), "3.weight: expected torch.float32"),
    "bias dtype": (
        lambda t, r: t.update({"0.bias": torch.ones(96).double()}),
        r"0.bias: expected torch.float32 \[96\], got",
    ),
    "bias shape": (
        lambda t, r: t.update({"0.bias": torch.ones(95)}),
        r"0.bias: expected torch.float32 \[96\], got .*\[95\]",
    ),
    "strip twice": (
        lambda t, r: t["0.weight.rows"].copy_(t["0.weight.rows"].where(t["0.weight.rows"] != 5, 6)),
        "0.weight: rows do not have each strip once; copy the file again",
    ),
}


def test_a_file_from_before_layer_norms_were_swapped_loads(parts, tmp_path):
    tensors, record = copy.deepcopy(parts)
    norms = record.pop("norms")
    assert norms == ["3"] and "" in record.pop("mlps") and record.pop("normed") == {}
    assert KernelForward.of(load(written(tmp_path, tensors, record), small())) == []
    record["norms"] = norms
    assert [
        site.module.normalized_shape for site in KernelForward.of(load(written(tmp_path, tensors, record), small()))
    ] == [(40,)]


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_by_name(name, parts, tmp_path):
    change, message = CHANGES[name]
    tensors, record = copy.deepcopy(parts)
    change(tensors, record)
    refused(written(tmp_path, tensors, record), message)


def test_one_flipped_bit_is_seen_and_named(parts, tmp_path):
    path = written(tmp_path, *copy.deepcopy(parts))
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    spans = {key: entry["data_offsets"] for key, entry in json.loads(whole[8:start]).items() if key != "__metadata__"}
    for key, (begin, _) in spans.items():
        data = bytearray(whole)
        data[start + begin] ^= 1
        path.write_bytes(data)
        refused(path, f"{key} differs from its checksum; copy the file again")
    data = bytearray(whole)
    data[data.index(b"requires_grad")] ^= 1
    path.write_bytes(data)
    refused(path, "its metadata differs from its checksum; copy the file again")


def test_metadata_that_is_no_json(parts, tmp_path):
    for text in ("", "{", "[" * 100_000, "null", "[]", '{"format": 3}'):
        refused(written(tmp_path, parts[0], text), "")


def test_truncated_and_foreign_files(parts, tmp_path):
    whole = written(tmp_path, *parts).read_bytes()
    path = tmp_path / "small.safetensors"
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "")
    for junk in (struct.pack("<Q", 2**63) + whole[8:], b"PK\x03\x04" + whole, b"\x80\x04" + whole):
        path.write_bytes(junk)
        refused(path, "")


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 9),
    sparsity=st.floats(0, 1),
    layout=st.sampled_from([("bitmask", {}), ("block", None), ("nofm", {"n": 2, "m": 4}), ("dense", {"form": 3})]),
    bf16=st.booleans(),
)
def test_pack_save_load_unpack_is_the_identity(tmp_path_factory, n, groups, sparsity, layout, bf16):
    name, params = layout
    params = params if params is not None else {"r": 4, "c": 2 if bf16 else 1}
    model = nn.Sequential(nn.Linear(4 * groups, n)).to(torch.bfloat16 if bf16 else torch.float32).eval()
    weight = random_sparse(n, 4 * groups, sparsity, nofm=(2, 4) if name == "nofm" else None).to(model[0].weight.dtype)
    bias = model[0].bias.detach().clone()
    model[0] = PackedLinear(LAYOUTS[name].pack(weight, **params), bias)
    path = tmp_path_factory.mktemp("identity") / "model.safetensors"
    save(model, path)
    again = load(path, nn.Sequential(nn.Linear(4 * groups, n)).to(weight.dtype))
    unpack_(again)
    assert torch.equal(again[0].weight, weight + 0.0) and torch.equal(again[0].bias, bias)


CHAINS = [
    ("unstructured", ["bitmask"]),
    ("unstructured", ["dense"]),
    ("4x1", ["block"]),
    ("1x2", ["block"]),
    ("2:4", ["nofm"]),
]
"""Pattern, and the layouts that are fastest."""


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9).map(lambda eighths: 8 * eighths),
    groups=st.integers(1, 9),
    sparsity=st.floats(0, 0.97),
    chain=st.sampled_from(CHAINS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_prune_pack_save_load_unpack_is_the_identity(tmp_path_factory, n, groups, sparsity, chain, dtype, bias):
    """Whatever form pack_ takes, what prune_ left comes back bit for bit, from the model and from its file."""

    def net():
        torch.manual_seed(groups)
        return nn.Sequential(nn.Linear(8 * groups, n, bias), nn.GELU(), nn.Linear(n, 16)).to(dtype).eval()

    (pattern, layouts), model = chain, net()
    rmtkern.prune_(model, 0.5 if pattern == "2:4" else sparsity, "magnitude", pattern, "all", show_progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack_(model, torch.randn(3, 8 * groups).to(dtype), timer=timer(layouts), show_progress=False)
    path = tmp_path_factory.mktemp("chain") / "model.safetensors"
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        save(model, path)
        again = load(path, net())
        unpack_(again), unpack_(model)
        for one in (model, again):
            after = one.state_dict()
            assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    else:
        assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
