"""The compile matrix' own rules: figures are read rightly, and what is bad is found."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rmtkern.layouts.gpu_configs import ARCHITECTURES, Config, architecture, candidates, choose, precision, shape_class

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def plain_kernel(x_ptr, w_ptr, y_ptr, T, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tiled product as Triton's matmul tutorial forms it: offsets modulo the sizes, a mask on K, no epilogue."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(T, BM), tl.cdiv(N, BN)
    first = pid // (8 * columns) * 8
    height = min(rows - first, 8)
    rm = ((first + (pid % (8 * columns)) % height) * BM + tl.arange(0, BM)) % T
    rn = ((pid % (8 * columns)) // height * BN + tl.arange(0, BN)) % N
    rk = tl.arange(0, BK)
    x_ptrs = x_ptr + rm[:, None] * K + rk[None, :]
    w_ptrs = w_ptr + rn[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        x = tl.load(x_ptrs, mask=rk[None, :] < K - k * BK, other=0.0)
        w = tl.load(w_ptrs, mask=rk[:, None] < K - k * BK, other=0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BK
        w_ptrs += BK
    tl.store(y_ptr + rm[:, None] * N + rn[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def greedy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Holds more numbers than a thread has registers."""
    i = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    b = tl.cumsum(a, 0)
    tl.store(y_ptr + i, b * a + tl.flip(a, 0) * b)


def test_occupancy():
    from tests.gpu.compiler import blocks_per_multiprocessor

    # by the CUDA occupancy rules, worked by hand: (65536 / 4 / (32 * 128 = 4096)) * 4 / 8 warps = 2
    assert blocks_per_multiprocessor("sm_80", 128, 0, 8) == 2
    assert blocks_per_multiprocessor("sm_80", 129, 0, 8) == 1  # 32 * 129 becomes 4352: 3 warps in each of 4 files
    assert blocks_per_multiprocessor("sm_80", 32, 65536, 4) == 2  # (167936 / (65536 + 1024)) of shared memory
    assert blocks_per_multiprocessor("sm_90", 32, 65536, 4) == 3
    assert blocks_per_multiprocessor("sm_86", 32, 101376, 4) == 1
    assert blocks_per_multiprocessor("sm_86", 32, 101377, 4) == 0  # more than a block may have
    assert blocks_per_multiprocessor("sm_86", 16, 0, 1) == 16
    assert blocks_per_multiprocessor("sm_89", 16, 0, 1) == 24


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""


