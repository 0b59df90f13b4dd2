"""The interpreter's repairs and bounds checks do what they say, and a canary for the day they are not needed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, BOUND: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < BOUND, other=0.0).to(y_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def square_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def atomic_kernel(y_ptr, i):
    tl.atomic_add(y_ptr + i, 1.0)


CANARY = """
import torch, triton, triton.language as tl
@triton.jit
def square(x_ptr, y_ptr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x))
@triton.jit
def cast(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))
torch.manual_seed(0)
x, y = torch.randn(16, 16).bfloat16(), torch.zeros(16, 16)
square[(1,)](x, y)
wrong_dot = not torch.allclose(y, x.float() @ x.float(), rtol=1e-2, atol=1e-2)
x = torch.randn(16)
y = torch.zeros(16).bfloat16()
cast[(1,)](x, y)
print("dot", wrong_dot, "cast", not torch.equal(y, x.bfloat16()))
"""


@pytest.mark.interpreted
def test_canary_the_stock_interpreter_is_still_wrong_for_bfloat16(tmp_path):
    """If this fails, Triton has repaired its interpreter: drop the repairs of interpreter.py that it names."""
    script = tmp_path / "canary.py"
    script.write_text(CANARY)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dot", "True", "cast", "True"]


@pytest.mark.interpreted
def test_bfloat16_casts_round_to_nearest_even():
    x = torch.randn(64)
    x[0], x[1], x[2] = float("nan"), float("inf"), 1 + 2**-8  # a tie
    y = torch.zeros(64, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, y, 64, 64, 64)
    assert torch.equal(y.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:]) and y[0].isnan()


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("dtype", "precision", "least", "most"),
    [
        # relative to the largest output: float32 sums of exact products; TF32 drops 13 bits of 24, so about 2^-10
        (torch.bfloat16, "ieee", 0, 1e-6),
        (torch.float16, "ieee", 0, 1e-6),
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32x3", 1e-9, 2e-6),
        (torch.float32, "tf32", 1e-5, 2e-3),
    ],
)
def test_dot_has_the_error_of_the_hardware(dtype, precision, least, most):
    x = torch.randn(64, 64).to(dtype)
    y = torch.zeros(64, 64)
    square_kernel[(1,)](x, y, 64, precision)
    exact = x.double() @ x.double()
    error = float((y - exact).abs().max() / exact.abs().max())
    assert least <= error <= most


@pytest.mark.interpreted
def test_out_of_bounds_is_an_error():
    x, y = torch.randn(100)[:60], torch.zeros(60)  # the storage of x goes on, the view does not
    copy_kernel[(1,)](x, y, 60, 64, 60)
    assert torch.equal(x, y)
    with pytest.raises(
        Exception, match=r"load of 4 bytes out of bounds in 4 lanes; the first is \+240 bytes from a tens"
    ):
        copy_kernel[(1,)](x, y, 60, 64, 64)
    with pytest.raises(Exception, match=r"store of 4 bytes out of bounds in 4 lanes"):
        copy_kernel[(1,)](x, y, 64, 64, 60)
    atomic_kernel[(1,)](y, 59)
    with pytest.raises(Exception, match=r"atomic of 4 bytes out of bounds in 1 lanes"):
        atomic_kernel[(1,)](y, 60)


@pytest.mark.interpreted
def test_tf32_rounding():
    from tests.gpu.rounding import round_to_tf32, truncate_to_tf32

    x = np.array([1 + 2**-11, 1 + 2**-11 - 2**-23, -(1 + 2**-11), np.inf, np.nan], np.float32)
    # ties go away from zero; truncation drops everything below 2^-10
    assert np.array_equal(round_to_tf32(x)[:4], np.array([1 + 2**-10, 1, -(1 + 2**-10), np.inf], np.float32))
    assert np.array_equal(truncate_to_tf32(x)[:4], np.array([1, 1, -1, np.inf], np.float32))
    assert np.isnan(round_to_tf32(x)[4]) and np.isnan(truncate_to_tf32(x)[4])
