"""The kernels of masked_linear, forward and backward, against float64: interpreted, and on a device if any."""

import pytest
import torch

pytest.importorskip("triton")

from rmtkern.activations import FUNCTIONS
from rmtkern.errors import KernelUnavailable
from rmtkern.masked_linear import masked_linear
from rmtkern.testing import assert_as_accurate_as_dense
from tests.gpu.test_accuracy import DEVICES

everywhere = pytest.mark.parametrize("device", DEVICES)
every_number = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# one token; prime and ragged; a tile exactly; one more than a tile in every direction; less than a tile
SHAPES = [(1, 96, 128), (37, 53, 80), (128, 128, 64), (129, 65, 65), (5, 7, 3)]
NAMES = ("y", "x", "w", "bias")


def problem(t, n, k, dtype, device):
    """x, W, bias, the gradient of y, and a threshold in a gap between magnitudes, so that every number agrees on it."""
    generator = torch.Generator().manual_seed(t)
    shapes = ((t, k), (n, k), (n,), (t, n))
    x, w, bias, grad = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    w = (w.float() / k**0.5).to(dtype)
    magnitudes = w.abs().float().unique()
    threshold = float(magnitudes[len(magnitudes) // 2 :][:2].mean())
    return [part.to(device) for part in (x, w, bias, grad)], threshold


def run(parts, threshold, activation, backend, dtype=None):
    """y and the gradients of x, W and bias."""
    x, w, bias, grad = (part.detach().to(dtype or part.dtype).clone() for part in parts)
    leaves = [part.requires_grad_() for part in (x, w, bias)]
    y = masked_linear(x, w, threshold, bias, activation=activation, backend=backend)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(parts, threshold, activation):
    """Each result errs against float64 at most twice as much as PyTorch's in this dtype, plus 4 eps of its scale."""
    found, dense = (run(parts, threshold, activation, backend) for backend in ("triton", "reference"))
    exact = run(parts, threshold, activation, "reference", torch.float64)
    for name, one, other, wanted in zip(NAMES, found, dense, exact, strict=True):
        assert one.dtype == parts[0].dtype and one.shape == wanted.shape, name
        error, usual = (float((part.double() - wanted).abs().max()) for part in (one, other))
        assert error <= 2 * usual + 4 * torch.finfo(one.dtype).eps * float(wanted.abs().max()), (name, error, usual)
    assert torch.equal(found[2] == 0, exact[2] == 0)  # no gradient where it is pruned
    return found


@everywhere
@every_number
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_forward_and_backward(t, n, k, dtype, device):
    parts, threshold = problem(t, n, k, dtype, device)
    found = check(parts, threshold, "gelu")
    x, w, bias, _ = parts
    kept = w * (w.abs().float() >= threshold)
    assert_as_accurate_as_dense(found[0], x, kept, bias, "gelu")


@everywhere
@every_number
@pytest.mark.parametrize("activation", [None, *FUNCTIONS])
def test_every_activation(activation, dtype, device):
    check(*problem(21, 40, 72, dtype, device), activation)


@everywhere
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_sparsity(sparsity, device):
    parts, _ = problem(33, 131, 48, torch.float32, device)
    magnitudes = parts[1].abs().flatten().sort().values
    threshold = {0.0: 0.0, 1.0: float(magnitudes[-1]) * 2}.get(sparsity, float(magnitudes[int(0.9 * 131 * 48)]))
    found = check(parts, threshold, "silu")
    assert float((found[2] == 0).float().mean()) == pytest.approx(sparsity, abs=1e-3)


@everywhere
def test_only_what_is_needed_is_computed(device):
    (x, w, bias, grad), threshold = problem(9, 20, 24, torch.float32, device)
    for trained in ({"w"}, {"x"}, {"bias"}, {"x", "bias"}, {"w", "bias"}):
        for activation in (None, "relu"):
            leaves = {name: part.clone() for name, part in (("x", x), ("w", w), ("bias", bias))}
            for name in trained:
                leaves[name].requires_grad_()
            y = masked_linear(**leaves, threshold=threshold, activation=activation, backend="triton")
            y.backward(grad)
            wanted = dict(zip(NAMES[1:], run((x, w, bias, grad), threshold, activation, "reference")[1:], strict=True))
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in trained)
                if name in trained:
                    torch.testing.assert_close(leaf.grad, wanted[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        y = masked_linear(x, w, threshold, bias, activation="gelu", backend="triton")
    assert not y.requires_grad


@everywhere
def test_the_same_call_gives_the_same_bits(device):
    parts, threshold = problem(37, 53, 80, torch.bfloat16, device)
    first, second = (run(parts, threshold, "gelu", "triton") for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@everywhere
def test_shapes_strides_and_no_token(device):
    w = torch.randn(24, 64, device=device, requires_grad=True)
    inputs = [torch.randn(64), torch.randn(2, 3, 64), torch.randn(64, 7).t(), torch.randn(2, 5, 65)[..., 1:]]
    for x in (x.to(device).requires_grad_() for x in inputs):
        y = masked_linear(x, w, 0.5, backend="triton")
        y.sum().backward()
        assert_as_accurate_as_dense(y.detach(), x.detach(), torch.where(w.detach().abs() < 0.5, 0, w.detach()))
        assert x.grad.shape == x.shape
    w.grad = None
    none = torch.randn(0, 64, device=device, requires_grad=True)
    masked_linear(none, w, 0.5, activation="gelu", backend="triton").sum().backward()
    assert none.grad.shape == (0, 64) and bool((w.grad == 0).all())


@everywhere
def test_nan_stays_visible(device):
    w = torch.tensor([[float("nan"), 0.1], [0.1, 2.0]], device=device)
    y = masked_linear(torch.ones(1, 2, device=device), w, 1.0, backend="triton")
    assert y[0, 0].isnan() and float(y[0, 1]) == 2.0


@everywhere
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_op_keeps_pytorchs_contract(activation, device):
    (x, w, bias, grad), threshold = problem(5, 24, 64, torch.bfloat16, device)
    threshold = torch.tensor(threshold, device=device)
    x, w, bias = (part.requires_grad_() for part in (x, w, bias))
    op = torch.ops.rmtkern.masked_linear.default
    torch.library.opcheck(op, (x, w, threshold, bias, activation, activation is not None, "triton"))
    torch.library.opcheck(op, (x.detach(), w.detach(), threshold, None, activation, False, "triton"))
    parts = (grad, grad, x.detach(), w.detach(), threshold, activation)
    for needed in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.rmtkern.masked_linear_backward.default, (*parts, *needed, "triton"))


@everywhere
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, device):
    (x, w, bias, grad), threshold = problem(5, 24, 64, torch.bfloat16, device)
    threshold = torch.tensor(threshold, device=device)
    w.requires_grad_()
    torch.compiler.reset()

    def call(x):
        return masked_linear(x, w, threshold, bias, activation="silu", backend="triton")

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 3):
        results = []
        for function in (compiled, call):
            w.grad = None
            tokens = x[:rows].clone().requires_grad_()
            y = function(tokens)
            y.backward(grad[:rows])
            results.append((y.detach(), tokens.grad, w.grad))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@everywhere
def test_reasons_against_a_call(device):
    x, w = torch.ones(2, 3, device=device), torch.ones(5, 3, device=device)
    with pytest.raises(KernelUnavailable, match=r"triton: x is torch.float64; cast to torch.float32 or torch.float16"):
        masked_linear(x.double(), w.double(), 0.5, backend="triton")
    far = torch.zeros(1, device=device)
    with pytest.raises(KernelUnavailable, match=r"the weight is \(8388608, 1\); N and K must be less than 2\^23"):
        masked_linear(far.expand(1, 1), far.expand(2**23, 1), 0.5, backend="triton")
    with pytest.raises(KernelUnavailable, match=r"tokens reach 2\^31; split the call"):
        masked_linear(far.expand(2**31, 1), far.expand(1, 1), 0.5, backend="triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("which", ["x", "w"])
def test_offsets_of_more_than_32_bits(which):
    # 530 rows, 2^22 + 16 elements apart: the last is beyond 2^31 elements; untouched memory is never allocated
    from rmtkern.layouts.triton_masked import forward_kernel, input_gradient_kernel, weight_gradient_kernel

    tokens, n = (530, 17) if which == "x" else (17, 530)
    x, w, g = torch.randn(tokens, 32).half(), torch.randn(n, 32).half(), torch.randn(tokens, n).half()
    tensors, stride = {"x": x, "w": w}, 2**22 + 16
    far = torch.empty(529 * stride + 64, dtype=torch.float16).as_strided((530, 32), (stride, 1))
    far.copy_(tensors[which])
    tensors[which] = far
    threshold, kept = torch.tensor(0.5), torch.where(w.abs() < 0.5, 0, w)
    sizes, strides = (tokens, n, 32), [t.stride(0) for t in tensors.values()]
    options = {"BM": 16, "BN": 16, "GROUP": 8, "PRECISION": "ieee"}
    y, of_x, of_w = torch.zeros(tokens, n).half(), torch.zeros_like(x), torch.zeros_like(w)
    forward_kernel[(68,)](
        tensors["x"], tensors["w"], threshold, None, None, y, *sizes, *strides, n,
        BK=32, EVEN=True, ACTIVATION=None, **options,
    )  # fmt: skip
    torch.testing.assert_close(y, (x.float() @ kept.float().t()).half(), rtol=1e-2, atol=1e-2)
    grid = (-(-tokens // 16) * 2,)
    input_gradient_kernel[grid](g, tensors["w"], threshold, of_x, *sizes, strides[1], BK=16, EVEN=False, **options)
    torch.testing.assert_close(of_x, (g.float() @ kept.float()).half(), rtol=1e-2, atol=1e-2)
    grid = (-(-n // 16) * 2,)
    weight_gradient_kernel[grid](
        g, tensors["x"], tensors["w"], threshold, of_w, *sizes, *strides, BK=16, EVEN=False, **options
    )
    expected = torch.where(w.abs() < 0.5, 0, (g.float().t() @ x.float()).half())
    torch.testing.assert_close(of_w, expected, rtol=1e-2, atol=1e-2)
