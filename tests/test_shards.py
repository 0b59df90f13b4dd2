"""Tensors in several files and an index: written whole, read back, and every wrong set of shards refused by name."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel

from rmtkern import load, load_plan, pack_, prune_, save, shards, storage, unpack_
from rmtkern.layouts import LAYOUTS
from rmtkern.loading import load_model
from rmtkern.nn import PackedLinear
from rmtkern.testing import random_sparse
from tests.test_files import timer

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))


def deep():
    torch.manual_seed(2)
    return nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(64, 64), nn.LayerNorm(64))]).eval()


def packed(build=deep, example=X, seed=None):
    model = build()
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    plan = prune_(model, 0.6, "uniform", targets=("*",), show_progress=False) if build is deep else prune_(
        model, 0.6, "uniform", show_progress=False
    )  # fmt: skip
    pack_(model, example, timer=timer(["bitmask"]), norms=False, show_progress=False)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    return model, plan


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def sharded(tmp_path):
    """A model in shards: itself, its index, the index's content, and the shards in order."""
    model, plan = packed()
    save(model, tmp_path / "vit.safetensors", plan, max_shard_size="12KB")
    index = tmp_path / "vit.safetensors.index.json"
    record = json.loads(index.read_text())
    return model, index, record, sorted(set(record["weight_map"].values()))


def test_a_sharded_model_comes_back(sharded, tmp_path):
    model, index, record, files = sharded
    assert len(files) > 2 and names(tmp_path) == sorted([index.name, *files])
    state = model.state_dict()
    assert record["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    held = {}
    for file in files:
        with safe_open(tmp_path / file, "pt") as opened:  # the library's own reader
            assert opened.metadata() == {"format": "pt"}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 12_000
        assert all(record["weight_map"][key] == file for key in tensors)
        held |= tensors
    assert held.keys() == state.keys() and all(torch.equal(held[key], state[key]) for key in state)
    with torch.device("meta"):
        empty = deep()
    for path, build in ((tmp_path / "vit.safetensors", deep()), (index, empty)):
        again = load(path, build)
        with torch.no_grad():
            assert torch.equal(again(X), model(X))
    assert load_plan(index) == load_plan(tmp_path / "vit.safetensors")


def test_one_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    model, _ = packed()
    save(model, tmp_path / "vit.safetensors", max_shard_size=1)
    files = [name for name in names(tmp_path) if not name.endswith(".json")]
    assert len(files) == len(model.state_dict())
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "vit.safetensors", deep())(X), model(X))


def test_a_small_model_is_one_file(tmp_path):
    model, _ = packed()
    save(model, tmp_path / "vit.safetensors", max_shard_size="5GB")
    assert names(tmp_path) == ["vit.safetensors"]


def test_saving_again_replaces_whatever_was_there(tmp_path):
    path = tmp_path / "vit.safetensors"
    sizes = ["12KB", "20KB", None, "12KB", "12KB", None]
    for seed, size in enumerate(sizes):
        model, _ = packed(seed=seed)
        save(model, path, max_shard_size=size)
        with torch.no_grad():
            assert torch.equal(load(path, deep())(X), model(X))
        left = names(tmp_path)
        if size is None:
            assert left == ["vit.safetensors"]
        else:
            index = json.loads((tmp_path / "vit.safetensors.index.json").read_text())
            assert left == sorted({"vit.safetensors.index.json", *index["weight_map"].values()})


