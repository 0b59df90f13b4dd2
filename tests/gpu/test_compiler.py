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
    """Holds more numbers than a thread has registers, if these are few."""
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
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x50 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   BRA.U !UP0, 0x0 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""
OPS = [
    "MOV", "BRA", "LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "BRA", "BRA.U", "EXIT", "BRA",
]  # fmt: skip


def test_reading_machine_code():
    from tests.gpu.compiler import hot_loop, read_code

    code = read_code(SASS)
    assert [op.name for op in code] == OPS and [op.address for op in code] == [16 * i for i in range(8)]
    assert [op.target for op in code if op.name.startswith("BRA")] == [0x50, 0x20, 0, 0x70]
    assert hot_loop(code) == OPS[2:5]  # the other one has a smaller share of products
    assert hot_loop(read_code("/*0000*/ EXIT ;\n/*0010*/ BRA 0x10;")) == []


@pytest.mark.compiled
def test_machine_codes_are_read_at_once_as_they_are_alone():
    from tests.gpu.compiler import compile_kernel, disassemble, machine_code

    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*fp16")
    types = {**pointers, **dict.fromkeys(("T", "N", "K"), "i32")}
    codes = []
    for bm in (16, 32):
        tile = {"BM": bm, "BN": 32, "BK": 32}
        kernel = compile_kernel(plain_kernel, "sm_90", types, tile, [*pointers, "N", "K"], warps=1, stages=2)
        codes.append(machine_code(kernel.asm["cubin"]))
    both = disassemble("sm_90", codes)
    assert both == [disassemble("sm_90", [code])[0] for code in codes] and both[0] != both[1]
    assert [len(ops) for ops in both] == [len(code) // 16 for code in codes]


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
    assert violations(replace(case, layout="descriptor"), good) == ["no UTMALDG instruction"]
    assert violations(replace(case, layout="epilogue"), replace(good, loop=0, kinds={})) == []
    old = {"registers": 100, "shared": 1000, "loop": 100, "instructions": 1000, "blocks": 2}
    assert regressions({**old, "registers": 105, "instructions": 1100}, old) == []
    worse = {"registers": 106, "shared": 1001, "loop": 106, "instructions": 1101, "blocks": 1}
    assert regressions(worse, old) == [f"{key} {old[key]} -> {value}" for key, value in worse.items()]


def test_the_baseline_has_every_case():
    from tests.gpu.matrix import BASELINE, cases

    assert set(json.loads(BASELINE.read_text())["kernels"]) == {case.name for case in cases()}


def test_configs():
    assert [shape_class(t) for t in (1, 16, 17, 512, 513, 10**6)] == ["row", "row", "image", "image", "batch", "batch"]
    for layout in ("dense", "bitmask", "spectral", "block", "nofm", "descriptor"):
        for arch in ARCHITECTURES:
            for itemsize in (2, 4):
                for tokens in (1, 197, 10**5):
                    for aligned in (True, False):
                        chosen = choose(layout, itemsize, arch, tokens, aligned)
                        assert chosen in candidates(layout, itemsize, arch, aligned)
                        assert min(chosen.bm, chosen.bn, chosen.bk) >= 16  # the least that tl.dot takes
    assert choose("block", 2, "sm_80", 1000, block=(32, 16)).label == "128x32x16-w4-s3"
    assert choose("block", 2, "sm_80", 1000, block=(128, 128)) == choose("block", 2, "sm_80", 1000)
    assert architecture("cuda", 87) == "sm_86" and architecture("cuda", 75) is None
    assert architecture("cuda", 103) == "sm_100" and architecture("cuda", 121) == "sm_120"
    assert architecture("hip", "gfx942:sramecc+:xnack-") == "gfx942" and architecture("hip", "gfx1100") is None
    assert precision(4, "sm_80") == "tf32x3" and precision(4, "gfx942") == precision(2, "sm_80") == "ieee"


@pytest.mark.compiled
def test_a_kernel_that_spills_is_seen():
    from tests.gpu.compiler import compile_kernel, figures

    types, block = {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 1024}
    kernel = compile_kernel(greedy_kernel, "sm_80", types, block, warps=1, stages=1, most_registers=32)
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
def test_descriptors_shorten_the_loop_of_dense():
    from tests.gpu.compiler import figures
    from tests.gpu.matrix import Case, compile_case

    config = choose("descriptor", 2, "sm_90", 1000)
    cases = [Case(layout, "bf16", "sm_90", config, True) for layout in ("descriptor", "dense")]
    ours, pointers = (figures(compile_case(case), "sm_90") for case in cases)
    assert ours.loop < pointers.loop and ours.kinds["UTMALDG"] and "LDGSTS" not in ours.kinds and not ours.spilled


@pytest.mark.compiled
def test_the_loop_of_blocks_is_no_longer_than_that_of_dense():
    from tests.gpu.compiler import figures
    from tests.gpu.matrix import Case, compile_case

    config = choose("block", 2, "sm_80", 1000)
    cases = [Case("block", "bf16", "sm_80", config, True, block=(64, 64)), Case("dense", "bf16", "sm_80", config, True)]
    blocks, dense = (figures(compile_case(case), "sm_80").loop for case in cases)
    assert blocks <= 1.1 * dense


# layout and its params -> (kernel, whose table of tiles, blocks of W)
WRAPPERS = {
    80: {
        "dense": ("product_kernel", "dense", None),
        "bitmask": ("strips_kernel", "bitmask", None),
        "block:r=16,c=128": ("blocks_kernel", "block", (16, 128)),
        "nofm:n=2,m=4": ("pairs_kernel", "nofm", None),
    },
    90: {"dense": ("descriptor_kernel", "descriptor", None)},
}


@pytest.mark.compiled
@pytest.mark.parametrize("arch", WRAPPERS)
def test_the_real_wrappers_launch_what_the_tables_say(arch, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.stub_driver", str(arch), *WRAPPERS[arch]],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    for layout, launches in json.loads(done.stdout)["launches"].items():
        check_launches(launches, arch, *WRAPPERS[arch][layout])


def check_launches(launches, arch, kernel, table, block):
    assert {launch["name"] for launch in launches} == {kernel}
    tables = {
        itemsize: [choose(table, itemsize, f"sm_{arch}", t, block=block) for t in (300, 5)] for itemsize in (2, 4)
    }

    def launch_of(config, tokens):
        return [-(-tokens // config.bm) * -(-80 // config.bn), 1, 1], config.warps

    found = [(launch["grid"], launch["warps"]) for launch in launches]
    expected = [launch_of(config, t) for row in tables.values() for config, t in zip(row, (300, 5), strict=True)]
    gated = [found.pop(5), found.pop(2)]  # the grid counts rows of the pair, not outputs
    assert gated[::-1] == [expected[0], expected[2]]
    assert found[:4] == expected
    # autotuning tries every tile of the table
    tuned = {(tuple(grid), warps) for grid, warps in found[4:]}
    assert tuned >= {(tuple(launch_of(c, 300)[0]), c.warps) for c in candidates(table, 4, f"sm_{arch}", block=block)}
