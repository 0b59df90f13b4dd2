"""The specification of sparsify against plain loops in float64, and its ties against the pruning code's own."""

import subprocess
import sys

import array_api_strict
import numpy as np
import pytest
import torch

from rmtkern.errors import KernelUnavailable
from rmtkern.pruning.smallest import take_smallest
from rmtkern.spectrum import denoise
from rmtkern.spectrum.sparsify import recompose, sparsify

NAMESPACES = {"numpy": lambda a: a, "torch": torch.from_numpy, "array_api_strict": array_api_strict.asarray}


def factors(rng, n, k, layers=None):
    """U, s, Vh of random matrices and two limits that zero about a third of the coordinates, float64."""
    u, s, vh = np.linalg.svd(rng.standard_normal((*([] if layers is None else [layers]), n, k)), full_matrices=False)
    return u, s, vh, rng.uniform(0, 1, s.shape) / n**0.5, rng.uniform(0, 1, s.shape) / k**0.5


def loops(u, s, vh, limit_u, limit_v, threshold):
    """One matrix, its words as Python integers, and its counts, entry by entry."""
    n, k = u.shape[0], vh.shape[1]
    weight, words, counts = np.zeros((n, k)), [[0] * -(-k // 64) for _ in range(n)], [0] * n
    for i in range(n):
        for j in range(k):
            terms = [
                s[r] * u[i, r] * vh[r, j]
                for r in range(len(s))
                if abs(u[i, r]) >= limit_u[r] and abs(vh[r, j]) >= limit_v[r]
            ]
            value = sum(terms)
            if value != 0 and abs(value) >= threshold:
                weight[i, j] = value
                words[i][j // 64] |= 1 << (j % 64)
                counts[i] += 1
    return weight, words, counts


@pytest.mark.parametrize("kind", NAMESPACES)
@pytest.mark.parametrize(("n", "k"), [(7, 70), (66, 5), (3, 128)])
def test_equals_plain_loops(kind, n, k, rng):
    parts = factors(rng, n, k)
    expected = loops(*parts, 0.4)
    found = sparsify(*map(NAMESPACES[kind], parts), threshold=0.4)
    assert 0 < np.count_nonzero(expected[0]) < n * k
    np.testing.assert_allclose(np.asarray(found.weight), expected[0], atol=1e-12)
    assert np.asarray(found.words).view(np.uint64).tolist() == expected[1]
    assert np.asarray(found.counts).tolist() == expected[2]
    assert str(found.words.dtype).endswith("int64") and str(found.counts.dtype).endswith("int32")


def test_a_batch_is_its_layers(rng):
    parts = [torch.from_numpy(part) for part in factors(rng, 20, 30, 3)]
    thresholds = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    for options in ({"threshold": thresholds}, {"zeros": [0, 100, 600]}):
        found = sparsify(*parts, **options)
        for index in range(3):
            alone = {name: value[index] for name, value in options.items()}
            for one, many in zip(sparsify(*(part[index] for part in parts), **alone), found, strict=True):
                torch.testing.assert_close(one, many[index], rtol=1e-12, atol=1e-12)
    assert torch.equal((found.weight == 0).sum((1, 2)), torch.tensor([0, 100, 600]))


def planted(rng, layers, n, k):
    """Factors whose products are small integers, exactly, with many equal magnitudes and zeros."""
    values = rng.integers(-3, 4, (layers, n, k)).astype(np.float64)
    eye = np.broadcast_to(np.eye(n), (layers, n, n)).copy()
    ones = np.ones((layers, n))
    return values, [torch.from_numpy(part) for part in (eye, ones, values, 0 * ones, 0 * ones)]


@pytest.mark.parametrize("kind", ["numpy", "torch", "array_api_strict"])
@pytest.mark.parametrize("count", [0, 1, 100, 251, 400, 819])
def test_fixed_number_of_zeros_goes_by_the_rule_of_the_budgets(kind, count, rng):
    values, parts = planted(rng, 3, 13, 21)
    parts = [NAMESPACES[kind](part.numpy()) for part in parts]
    masks = list(take_smallest([torch.from_numpy(np.abs(layer)) for layer in values], count))
    expected = np.where(np.stack([mask.numpy() for mask in masks]), 0, values)
    assert np.array_equal(np.asarray(sparsify(*parts, zeros=count).weight), expected)
    each = [count // 3] * 3
    masks = [next(take_smallest([torch.from_numpy(np.abs(layer))], count // 3)) for layer in values]
    expected = np.where(np.stack([mask.numpy() for mask in masks]), 0, values)
    assert np.array_equal(np.asarray(sparsify(*parts, zeros=each).weight), expected)


def test_pruning_uses_the_same_recomposition(rng):
    """The T_i rule of denoise.py is recompose() with its limits, and so the weight of sparsify without a threshold."""
    weight, edge, theta = rng.standard_normal((30, 40)), 30**0.5 + 40**0.5, 0.4
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    limit = theta * np.maximum(1 / 750, np.maximum(0, 1 - s / edge) ** 30)
    expected = denoise.sparsify_singular_vectors(weight, edge, theta)
    np.testing.assert_allclose(recompose(u, s, vh, limit, limit), expected, atol=1e-10)
    np.testing.assert_allclose(sparsify(u, s, vh, limit).weight, expected, atol=1e-10)


def test_magnitudes_are_those_of_the_rounded_weight():
    eye, one = torch.eye(1), torch.ones(1)
    value = torch.tensor([[1 + 2**-9, 1 + 2**-7, 1e-45]])  # the first rounds to 1 in bfloat16, the last to 0 in float16
    zero = torch.zeros(1)
    found = sparsify(eye, one, value, zero, dtype=torch.bfloat16, threshold=1 + 2**-10)
    assert found.weight.dtype == torch.bfloat16 and found.weight.tolist() == [[0, 1 + 2**-7, 0]]
    assert found.words.tolist() == [[2]] and found.counts.tolist() == [1]
    assert sparsify(eye, one, value, zero, dtype=torch.float16).words.tolist() == [[3]]


def test_the_sign_bit_of_a_word_is_column_63():
    found = sparsify(np.eye(1), np.ones(1), np.r_[np.zeros(63), 1.0, 1.0][None], np.zeros(1))
    assert found.words.tolist() == [[-(2**63), 1]]


def test_nan_stays_visible():
    value = np.array([[np.nan, 0.1, 2.0]])
    for options in ({"threshold": 1.0}, {"zeros": 1}):
        found = sparsify(np.eye(1), np.ones(1), value, np.zeros(1), **options).weight
        assert np.isnan(found[0, 0]) and found[0, 1:].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": np.ones((2, 3, 4, 5))}, r"u: expected \[N, R\] or \[B, N, R\]"),
        ({"s": np.ones(3)}, r"s: expected shape \(4,\) as u has \(5, 4\), got \(3,\)"),
        ({"vh": np.ones((5, 6))}, r"vh: expected shape \(4, 6\)"),
        ({"limit_v": np.ones(5)}, r"limit_v: expected shape \(4,\)"),
        ({"s": np.ones(4, np.float32)}, "s: expected float64 on cpu as u, got float32"),
        ({"threshold": -1.0}, "threshold: expected a finite number >= 0, got -1.0"),
        ({"threshold": np.ones(2)}, r"threshold: expected one number or shape \(1,\), got \(2,\)"),
        ({"threshold": 1.0, "zeros": 3}, "threshold and zeros: expected one of them"),
        ({"zeros": 31}, "zeros: expected 0 to 30, one number or one for each of 1 layers, got 31"),
        ({"zeros": [1, 2]}, "one for each of 1 layers"),
        ({"backend": "cuda"}, "backend: expected one of reference, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, message):
    call = {"u": np.ones((5, 4)), "s": np.ones(4), "vh": np.ones((4, 6)), "limit_u": np.ones(4), **change}
    with pytest.raises(ValueError, match=message):
        sparsify(**call)


def test_integers_are_refused():
    ints = np.ones((5, 4), int), np.ones(4, int), np.ones((4, 6), int), np.ones(4, int)
    with pytest.raises(ValueError, match="u: expected floating point factors, got int64"):
        sparsify(*ints)


def test_a_kernel_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arrays = np.ones((5, 4), np.float32), np.ones(4, np.float32), np.ones((4, 6), np.float32), np.ones(4, np.float32)
    with pytest.raises(KernelUnavailable, match="sparsify: triton: the factors are of type ndarray; expected torch"):
        sparsify(*arrays, backend="triton")
    tensors = [torch.from_numpy(array) for array in arrays]
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match=r"no CUDA device|triton is not installed"):
            sparsify(*tensors, backend="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelUnavailable, match="the package triton is not installed"):
        sparsify(*tensors, backend="triton")


def test_a_cpu_never_imports_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules;"
        "from rmtkern.spectrum.sparsify import sparsify;"
        "sparsify(torch.eye(3), torch.ones(3), torch.eye(3), torch.zeros(3), zeros=4);"
        "print(before, 'rmtkern.spectrum.triton_sparsify' in sys.modules, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
