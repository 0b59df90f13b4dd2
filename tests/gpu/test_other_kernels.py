"""Kernels that are no layout's linear: what their compiled code and their wrappers do, without running them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rmtkern.layouts.gpu_configs import choose

pytest.importorskip("triton")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_live_threshold_doubles_the_loop(arch):
    """Why inference must not use it, as docs/gpu.md says; figures of the compile matrix for one tile."""
    from tests.gpu.matrix import BASELINE

    kernels = json.loads(BASELINE.read_text())["kernels"]
    tile = choose("masked", 2, arch, 1000)
    assert tile == choose("dense", 2, arch, 1000)
    assert kernels[f"masked/forward/bf16/{arch}"]["loop"] > 2 * kernels[f"dense/bf16/{tile.label}/{arch}"]["loop"]


@pytest.mark.compiled
def test_the_real_wrappers_launch_what_they_say(tmp_path):
    from rmtkern.spectrum.triton_sparsify import TILES

    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.stub_other", "80"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    found = json.loads(done.stdout)
    launched = {name: [(one["name"], one["grid"], one["warps"]) for one in ones] for name, ones in found.items()}

    def tiles(rows, columns, tile, layers=1):
        return [layers * -(-rows // tile.bm) * -(-columns // tile.bn), 1, 1], tile.warps

    digits = {"torch.float32": 3, "torch.bfloat16": 2}
    for n, k, dtype in ((304, 192, "torch.float32"), (192, 300, "torch.float32"), (192, 300, "torch.bfloat16")):
        tile, rows, select = TILES["recompose" if k == 192 else "ragged"], TILES["rows"], TILES["select"]
        recompose = ("recompose_kernel", *tiles(n, k, tile, layers=2))
        assert launched[f"threshold {n}x{k} {dtype}"] == [recompose]
        histogram = ("select_kernel", [-(-2 * n * k // (select.bn * select.bk)), 1, 1], select.warps)
        whole_rows = ("rows_kernel", [-(-2 * n // rows.bm), 1, 1], rows.warps)
        assert launched[f"zeros {n}x{k} {dtype}"] == [recompose, *[histogram] * digits[dtype], *[whole_rows] * 2]
    for itemsize, dtype in ((4, "torch.float32"), (2, "torch.bfloat16")):
        wide, ragged = (choose("masked", itemsize, "sm_80", 300, aligned) for aligned in (True, False))
        products = [
            ("input_gradient_kernel", *tiles(300, 64, wide)),
            ("weight_gradient_kernel", *tiles(80, 64, ragged)),
        ]
        for activation in ("None", "gelu"):
            assert launched[f"forward {activation} {dtype}"] == [("forward_kernel", *tiles(300, 80, wide))]
        assert launched[f"backward None {dtype}"] == products
        own = ("activation_gradient_kernel", [10, 1, 1], 4)
        assert launched[f"backward gelu {dtype}"] == [own, *products]
