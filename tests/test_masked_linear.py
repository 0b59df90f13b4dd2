"""masked_linear on the CPU: values and gradients against formulas in float64, PyTorch's contracts, and bad input."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from rmtkern.activations import FUNCTIONS
from rmtkern.errors import KernelUnavailable
from rmtkern.masked_linear import masked_linear
from rmtkern.testing import assert_as_accurate_as_dense

ACTIVATIONS = [None, *FUNCTIONS]


def problem(dtype=torch.float64, t=5, n=6, k=9):
    generator = torch.Generator().manual_seed(0)
    shapes = ((t, k), (n, k), (n,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(dtype, activation):
    x, w, bias = (t.detach() for t in problem(dtype, 40, 30, 50))
    kept = w * (w.abs().float() >= 0.7)
    assert 0.3 < float((kept == 0).float().mean()) < 0.7
    for b in (bias, None):
        y = masked_linear(x, w, 0.7, b, activation=activation)
        assert_as_accurate_as_dense(y, x, kept, b, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation):
    x, w, bias = problem()
    assert torch.autograd.gradcheck(
        lambda *t: masked_linear(t[0], t[1], 0.5, t[2], activation=activation), (x, w, bias)
    )
    assert torch.autograd.gradcheck(lambda *t: masked_linear(*t, 0.5, activation=activation), (x[0], w))


def test_the_gradient_of_a_pruned_entry_is_zero_and_of_a_kept_one_that_of_the_pruned_weight():
    x, w, bias = problem()
    masked_linear(x, w, 0.5, bias, activation="gelu").square().sum().backward()
    held = (w.detach() * (w.detach().abs() >= 0.5)).requires_grad_()
    again, b = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    F.gelu(F.linear(again, held, b)).square().sum().backward()
    expected = held.grad * (w.detach().abs() >= 0.5)
    for found, wanted in ((x.grad, again.grad), (w.grad, expected), (bias.grad, b.grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert bool((w.grad[w.detach().abs() < 0.5] == 0).all()) and bool((w.grad[w.detach().abs() >= 0.5] != 0).all())


def test_the_threshold_is_live():
    x, w, _ = (t.detach() for t in problem())
    threshold = torch.tensor(0.5, dtype=torch.float64)
    first = masked_linear(x, w, threshold)
    threshold.fill_(0.0)
    assert torch.equal(masked_linear(x, w, threshold), F.linear(x, w))  # nothing was lost
    assert not torch.equal(first, F.linear(x, w))
    at = w.abs().median()
    y = masked_linear(x, w, at)
    assert torch.equal(y, F.linear(x, torch.where(w.abs() >= at, w, 0)))  # an entry at the threshold stays
    w[w.abs() >= at] = 0
    assert bool((masked_linear(x, w, at) == 0).all())


def test_bfloat16_magnitudes_are_compared_in_float32():
    # 1 + 2^-10 rounds to 1 in bfloat16: compared there, the weight 1 would stay
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for threshold in (1 + 2**-10, torch.tensor(1 + 2**-10)):
        assert float(masked_linear(one, one, threshold)) == 0.0


def test_sparse_fine_tuning_learns_with_the_zeros_held():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 12, generator=generator)
    target = x @ torch.randn(12, 8, generator=generator)
    w = torch.nn.Parameter(torch.randn(8, 12, generator=generator))
    threshold = w.detach().abs().median()
    losses, gone = [], w.detach().abs() < threshold
    before = w.detach().clone()
    optimizer = torch.optim.SGD([w], lr=0.05)
    for _ in range(100):
        loss = F.mse_loss(masked_linear(x, w, threshold), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(w.detach()[gone], before[gone])  # pruned entries keep their values
    assert bool(((w.detach().abs() < threshold) >= gone).all())  # and stay pruned


@pytest.mark.parametrize("activation", [None, "silu"])
def test_shapes_and_strides(activation):
    _, w, bias = (t.detach() for t in problem())
    for x in (torch.randn(9), torch.randn(2, 3, 9), torch.randn(9, 7).t(), torch.randn(2, 5, 11)[..., 2:]):
        x = x.double().requires_grad_()
        y = masked_linear(x, w, 0.5, bias, activation=activation)
        assert y.shape == (*x.shape[:-1], 6)
        y.sum().backward()
        assert x.grad.shape == x.shape
    none = torch.randn(0, 9, dtype=torch.float64, requires_grad=True)
    w.requires_grad_()
    y = masked_linear(none, w, 0.5, bias, activation=activation)
    y.sum().backward()
    assert y.shape == (0, 6) and bool((w.grad == 0).all())


def test_nan_stays_visible():
    w = torch.tensor([[float("nan"), 0.1], [0.1, 2.0]])
    y = masked_linear(torch.ones(1, 2), w, 1.0)
    assert y[0, 0].isnan() and float(y[0, 1]) == 2.0


def test_autocast():
    x, w, bias = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, w, 0.5, bias, activation="gelu")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == x.grad.dtype == torch.float32
    assert bool((w.grad[w.detach().bfloat16().float().abs() < 0.5] == 0).all())


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_op_keeps_pytorchs_contract(activation):
    x, w, bias = problem(torch.float32)
    op, keep = torch.ops.rmtkern.masked_linear.default, activation is not None
    for b in (bias, None):
        torch.library.opcheck(op, (x, w, torch.tensor(0.5), b, activation, keep, "reference"))
    before = torch.randn(5, 6)
    for needed in ((True, True, True), (False, True, False), (True, False, False)):
        parts = (before, before, x.detach(), w.detach(), torch.tensor(0.5), activation, *needed, "reference")
        torch.library.opcheck(torch.ops.rmtkern.masked_linear_backward.default, parts)
    y, _ = op(x, w, torch.tensor(0.5), None, None, False, "reference")
    y.sum().backward()
    if activation is not None:
        with pytest.raises(ValueError, match="gradients through an activation need keep=True"):
            op(x, w, torch.tensor(0.5), None, activation, False, "reference")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    x, w, bias = problem(torch.float32)
    torch.compiler.reset()

    def call(x, threshold):
        return masked_linear(x, w, threshold, bias, activation="gelu")

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 3):
        for threshold in (0.5, torch.tensor(0.5), torch.tensor(0.9)):
            grads = []
            for function in (compiled, call):
                w.grad = bias.grad = None
                tokens = x.detach()[:rows].clone().requires_grad_()
                y = function(tokens, threshold)
                y.square().sum().backward()
                grads.append((y.detach(), tokens.grad, w.grad, bias.grad))
            assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_a_changed_threshold_compiles_nothing_again():
    x, w, _ = (t.detach() for t in problem(torch.float32))
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda t: masked_linear(x, w, t), backend=counter, fullgraph=True)
    for value in (0.1, 0.5, 0.9):
        assert torch.equal(compiled(torch.tensor(value)), masked_linear(x, w, value))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "expected two Tensors, got list and Tensor"),
        ({"w": torch.ones(3)}, ValueError, r"w: expected \[N, K\] with N, K >= 1, got \[3\]"),
        ({"x": torch.ones(2, 4)}, ValueError, r"x has shape \[2, 4\] but the weight expects \[..., 3\]"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, ValueError, "x: expected floating point, got torch.int64"),
        ({"w": torch.ones(5, 3).half()}, ValueError, "w: expected torch.float32 on cpu as x, got torch.float16 on cpu"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected \[5\], got \[4\]"),
        (
            {"bias": torch.ones(5, device="meta")},
            ValueError,
            "bias: expected torch.float32 on cpu as x, got .* on meta",
        ),
        ({"threshold": -1.0}, ValueError, "threshold: expected a finite number >= 0, got -1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold: expected a finite number >= 0, got nan"),
        ({"threshold": torch.ones(2)}, ValueError, r"threshold: expected a number or a tensor \[\] on cpu, got \[2\]"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'; valid: None, gelu"),
        ({"backend": "cpu"}, ValueError, "backend: expected one of triton, reference, got 'cpu'"),
    ],
)
def test_bad_input(change, error, message):
    call = {"x": torch.ones(2, 3), "w": torch.ones(5, 3), "threshold": 0.5, **change}
    with pytest.raises(error, match=message):
        masked_linear(**call)


def test_a_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = torch.ones(2, 3), torch.ones(5, 3)
    if not torch.cuda.is_available():
        with pytest.raises(
            KernelUnavailable, match=r"on cpu: triton: (no CUDA device|the package triton is not installed)"
        ):
            masked_linear(x, w, 0.5, backend="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        KernelUnavailable, match="the package triton is not installed; backend='reference' does without"
    ):
        masked_linear(x, w, 0.5, backend="triton")


def test_a_cpu_never_imports_triton():
    code = (
        "import sys, torch; from rmtkern.masked_linear import masked_linear;"
        "masked_linear(torch.ones(2, 3), torch.ones(4, 3, requires_grad=True), 0.5).sum().backward();"
        "print('rmtkern.layouts.triton_masked' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
