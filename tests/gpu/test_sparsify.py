"""The sparsify kernels against their specification: in Triton's interpreter, and on a device if any."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from rmtkern.errors import KernelUnavailable
from rmtkern.pruning.smallest import take_smallest
from rmtkern.spectrum.sparsify import sparsify
from tests.gpu.test_accuracy import DEVICES

everywhere = pytest.mark.parametrize("device", DEVICES)
every_number = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# wide and tall; prime and ragged; less than a tile; a tile exactly; one more than a tile; a word's end within a row
SHAPES = [(1, 53, 80), (2, 80, 53), (3, 5, 7), (1, 128, 128), (2, 129, 65), (1, 66, 200)]


def factors(layers, n, k, device):
    """U, s, Vh of random matrices with entries of variance 1, and limits that zero about a third of the coordinates."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(layers, n, k, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    limits = [torch.rand(s.shape, generator=generator, dtype=torch.float64) / side**0.5 for side in (n, k)]
    return [part.float().to(device) for part in (u, s, vh, *limits)]


def bits(mask):
    """Words [..., C] of a mask [..., K], by NumPy's own packing."""
    mask = mask.cpu().numpy()
    wide = np.zeros((*mask.shape[:-1], -(-mask.shape[-1] // 64) * 64), bool)
    wide[..., : mask.shape[-1]] = mask
    return torch.from_numpy(np.packbits(wide, axis=-1, bitorder="little").view(np.int64))


def check_bits(found):
    """Words and counts are those of the weight, every one."""
    assert torch.equal(found.words.cpu(), bits(found.weight != 0))
    assert torch.equal(found.counts, (found.weight != 0).sum(-1, dtype=torch.int32))


@everywhere
@every_number
@pytest.mark.parametrize(("layers", "n", "k"), SHAPES)
def test_recomposition_is_as_accurate_as_a_dense_product(layers, n, k, dtype, device):
    parts = factors(layers, n, k, device)
    found = sparsify(*parts, dtype=dtype, backend="triton")
    assert found.weight.dtype == dtype and found.weight.shape == (layers, n, k)
    exact = sparsify(*(part.double() for part in parts), backend="reference").weight
    u, s, vh, limit_u, limit_v = parts
    left = torch.where(u.abs() < limit_u[:, None], 0, u) * s[:, None]
    dense = (left @ torch.where(vh.abs() < limit_v[..., None], 0, vh)).to(dtype)
    largest = float(exact.abs().max())
    allowed = 2 * float((dense.double() - exact).abs().max()) + 4 * torch.finfo(dtype).eps * largest
    assert float((found.weight.double() - exact).abs().max()) <= allowed
    assert float((exact - u.double() * s.double()[:, None] @ vh.double()).abs().max()) > 0.1  # the limits matter
    check_bits(found)


@everywhere
@every_number
@pytest.mark.parametrize(("layers", "n", "k"), SHAPES)
def test_a_threshold_takes_exactly_what_is_below(layers, n, k, dtype, device):
    parts = factors(layers, n, k, device)
    whole = sparsify(*parts, dtype=dtype, backend="triton").weight
    ordered = whole.abs().float().flatten(1).sort().values
    # magnitudes that occur: they stay, whatever is smaller goes; above the largest all go
    for threshold in (ordered[:, 0], ordered[:, n * k // 2], ordered[:, n * k * 9 // 10], ordered[:, -1] + 1):
        found = sparsify(*parts, threshold=threshold, dtype=dtype, backend="triton")
        assert torch.equal(found.weight, torch.where(whole.abs().float() < threshold[:, None, None], 0, whole))
        check_bits(found)


@everywhere
@every_number
@pytest.mark.parametrize(("layers", "n", "k"), [(1, 53, 80), (3, 5, 7), (2, 129, 65)])
@pytest.mark.parametrize("together", [True, False])
def test_a_fixed_number_goes_by_the_rule_of_the_budgets(layers, n, k, together, dtype, device):
    parts = factors(layers, n, k, device)
    whole = sparsify(*parts, dtype=dtype, backend="triton").weight
    keys = [key.abs().float().cpu() for key in whole]
    groups = [keys] if together else [[key] for key in keys]
    for share in (0.0, 0.9, 1.0) if layers == 1 else (0.5,):
        count = round(share * n * k * (layers if together else 1))
        found = sparsify(*parts, zeros=count if together else [count] * layers, dtype=dtype, backend="triton")
        masks = torch.stack([mask for group in groups for mask in take_smallest(group, count)]).to(device)
        assert torch.equal(found.weight, whole.masked_fill(masks, 0))
        check_bits(found)


@everywhere
@every_number
@pytest.mark.parametrize("count", [1, 700, 1500, 2100, 3599, 3600])
def test_ties_go_by_layer_then_by_index(count, dtype, device):
    # products of small integers are exact in every number, so most magnitudes occur hundreds of times
    values = torch.randint(-2, 3, (3, 20, 60), generator=torch.Generator().manual_seed(1)).float().to(device)
    eye, one = torch.eye(20, device=device).expand(3, 20, 20), torch.ones(3, 20, device=device)
    found = sparsify(eye, one, values, 0 * one, zeros=count, dtype=dtype, backend="triton")
    masks = torch.stack(list(take_smallest([layer.abs().cpu() for layer in values], count))).to(device)
    assert torch.equal(found.weight, values.masked_fill(masks, 0).to(dtype))
    assert int((found.weight == 0).sum()) == max(count, int((values == 0).sum()))
    check_bits(found)


@everywhere
def test_nan_stays_visible(device):
    values = torch.tensor([[float("nan"), 0.1, 2.0, -0.0]], device=device)
    eye, one = torch.eye(1, device=device), torch.ones(1, device=device)
    for options in ({"threshold": 1.0}, {"zeros": 2}):
        found = sparsify(eye, one, values, 0 * one, **options, backend="triton")
        assert found.weight[0, 0].isnan() and found.weight[0, 1:].tolist() == [0, 2, 0]
        assert found.words.tolist() == [[5]] and found.counts.tolist() == [2]


@everywhere
def test_any_strides_and_one_matrix(device):
    u, s, vh, limit_u, limit_v = (part[0] for part in factors(1, 40, 60, device))
    turned = sparsify(vh.mT, s, u.mT, limit_v, limit_u, threshold=0.5, backend="triton")
    found = sparsify(u, s, vh, limit_u, limit_v, threshold=0.5, backend="triton")
    torch.testing.assert_close(turned.weight.mT, found.weight, rtol=1e-5, atol=1e-5)
    assert found.words.shape == (40, 1) and turned.counts.shape == (60,)


@everywhere
def test_reasons_against_a_call(device):
    parts = factors(1, 8, 9, device)
    with pytest.raises(
        KernelUnavailable, match=r"triton: the factors are torch.float64, .* cast them to torch.float32"
    ):
        sparsify(*(part.double() for part in parts), dtype=torch.float32, backend="triton")
    with pytest.raises(KernelUnavailable, match=r"dtype is torch.float64; expected torch.float32, torch.float16"):
        sparsify(*parts, dtype=torch.float64, backend="triton")
    far = [torch.zeros(1, device=device).expand(shape) for shape in ((1, 2**23, 1), (1, 1), (1, 1, 2), (1, 1))]
    with pytest.raises(KernelUnavailable, match=r"N, R, K are \(8388608, 1, 2\); each must be less than 2\^23"):
        sparsify(*far, backend="triton")
    far[0], far[2] = far[0][:, : 2**20], far[2][..., :1].expand(1, 1, 2**11)
    with pytest.raises(KernelUnavailable, match=r"a fixed number of zeros among 2\^31 entries or more"):
        sparsify(*far, zeros=1, backend="triton")


@pytest.mark.interpreted
def test_offsets_of_more_than_32_bits(monkeypatch):
    # one far program of a weight of 2^31 entries and more; untouched memory is never allocated
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    from rmtkern.spectrum.triton_sparsify import recompose_kernel, rows_kernel

    n, k, tile = 2**20 + 16, 2**11, 16
    u, vh = torch.empty(1, n, 16), torch.randn(1, 16, k)
    u[:, -tile:] = torch.randn(tile, 16)
    w, counts = torch.empty(1, n, k, dtype=torch.float16), torch.zeros(n, dtype=torch.int32)
    words = torch.empty(n, k // 32, dtype=torch.int32)
    one, zero = torch.ones(1, 16), torch.zeros(1, 16)

    def far(self, axis):
        return TensorHandle(np.array([program], np.int32), tl.int32)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", far)
    program = n // tile * (k // 128) - 1  # the last one
    recompose_kernel[(1,)](
        u, one, vh, zero, zero, torch.full((1,), 1.0), w, words, counts, n, k, 16, k // 32,
        BM=tile, BN=128, BK=16, EVEN_R=True, TALL=True, PRECISION="ieee",
    )  # fmt: skip
    exact = (u[0, -tile:] @ vh[0, :, -128:]).half()
    expected = torch.where(exact.abs() < 1, 0, exact)
    torch.testing.assert_close(w[0, -tile:, -128:], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(counts[-tile:], (w[0, -tile:, -128:] != 0).sum(1, dtype=torch.int32))
    program = n // tile - 1
    w[0, -tile:] = (u[0, -tile:] @ vh[0]).half()
    expected = w[0, -tile:].clone()
    threshold = torch.tensor([1.0]).view(torch.int32)
    rows_kernel[(1,)](w, threshold, torch.zeros(n, dtype=torch.int64), counts, words, n, k, k // 32, n, BM=tile, BN=64)
    assert torch.equal(w[0, -tile:], torch.where(expected.abs() < 1, 0, expected))
    assert torch.equal(words[-tile:].view(torch.int64), bits(w[0, -tile:] != 0))


# two layers of ViT-S proj, fc1, fc2
@pytest.mark.interpreted
@pytest.mark.parametrize(("layers", "n", "k"), [(2, 384, 384), (1, 384, 1536), (1, 1536, 384)])
def test_it_moves_little_more_than_its_inputs_and_outputs(layers, n, k):
    """At most 1.25 times in the model of traffic.py, with the smallest L2 of all architectures: sm_86, 6 MiB, 84 SMs.

    Both where all programs advance together and, the worst, where each waits for the one before it.
    """
    from tests.gpu.traffic import recorded

    r = min(n, k)
    parts = [torch.zeros(layers, n, r), torch.zeros(layers, r), torch.zeros(layers, r, k), torch.zeros(layers, r)]
    with recorded() as trace:
        found = sparsify(*parts, threshold=1.0, backend="triton")
    whole = sum(t.numel() * t.element_size() for t in (*parts, *found))
    assert trace.touched() == pytest.approx(whole, rel=0.01)  # nothing else is touched
    assert trace.moved(6 * 2**20, 84) <= 1.25 * whole
    assert trace.moved(6 * 2**20, 1) <= 1.25 * whole
    assert trace.moved(2**18, 1) > 1.25 * whole  # too small for the smaller factor: the model can tell
