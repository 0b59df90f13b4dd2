"""Files that earlier versions wrote load forever: every layout in both dtypes, bit for bit.

python -m tests.test_kept_files 0.1.0    # writes tests/kept/<version>.*, once for each format; never again
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rmtkern import load, save, unpack_
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import PackedLinear

KEPT = Path(__file__).parent / "kept"
VERSIONS = [path.name.removesuffix(".packed.safetensors") for path in sorted(KEPT.glob("*.packed.safetensors"))]
ROWS, COLUMNS = 24, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def numbers(rows, columns):
    """Small numbers that every dtype holds exactly, none of them zero."""
    n, k = torch.arange(rows)[:, None], torch.arange(columns)
    return ((n * 7 + k * 13 + n * k) % 11 - 5.5) / 8


def weights(dtype):
    """One packed weight [24, 32] for each layout, and for each pattern of one that has kernels of its own."""
    dense = numbers(ROWS, COLUMNS).to(dtype)
    n, k = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    yield "bitmask", dense.where((n * 5 + k * 3) % 7 < 3, 0), {}
    blocks = [(2, 1), (4, 1), (8, 1)] if dtype == torch.float32 else [(1, 2), (4, 2)]
    for r, c in blocks:
        yield "block", dense.where((n // r * 5 + k // c * 3) % 7 < 3, 0), {"r": r, "c": c}
    yield "nofm", dense.where((k + n) % 4 < 2, 0), {"n": 2, "m": 4}
    yield "dense", dense, {}
    yield "lowrank", (numbers(ROWS, 3) @ numbers(3, COLUMNS)).to(dtype), {"rank": 3}


def packed(dtype):
    """A model of PackedLinear with all of them, and the spectral one, whose weight is given in parts."""
    found = [LAYOUTS[layout].pack(dense, **params) for layout, dense, params in weights(dtype)]
    sparse = numbers(ROWS, COLUMNS).to(dtype).where(torch.eye(ROWS, COLUMNS) > 0, 0)
    factors = numbers(ROWS, 2).to(dtype), numbers(2, COLUMNS).to(dtype)
    found.append(LAYOUTS["spectral"].from_parts(*factors, sparse))
    return nn.ModuleList(PackedLinear(weight, numbers(1, ROWS)[0].to(dtype)) for weight in found)


def models():
    return nn.ModuleDict({name: packed(dtype) for name, dtype in DTYPES.items()}).eval()


def empty():
    """The model before it was packed, with other weights."""
    return nn.ModuleDict(
        {
            name: nn.ModuleList(nn.Linear(COLUMNS, ROWS, dtype=dtype) for _ in packed(dtype))
            for name, dtype in DTYPES.items()
        }
    ).eval()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_an_earlier_version_loads_bit_for_bit(version):
    model = load(KEPT / f"{version}.packed.safetensors", empty())
    layouts = {module.weight.layout for module in model.modules() if isinstance(module, PackedLinear)}
    assert layouts == set(LAYOUTS)
    unpack_(model)
    dense = load_file(KEPT / f"{version}.dense.safetensors")
    state = model.state_dict()
    assert state.keys() == dense.keys()
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in dense.items())


def test_there_is_a_file_and_it_is_what_the_layouts_hold():
    assert "0.1.0" in VERSIONS
    dense = load_file(KEPT / "0.1.0.dense.safetensors")
    for name, dtype in DTYPES.items():
        for i, (layout, weight, _) in enumerate(weights(dtype)):
            if layout != "lowrank":  # whose weight is a product, of which it says itself what it keeps
                assert torch.equal(dense[f"{name}.{i}.weight"], weight)


if __name__ == "__main__":
    path = KEPT / f"{sys.argv[1]}.packed.safetensors"
    if path.exists():
        raise SystemExit(f"{path} is kept as it was written")
    KEPT.mkdir(exist_ok=True)
    model = models()
    save(model, path)
    unpack_(model)
    save_file(model.state_dict(), KEPT / f"{sys.argv[1]}.dense.safetensors")