def test_reading_machine_code():
    from tests.gpu.compiler import hot_loop, mnemonics

    assert mnemonics(SASS) == ["MOV", "BRA", "LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "BRA", "EXIT"]
    assert hot_loop(SASS) == ["LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "BRA"]
    assert hot_loop("/*0000*/ EXIT ;") == []


def test_rules_and_ratchet_find_what_is_bad():
    from tests.gpu.compiler import Figures
    from tests.gpu.matrix import Case, regressions, violations

    case = Case("dense", "bf16", "sm_90", Config(128, 128, 64, 8, 3), True)
    good = Figures(128, 0, 65536, 2, 100, 900, {"tensor": 4, "HGMMA": 4, "LDGSTS": 8}, "")
    assert violations(case, good) == []
    assert violations(case, replace(good, spilled=8)) == ["8 bytes spilled, 0 local memory instructions"]
    assert "do not fit" in violations(case, replace(good, blocks=0))[0]
    assert violations(case, replace(good, kinds={"tensor": 4})) == ["no LDGSTS instruction", "no HGMMA instruction"]
    assert violations(case, replace(good, loop=0)) == ["no loop found in the machine code"]
    old = {"registers": 100, "shared": 1000, "loop": 100, "instructions": 1000, "blocks": 2}
    assert regressions({**old, "registers": 105, "instructions": 1100}, old) == []
    worse = {"registers": 106, "shared": 1001, "loop": 106, "instructions": 1101, "blocks": 1}
    assert regressions(worse, old) == [f"{key} {old[key]} -> {value}" for key, value in worse.items()]


def test_the_baseline_has_every_case():
    from tests.gpu.matrix import BASELINE, cases

    assert set(json.loads(BASELINE.read_text())["kernels"]) == {case.name for case in cases()}


def test_configs():
    assert [shape_class(t) for t in (1, 16, 17, 512, 513, 10**6)] == ["row", "row", "image", "image", "batch", "batch"]
    for layout in ("dense", "bitmask", "spectral"):
        for arch in ARCHITECTURES:
            for itemsize in (2, 4):
                for tokens in (1, 197, 10**5):
                    for aligned in (True, False):
                        chosen = choose(layout, itemsize, arch, tokens, aligned)
                        assert chosen in candidates(layout, itemsize, arch, aligned)
                        assert min(chosen.bm, chosen.bn, chosen.bk) >= 16  # the least that tl.dot takes
    assert architecture("cuda", 87) == "sm_86" and architecture("cuda", 75) is None
    assert architecture("cuda", 103) == "sm_100" and architecture("cuda", 121) == "sm_120"
    assert architecture("hip", "gfx942:sramecc+:xnack-") == "gfx942" and architecture("hip", "gfx1100") is None
    assert precision(4, "sm_80") == "tf32x3" and precision(4, "gfx942") == precision(2, "sm_80") == "ieee"


@pytest.mark.compiled
def test_a_kernel_that_spills_is_seen():
    from tests.gpu.compiler import compile_kernel, figures

    kernel = compile_kernel(
        greedy_kernel, "sm_80", {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 8192}, warps=1, stages=1
    )
    found = figures(kernel, "sm_80")
    assert found.spilled > 0 and found.kinds["local"] > 0


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_loop_of_dense_is_within_10_percent_of_the_tutorials(arch):
    from tests.gpu.compiler import compile_kernel, figures
    from tests.gpu.matrix import Case, compile_case

    config = choose("dense", 2, arch, 1000)
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*bf16")
    types = {**pointers, **dict.fromkeys(("T", "N", "K"), "i32")}
    tile = {"BM": config.bm, "BN": config.bn, "BK": config.bk}
    aligned = [*pointers, "N", "K"]
    plain = compile_kernel(plain_kernel, arch, types, tile, aligned, warps=config.warps, stages=config.stages)
    ours = compile_case(Case("dense", "bf16", arch, config, True))
    assert figures(ours, arch).loop <= 1.1 * figures(plain, arch).loop


@pytest.mark.compiled
@pytest.mark.parametrize(("layout", "arch"), [("dense", 80), ("dense", 90), ("bitmask", 80)])
def test_the_real_wrappers_launch_what_the_tables_say(layout, arch, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.stub_driver", str(arch), layout],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    launches = json.loads(done.stdout)["launches"]
    assert {launch["name"] for launch in launches} == {"product_kernel" if layout == "dense" else "strips_kernel"}
    tables = {itemsize: [choose(layout, itemsize, f"sm_{arch}", t) for t in (300, 5)] for itemsize in (2, 4)}

    def launch_of(config, tokens):
        return [-(-tokens // config.bm) * -(-80 // config.bn), 1, 1], config.warps

    found = [(launch["grid"], launch["warps"]) for launch in launches]
    expected = [launch_of(config, t) for row in tables.values() for config, t in zip(row, (300, 5), strict=True)]
    gated = [found.pop(5), found.pop(2)]  # the grid counts rows of the pair, not outputs
    assert gated[::-1] == [expected[0], expected[2]]
    assert found[:4] == expected
    # autotuning tries every tile of the table
    tuned = {(tuple(grid), warps) for grid, warps in found[4:]}
    assert tuned >= {(tuple(launch_of(c, 300)[0]), c.warps) for c in candidates(layout, 4, f"sm_{arch}")}
