"""The extension: its instruction sets, what its boundary refuses, and that no wide register leaves its region."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rmtkern import _C
from rmtkern.layouts import cpu
from rmtkern.layouts.bitmask import BitmaskWeight

ROOT = Path(__file__).resolve().parents[1]


def call(**changes):
    packed = BitmaskWeight.pack(torch.eye(5, 70))
    arguments = {
        "layout": "bitmask",
        "x": np.ones((3, 70), np.float32),
        "parts": [part.numpy() for part in packed.tensors()],
        "params": [],
        "bias": None,
        "scale": None,
        "residual": None,
        "y": np.empty((3, 5), np.float32),
        "activation": None,
        "threads": 1,
        "isa": None,
    }
    arguments.update(changes)
    _C.linear(**arguments)
    return arguments["y"]


def call_mlp(**changes):
    packed = BitmaskWeight.pack(torch.eye(5, 70)), BitmaskWeight.pack(torch.eye(3, 5))
    arguments = {
        "layouts": ("bitmask", "bitmask"),
        "x": np.ones((4, 70), np.float32),
        "hidden": 5,
        "parts": tuple([part.numpy() for part in weight.tensors()] for weight in packed),
        "params": ([], []),
        "biases": (None, None),
        "scale": None,
        "residual": None,
        "y": np.empty((4, 3), np.float32),
        "activation": None,
        "threads": 1,
        **changes,
    }
    _C.mlp(**arguments)
    return arguments["y"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layouts": ("bitmask", "csr")}, ValueError, "no CPU kernel for layout 'csr'"),
        ({"hidden": 6}, ValueError, r"part 'masks' must have shape \(12\) for a weight of \(6, 70\)"),
        ({"hidden": 0}, ValueError, "a weight needs N, K >= 1"),
        ({"biases": (np.ones(4, np.float32), None)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"biases": (None, np.ones(4, np.float32))}, ValueError, r"bias must have shape \(3,\), got \(4,\)"),
        ({"y": np.empty((5, 3), np.float32)}, ValueError, r"y must have shape \(4, 3\), got \(5, 3\)"),
        ({"residual": np.empty((4, 5), np.float32)}, ValueError, r"residual must have shape \(4, 3\)"),
        ({"threads": 0}, ValueError, "threads must be >= 1, got 0"),
        ({"isa": "sse9"}, ValueError, "unknown instruction set 'sse9'"),
        ({"norm": (np.ones(9, np.float32), None, 0.0)}, ValueError, r"the norm's weight must have shape \(70,\)"),
        ({"norm": (None, np.ones(70), 0.0)}, TypeError, "the norm's bias .*float64"),
    ],
)
def test_an_mlp_that_does_not_fit_is_refused(changes, error, message):
    assert (call_mlp() == 1).all()
    assert call_mlp(x=np.ones((0, 70), np.float32), y=np.empty((0, 3), np.float32)).shape == (0, 3)
    with pytest.raises(error, match=message):
        call_mlp(**changes)


def parts(**changes):
    packed = BitmaskWeight.pack(torch.eye(5, 70))
    return [changes.get(name, getattr(packed, name).numpy()) for name in BitmaskWeight.parts]


def test_isas_are_listed_best_first():
    known = ["avx512_bf16", "avx512", "avx2", "portable"]
    assert _C.isas() == [name for name in known if name in _C.isas()]
    assert _C.isas()[-1] == "portable"
    assert cpu.isas() == _C.isas()


def test_isa_follows_argument_then_environment(monkeypatch):
    monkeypatch.setenv("RMTKERN_ISA", "mmx")
    with pytest.raises(ValueError, match=r"unknown instruction set 'mmx'; this CPU runs: .*portable"):
        call()
    assert (call(isa="portable") == 1).all()
    monkeypatch.setenv("RMTKERN_ISA", "")
    assert (call() == 1).all()
    with pytest.raises(ValueError, match=r"unknown instruction set 'sse9'"):
        call(isa="sse9")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"layout": "csr"},
            ValueError,
            r"no CPU kernel for layout 'csr'; layouts with one: bitmask, block, nofm, dense, lowrank, spectral",
        ),
        ({"x": np.ones((3, 70))}, TypeError, r"x has dtype float64; no kernel takes it"),
        ({"x": np.ones((3, 70), np.int32)}, TypeError, r"x must be float32 or bfloat16 \(as uint16\), got int32"),
        ({"x": np.ones((3, 140), np.float32)[:, ::2]}, TypeError, r"x is not C-contiguous; call .contiguous\(\) first"),
        ({"x": np.ones((70, 3), np.float32).T}, TypeError, r"x is not C-contiguous"),
        ({"x": np.ones(70, np.float32)}, ValueError, r"x must have shape \(T, K\), got \(70,\)"),
        ({"x": np.ones((1, 1, 70), np.float32)}, ValueError, r"x must have 1 or 2 dimensions, got shape \(1, 1, 70\)"),
        ({"x": np.ones((3, 200), np.float32)}, ValueError, r"part 'masks' must have shape \(20\) for a weight of"),
        ({"x": np.ones((3, 0), np.float32)}, ValueError, r"a weight needs N, K >= 1"),
        ({"y": np.empty(5, np.float32)}, ValueError, r"y must have shape \(T, N\), got \(5,\)"),
        ({"y": np.empty((2, 5), np.float32)}, ValueError, r"y must have shape \(3, 5\), got \(2, 5\)"),
        ({"bias": np.ones(4, np.float32)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"bias": np.ones(5)}, TypeError, r"bias has dtype float64"),
        ({"residual": np.ones((5, 3), np.float32)}, ValueError, r"residual must have shape \(3, 5\), got \(5, 3\)"),
        ({"activation": "tanh"}, ValueError, r"unknown activation 'tanh'; valid: None, gelu, gelu_tanh, relu, silu"),
        ({"threads": 0}, ValueError, r"threads must be >= 1, got 0"),
        ({"parts": parts()[:3]}, ValueError, r"part 'starts' is missing: got 3 parts"),
        ({"parts": []}, ValueError, r"part 'values' is missing: got 0 parts"),
        ({"parts": parts() * 2}, ValueError, r"too many parts or params: got 8 and 0"),
        ({"params": [1] * 5}, ValueError, r"too many parts or params: got 4 and 5"),
        ({"parts": parts(masks=np.zeros(10, np.int32))}, TypeError, r"part 'masks' must be int64, got int32"),
        ({"parts": parts(rows=np.zeros(9, np.uint8))}, ValueError, r"part 'rows' must have shape \(10\)"),
        ({"parts": parts(starts=np.zeros((3, 1), np.int64))}, ValueError, r"part 'starts' must have shape \(3\)"),
        ({"parts": parts(values=np.ones(4, np.float32))}, ValueError, r"masks, rows, starts and values disagree"),
    ],
)
def test_boundary_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_boundary_never_copies():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(x=[[1.0] * 70] * 3)
    frozen = np.zeros((3, 5), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        call(y=frozen)


def test_no_tokens_is_no_work():
    assert call(x=np.empty((0, 70), np.float32), y=np.empty((0, 5), np.float32)).shape == (0, 5)


def test_residual_may_be_the_output():
    y = np.full((3, 5), 2, np.float32)
    assert (call(y=y, residual=y) == 3).all()


def test_reason_when_the_extension_is_missing(tmp_path):
    """In a process where the import fails: the layouts still import, and say how to get the kernels."""
    code = (
        "import sys; sys.modules['rmtkern._C'] = None\n"
        "import torch\n"
        "from rmtkern.layouts import cpu\n"
        "from rmtkern.layouts.bitmask import BitmaskWeight, reference\n"
        "w = BitmaskWeight.pack(torch.eye(3)); x = torch.ones(1, 3)\n"
        "print(cpu.isas(), cpu.supports(w, x), reference.linear(x, w, None, None, None).tolist())\n"
        "try:\n    cpu.linear(x, w, None, None, None)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[\] the extension rmtkern._C is not there \(.*\); install a C\+\+17 compiler", done.stdout)
    assert "[[1.0, 1.0, 1.0]]" in done.stdout
    assert "KernelUnavailable the extension rmtkern._C is not there" in done.stdout


def test_wide_registers_stay_in_their_region():
    """Only rk::avx512 and rk::avx512_bf16 touch zmm registers, only those and rk::avx2 touch ymm: nothing leaks."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump (binutils) is not installed")
    listing = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    found, leaks, symbol = set(), set(), ""
    for line in listing.stdout.splitlines():
        header = re.match(r"^[0-9a-f]+ <(.*)>:$", line)
        if header:
            symbol = header.group(1)
            continue
        for register, owners in (
            ("%zmm", ("rk::avx512::", "rk::avx512_bf16::")),
            ("%ymm", ("rk::avx512::", "rk::avx512_bf16::", "rk::avx2::")),
        ):
            if register in line.split("<")[0]:
                found.add(register)
                if not any(owner in symbol for owner in owners):
                    leaks.add((symbol, register))
    assert leaks == set()
    assert found == {"%zmm", "%ymm"} or "avx512" not in _C.isas()
