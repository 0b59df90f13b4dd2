"""Checkpoints of other pruning tools become plain dense ones: torch.nn.utils.prune, compressed-tensors' bitmasks."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from rmtkern import read_checkpoint, shards
from rmtkern.foreign import plain_state
from rmtkern.loading import load_model
from rmtkern.testing import random_sparse


def bitmask(name, dense, two_four=False):
    """The parts that compressed-tensors' documents say a weight has, entry by entry, as a reference."""
    rows = dense.reshape(-1, dense.shape[-1])
    n, k = rows.shape
    kept = rows != 0
    if two_four:  # exactly two of four, zeros among them if need be
        kept = torch.zeros_like(kept)
        for row in range(n):
            for group in range(0, k, 4):
                order = rows[row, group : group + 4].abs().argsort(descending=True, stable=True)[:2]
                kept[row, group + order] = True
    packed = np.zeros((n, (k + 7) // 8), np.uint8)
    values, offsets = [], []
    for row in range(n):
        offsets.append(len(values))
        for column in range(k):
            if kept[row, column]:
                packed[row, column // 8] += 1 << (column % 8)
                values.append(float(rows[row, column]))
    parts = {
        f"{name}.compressed": torch.tensor(values, dtype=dense.dtype),
        f"{name}.bitmask": torch.from_numpy(packed).reshape(*dense.shape[:-1], -1),
        f"{name}.shape": torch.tensor(dense.shape),
        f"{name}.row_offsets": torch.tensor(offsets),
    }
    if two_four:
        del parts[f"{name}.row_offsets"]
        parts[f"{name}.compressed"] = parts[f"{name}.compressed"].reshape(n, k // 2)
        parts[f"{name}.shape"] = parts[f"{name}.shape"].reshape(-1, 1)
    return parts


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(36, 21), nn.ReLU(), nn.Linear(21, 5)).eval()


def same(state, model):
    wanted = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("two_four", [True, False])
def test_bitmask_checkpoints(dtype, named, two_four, tmp_path):
    model = net().to(dtype)
    nofm = (2, 4) if two_four else None
    model[0].weight.data = random_sparse(21, 36, 0.6, nofm=nofm).to(dtype)
    state = model.state_dict()
    weight = state.pop("0.weight")
    state |= bitmask("0.weight" if named else "0", weight, two_four)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    same(read_checkpoint(path), model)
    (tmp_path / "s").mkdir()
    shards.write(state, tmp_path / "s" / "model.safetensors", {}, 500)
    assert len(list((tmp_path / "s").iterdir())) > 2
    same(read_checkpoint(tmp_path / "s"), model)
    loaded = load_model(f"{__name__}:net", checkpoint=path)
    assert torch.equal(loaded[0].weight, model[0].weight.float())


def test_bitmasks_of_other_shapes():
    for shape in ((3, 17), (4, 3, 5, 9), (1, 1), (2, 8), (7,)):
        dense = random_sparse(1, int(np.prod(shape)), 0.5).view(shape)
        state = plain_state(bitmask("conv", dense))
        assert list(state) == ["conv.weight"] and torch.equal(state["conv.weight"], dense)


def test_masks_of_torch_prune_are_baked_in(tmp_path):
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.7)
    prune.random_structured(model[2], "weight", 0.4, dim=1)
    prune.l1_unstructured(model[2], "bias", 0.4)
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    assert "0.weight_orig" in model.state_dict()
    state = read_checkpoint(tmp_path / "pruned.pt")
    for module, name in ((model[0], "weight"), (model[2], "weight"), (model[2], "bias")):
        prune.remove(module, name)
    same(state, model)
    again = load_model(f"{__name__}:net", checkpoint=tmp_path / "pruned.pt")
    same(again.state_dict(), model)
    nan = {"w_orig": torch.tensor([1.0, torch.nan, -torch.inf]), "w_mask": torch.tensor([1.0, 0.0, 0.0])}
    assert torch.equal(plain_state(nan)["w"], torch.tensor([1.0, 0.0, 0.0]))  # a product would be NaN


def test_what_only_looks_like_it_stays():
    state = {
        "a_orig": torch.ones(2), "attn_mask": torch.ones(2), "x.shape": torch.ones(1), "compressed": torch.ones(3),
        "y.compressed": torch.ones(2), "z.bitmask": torch.ones(1), "b_mask": torch.ones(2),
    }  # fmt: skip
    assert state.keys() == plain_state({k: v for k, v in state.items() if not k.startswith("y.")}).keys() | {
        "y.compressed"
    }
    assert plain_state({"y.compressed": torch.ones(2)}).keys() == {"y.compressed"}


DENSE = random_sparse(6, 20, 0.5)
DAMAGE = {
    "shape is missing": (lambda s: s.pop("fc.shape"), r"fc\.shape is missing beside fc\.compressed"),
    "bitmask is missing": (lambda s: s.pop("fc.bitmask"), r"fc\.bitmask is missing beside fc\.compressed"),
    "a value less": (lambda s: s.update({"fc.compressed": s["fc.compressed"][1:]}), r"fc: \d+ values .* do not fit"),
    "a bit more": (lambda s: s["fc.bitmask"].fill_(255), r"fc: \d+ values .* do not fit the 120 bits"),
    "offsets": (lambda s: s["fc.row_offsets"].add_(1), r"fc: \d+ values and their row offsets do not fit"),
    "fewer offsets": (lambda s: s.update({"fc.row_offsets": torch.zeros(1).long()}), "row offsets do not fit"),
    "bitmask dtype": (lambda s: s.update({"fc.bitmask": s["fc.bitmask"].long()}), r"a bitmask torch\.int64 \[6, 3\]"),
    "other shape": (lambda s: s["fc.shape"].copy_(torch.tensor([6, 30])), r"does not fit the shape \[6, 30\]"),
    "huge shape": (lambda s: s["fc.shape"].fill_(2**62), r"a bitmask .* does not fit the shape \[4611686018427387904,"),
    "negative shape": (lambda s: s["fc.shape"].fill_(-6), r"does not fit the shape \[-6, -6\]"),
    "empty shape": (lambda s: s.update({"fc.shape": torch.zeros(0).long()}), r"does not fit the shape \[\]"),
    "shape of floats": (lambda s: s.update({"fc.shape": torch.tensor([6.0, 20.0])}), "does not fit the shape"),
    "quantised": (
        lambda s: s.update({"fc.compressed": s["fc.compressed"].to(torch.float8_e4m3fn)}),
        r"fc\.compressed has dtype torch\.float8_e4m3fn: it is quantised too, .*; decompress it",
    ),
    "twice": (lambda s: s.update({"fc.weight": DENSE}), r"fc\.weight is there twice, pruned and plain"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_parts_that_do_not_fit_are_refused_by_name(name, tmp_path):
    change, message = DAMAGE[name]
    state = bitmask("fc", DENSE)
    change(state)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        read_checkpoint(path)


def test_masks_that_do_not_fit_are_refused_by_name():
    for mask in (torch.ones(3), torch.full((2, 3), 0.5), torch.full((2, 3), torch.nan)):
        with pytest.raises(
            ValueError, match=r"fc\.weight_mask: expected 0 and 1 in the shape \[2, 3\] of fc\.weight_orig"
        ):
            plain_state({"fc.weight_orig": torch.ones(2, 3), "fc.weight_mask": mask})