@pytest.mark.parametrize("before", [None, "12KB"])
@pytest.mark.parametrize("after", [None, "12KB", "20KB"])
def test_a_crash_at_any_rename_leaves_a_whole_model(before, after, tmp_path, monkeypatch):
    """Whatever was written when the process dies, the old model or the new one is there, never a mixture."""
    old, new = packed(seed=1)[0], packed(seed=2)[0]
    path = tmp_path / "vit.safetensors"
    real = {name: getattr(Path, name) for name in ("replace", "unlink")}

    class Killed(BaseException):
        pass

    for steps in range(40):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        save(old, path, max_shard_size=before)
        left = steps
        dead = False

        def counted(name):
            def call(self, *args, **kwargs):
                nonlocal left, dead
                if dead or left == 0:  # a dead process tidies nothing up
                    dead = True
                    raise Killed
                left -= 1
                return real[name](self, *args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, counted(name))
            try:
                save(new, path, max_shard_size=after)
                finished = True
            except Killed:
                finished = False
        again = load(path, deep())
        with torch.no_grad():
            y = again(X)
            assert torch.equal(y, new(X)) or (not finished and torch.equal(y, old(X)))
        if finished:
            break
    assert finished and steps >= (1 if after is None else 3)


@pytest.mark.usefixtures("sharded")
def test_a_full_disk_leaves_the_old_shards_and_nothing_else(tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other, _ = packed(seed=9)
    for allowed in range(5):
        calls = []

        def fail(path, calls=calls, allowed=allowed):
            calls.append(path)
            if len(calls) > allowed:
                raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr("rmtkern.storage._sync", fail)
            with pytest.raises(OSError, match="disk full"):
                save(other, tmp_path / "vit.safetensors", max_shard_size="12KB")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def refused(index, message):
    model = deep()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"vit\.safetensors\.index\.json: .*{message}"):
        load(index, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(type(module) in (nn.Sequential, nn.Linear, nn.LayerNorm) for module in model.modules())


HOSTILE = [
    "../vit.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "..", "",
    "x\0.safetensors", "x\n.safetensors", "config.json", "x" * 300 + ".safetensors", "\ud800.safetensors", 7, None,
    ["a.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_shard_names_that_lead_elsewhere_are_refused(name, sharded):
    _, index, record, _ = sharded
    key = next(iter(record["weight_map"]))
    record["weight_map"][key] = name
    index.write_text(json.dumps(record))
    refused(index, rf"tensor '{key}' lies in .* no plain name of a \.safetensors")


def test_an_old_index_never_deletes_what_is_not_ours(sharded, tmp_path):
    model, index, record, _ = sharded
    others = ["other.safetensors", "other-00001-of-00002.safetensors", "vit-large-00001-of-00002.safetensors"]
    precious = [*(tmp_path / name for name in others), tmp_path.parent / "up"]
    for path in precious:
        path.write_bytes(b"precious")
    keys = list(record["weight_map"])
    for key, name in zip(keys, others, strict=False):
        record["weight_map"][key] = name
    index.write_text(json.dumps(record))
    save(model, tmp_path / "vit.safetensors")
    record["weight_map"][keys[0]] = "../up"
    index.write_text(json.dumps(record))
    save(model, tmp_path / "vit.safetensors")
    assert all(path.read_bytes() == b"precious" for path in precious)


def test_missing_extra_and_doubled_shards_are_named(sharded, tmp_path):
    _, index, record, files = sharded
    text = index.read_text()
    places = record["weight_map"]
    first, second = (load_file(tmp_path / file) for file in files[:2])
    key, other = next(iter(first)), next(iter(second))

    def restore():
        index.write_text(text)
        save_file(first, tmp_path / files[0], {"format": "pt"})
        save_file(second, tmp_path / files[1], {"format": "pt"})

    (tmp_path / files[1]).unlink()
    refused(index, rf"shard {files[1]} is missing, with \d+ tensors \('")
    (tmp_path / files[1]).mkdir()
    refused(index, f"shard {files[1]} is missing")
    (tmp_path / files[1]).rmdir()
    restore()

    save_file({**second, key: first[key]}, tmp_path / files[1])
    refused(index, f"tensor '{key}' stands in two shards, {files[0]} and {files[1]}")
    restore()
    save_file({**second, "more": torch.ones(1)}, tmp_path / files[1])
    refused(index, f"shard {files[1]} holds the tensor 'more', but the index names it nowhere")
    restore()
    save_file({name: tensor for name, tensor in second.items() if name != other}, tmp_path / files[1])
    refused(index, f"shard {files[1]} lacks the tensor '{other}'")
    restore()

    index.write_text(json.dumps({**record, "weight_map": {**places, key: files[1]}}))
    refused(index, f"shard {files[0]} holds the tensor '{key}', but the index says that {files[1]} does")
    fewer = {name: file for name, file in places.items() if file != files[1]}
    index.write_text(json.dumps({**record, "weight_map": fewer}))
    refused(index, f"it places no tensor in shard {files[1]}")
    index.write_text(json.dumps({**record, "weight_map": {**places, "more": files[0]}}))
    refused(index, f"shard {files[0]} lacks the tensor 'more'")
    index.write_text(text.replace(f'"{other}":', f'"{key}":', 1))
    refused(index, f"the key '{key}' stands there twice")
    restore()
    assert load(index, deep()) is not None


def test_a_shard_of_another_save_and_a_damaged_one_are_named(sharded, tmp_path):
    _, index, record, files = sharded
    whole = (tmp_path / files[1]).read_bytes()
    tensors = load_file(tmp_path / files[1])
    key = next(name for name in tensors if name.endswith("values"))
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / files[1])
    refused(index, f"{key} differs from its checksum in {files[1]}; copy the file again")
    (tmp_path / files[1]).write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=rf"{files[1]}: not a complete safetensors file: tensor '.*' ends 1 bytes after"
    ):
        load(index, deep())
    for change, message in (
        ({"weight_map": {}}, r"weight_map: expected the file of each tensor, got \{\}"),
        ({"weight_map": None}, "weight_map: expected the file of each tensor, got None"),
        ({"metadata": 3}, "it is not an object with metadata and weight_map"),
        ({"metadata": {}}, "it has no rmtkern metadata"),
        ({"metadata": {**record["metadata"], "rmtkern.crc32": "0"}}, "its metadata differs from its checksum"),
    ):
        index.write_text(json.dumps({**record, **change}))
        refused(index, message)
    for text in ("", "{", "[]", "[" * 100_000, '{"weight_map": 1e400}'):
        index.write_text(text)
        refused(index, "")


def test_a_name_that_no_reader_would_take_is_not_written(tmp_path):
    model, _ = packed()
    with pytest.raises(ValueError, match=r"lies in .* no plain name of a \.safetensors file"):
        save(model, tmp_path / "a\\b.safetensors", max_shard_size=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [(1, 1), ("5GB", 5 * 10**9), ("1.5 MiB", 1_572_864), ("20kb", 20_000), ("2TB", 2 * 10**12), (7 * 10**9, 7 * 10**9)],
)
def test_sizes(size, nbytes):
    assert shards.as_bytes(size) == nbytes


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "5 gigabytes", "1e9B", "", 0, -3, "0KB"])
def test_bad_sizes(size, tmp_path):
    with pytest.raises(ValueError, match=r"max_shard_size: expected (bytes or a text such as '5GB'|at least one byte)"):
        save(packed()[0], tmp_path / "vit.safetensors", max_shard_size=size)
    assert names(tmp_path) == []


def test_sizes_of_the_wrong_type(tmp_path):
    for size in (1.5, True, [5]):
        with pytest.raises(TypeError, match="max_shard_size: expected bytes or a text such as '5GB', got "):
            save(packed()[0], tmp_path / "vit.safetensors", max_shard_size=size)


def vit():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64)
    return ViTModel(config).eval()


@pytest.mark.parametrize("size", [None, "50KB"])
def test_a_folder_as_transformers_lays_it_out(size, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    model, plan = packed(vit, images)
    folder = tmp_path / "new" / "vit-0.7"
    save(model, folder, plan, max_shard_size=size)
    weights = {"model.safetensors"} if size is None else {"model.safetensors.index.json"}
    assert {"config.json", *weights} <= set(names(folder))
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ViTConfig and config.architectures == ["ViTModel"] and config.hidden_size == 64
    assert model.config.architectures is None  # the model's own config is as it was
    with torch.device("meta"):
        empty = AutoModel.from_config(config)
    again = load(folder, empty if not dict(empty.named_buffers()) else AutoModel.from_config(config))
    with torch.no_grad():
        assert torch.equal(again(images)[0], model(images)[0])
    assert load_plan(folder) == plan
    for loaded in (ViTModel, AutoModel):  # it would find no weight of the packed layers and draw random ones
        with pytest.raises(ValueError, match=r"packed by rmtkern, load with rmtkern\.load_pretrained\(folder\)"):
            loaded.from_pretrained(folder)
    unpack_(again)
    again.save_pretrained(tmp_path / "plain")
    plain = AutoModel.from_pretrained(tmp_path / "plain").eval()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    if size is not None:
        again.save_pretrained(tmp_path / "theirs", max_shard_size=size)
        ours, theirs = (
            json.loads((path / "model.safetensors.index.json").read_text()) for path in (folder, tmp_path / "theirs")
        )
        assert ours.keys() == theirs.keys() and {"total_size", "format"} <= ours["metadata"].keys()


def test_sharded_dense_checkpoints_are_read(tmp_path):
    model = deep()
    shards.write(model.state_dict(), tmp_path / "model.safetensors", {}, 20_000)
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"):
        again = load_model(f"{__name__}:other", checkpoint=path)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def other():
    model = deep()
    nn.init.zeros_(model[0].weight)
    return model


def test_a_folder_of_another_model_has_no_config(tmp_path):
    model, _ = packed()
    save(model, tmp_path / "net")
    assert names(tmp_path / "net") == ["model.safetensors"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "net", deep())(X), model(X))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file: is a file; give a name that ends in \.safetensors, or a folder"):
        save(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no model\.safetensors and no model\.safetensors\.index\.json in it"):
        load(tmp_path / "empty", deep())


def share_in(path, model):
    """What part of a model's bytes lies in the memory that a file is mapped to."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    tensors = model.state_dict().values()
    inside = [tensor for tensor in tensors if any(begin <= tensor.data_ptr() < end for begin, end in spans)]
    return sum(tensor.nbytes for tensor in inside) / sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [None, "100KB"])
def test_a_mapped_model_stays_in_the_file(size, dtype, tmp_path):
    def net():
        return nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 255)).to(dtype).eval()

    model, path, x = net(), tmp_path / "net.safetensors", torch.randn(4, 256).to(dtype)
    for i in (0, 2):
        weight = LAYOUTS["bitmask"].pack(random_sparse(*model[i].weight.shape, 0.5).to(dtype))
        model[i] = PackedLinear(weight, model[i].bias)
    save(model, path, max_shard_size=size)
    mapped = load(path, net())
    files = [name for name in tmp_path.iterdir() if name.suffix == ".safetensors"]
    assert (len(files) > 1) == (size is not None)
    assert sum(share_in(file, mapped) for file in files) > 0.9
    copied = load(path, net(), mmap=False)
    assert sum(share_in(file, copied) for file in files) == 0
    save(mapped, path)  # onto the very file that it lies in
    for again in (mapped, copied, load(path, net())):
        assert torch.equal(again(x), model(x))


def test_tensors_of_whole_cache_lines_begin_at_one(tmp_path):
    state = {
        "odd": torch.ones(3, dtype=torch.uint8), "long": torch.arange(5), "none": torch.ones(0, 4),
        "line": torch.ones(16), "half": torch.ones(7, dtype=torch.bfloat16), "bool": torch.tensor([True, False]),
        "wide": torch.ones(4, 64, dtype=torch.int64), "scalar": torch.tensor(2.5),
        "f8": torch.ones(64).to(torch.float8_e5m2),
        "complex": torch.ones(8, dtype=torch.complex64), "transposed": torch.arange(12.0).view(3, 4).T,
    }  # fmt: skip
    path = tmp_path / "t.safetensors"
    storage.write_tensors(state, path, {"note": "ü"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    for again in (load_file(path), storage.read_tensors(path), storage.read_tensors(path, mmap=False)):
        assert again.keys() == state.keys()
        for name, tensor in state.items():
            assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
            got, want = (t.contiguous().reshape(-1).view(torch.uint8) for t in (again[name], tensor))
            assert torch.equal(got, want)
    for name, tensor in storage.read_tensors(path).items():
        assert tensor.numel() == 0 or tensor.nbytes % 64 or tensor.data_ptr() % 64 == 0, name
    with pytest.raises(ValueError, match=r"tensor x has dtype torch\.complex128, which safetensors does not hold"):
        storage.write_tensors({"x": torch.ones(1, dtype=torch.complex128)}, path, {})


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "tensor 'a': F32 [3] has 12 bytes, not 8": {"a": entry(shape=(3,))},
    "tensor 'a' ends 8 bytes after the end": {"a": entry(shape=(4,), end=16)},
    "tensor 'a': unknown dtype 'F33'": {"a": entry("F33")},
    "tensor 'a': unknown dtype ['F32']": {"a": entry(["F32"])},
    "tensor 'a': expected a shape of integers >= 0, got [-2]": {"a": entry(shape=(-2,))},
    "tensor 'a': expected a shape of integers >= 0, got [True": {"a": entry(shape=(True, 2))},
    "tensor 'b': expected a shape": {"a": entry(), "b": entry(shape=[1] * 65, begin=8)},
    "has 147573952589676412928 bytes, not 8": {"a": entry(shape=(2**65,))},
    "tensor 'a': expected two data_offsets": {"a": {**entry(), "data_offsets": [0, 8, 9]}},
    "tensor 'a': expected two data_offsets >= 0, got [-8, 0]": {"a": {**entry(), "data_offsets": [-8, 0]}},
    "tensor 'a': expected dtype, shape and data_offsets": {"a": {"dtype": "F32"}},
    "tensor 'a': expected dtype, shape and data_offsets, got 3": {"a": 3},
    "tensor 'b' overlaps the one before": {"a": entry(), "b": entry(shape=(1,), begin=4)},
    "tensor 'b' begins 4 bytes after the one before": {"a": entry(shape=(0,), end=0), "b": entry(shape=(1,), begin=4)},
    "8 bytes at its end belong to no tensor": {},
    "its metadata is not a table of texts": {"__metadata__": {"a": 1}, "a": entry()},
    "its metadata is not a table": {"__metadata__": [], "a": entry()},
}  # fmt: skip


@pytest.mark.parametrize("message", HEADERS)
def test_headers_that_lie_are_refused_by_tensor(message, tmp_path):
    path = tmp_path / "x.safetensors"
    text = json.dumps(HEADERS[message]).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    for read in (storage.read_tensors, storage.read_metadata):
        with pytest.raises(ValueError) as error:
            read(path)
        assert f"{path}: not a complete safetensors file: " in str(error.value) and message in str(error.value)


def test_a_tensor_or_a_text_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    one = json.dumps(entry())
    twice = one.replace(", ", ', "shape": [2], ', 1)
    texts = {
        "a": f'{{"a": {one}, "a": {one.replace("F32", "I32")}}}',
        "rmtkern": f'{{"__metadata__": {{"rmtkern": "x", "rmtkern": "y"}}, "a": {one}}}',
        "shape": f'{{"a": {twice}}}',
    }
    for key, header in texts.items():
        text = header.encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        with pytest.raises(ValueError, match=rf"x\.safetensors: .*the key '{key}' stands there twice"):
            storage.read_tensors(path)
