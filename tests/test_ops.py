import json
import logging
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rmtkern import ops
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS, cpu
from rmtkern.layouts.base import PackedWeight
from rmtkern.testing import accuracy_excess, assert_as_accurate_as_dense, random_sparse


@pytest.fixture
def packed():
    return LAYOUTS["bitmask"].pack(random_sparse(16, 64, 0.5))


def test_bad_calls(packed):
    x = torch.randn(3, 64)
    with pytest.raises(TypeError, match=r"expected a Tensor and a PackedWeight, got list and BitmaskWeight"):
        ops.linear([1.0], packed)
    with pytest.raises(TypeError, match=r"got Tensor and Tensor"):
        ops.linear(x, torch.randn(16, 64))
    with pytest.raises(ValueError, match=r"x has shape \(3, 63\) but the packed weight expects \[..., 64\]"):
        ops.linear(torch.randn(3, 63), packed)
    with pytest.raises(ValueError, match=r"x has shape \(\) but"):
        ops.linear(torch.tensor(1.0), packed)
    with pytest.raises(ValueError, match=r"unknown activation 'swish'; valid: None, gelu, gelu_tanh, relu, silu"):
        ops.linear(x, packed, activation="swish")
    with pytest.raises(ValueError, match=r"bias: expected \[16\] torch.float32, got \[15\] torch.float32"):
        ops.linear(x, packed, torch.ones(15))
    with pytest.raises(ValueError, match=r"bias: expected \[16\] torch.float32, got \[16\] torch.float64"):
        ops.linear(x, packed, torch.ones(16).double())
    with pytest.raises(ValueError, match=r"residual: expected \[3, 16\] torch.float32, got \[16\]"):
        ops.linear(x, packed, residual=torch.ones(16))


def test_no_kernel_gives_each_reason(packed):
    with pytest.raises(
        KernelUnavailable, match=r"no kernel runs layout 'bitmask' on cpu: cpu: x is torch.float64; cast"
    ):
        ops.linear(torch.randn(3, 64).double(), packed)
    with pytest.raises(
        KernelUnavailable, match=r"on meta: no backend is written for this device; move the model to cpu"
    ):
        ops.linear(torch.randn(3, 64, device="meta"), packed)
    with pytest.raises(KernelUnavailable, match=r"cuda: layout bitmask has no cuda kernel yet"):
        ops.linear(torch.randn(3, 64), packed, backend="cuda")
    dense = LAYOUTS["dense"].pack(torch.randn(4, 8)).bfloat16()
    with pytest.raises(KernelUnavailable, match=r"the weight torch.bfloat16; cast one to the other"):
        ops.linear(torch.randn(3, 8), dense)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_triton_is_refused_and_never_imported(packed, monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    real = ops.importlib.import_module
    monkeypatch.setattr(ops.importlib, "import_module", lambda name: real(name) if "triton" not in name else 1 / 0)
    with pytest.raises(KernelUnavailable, match=r"triton: no CUDA device"):
        ops.linear(torch.randn(3, 64), packed, backend="triton")


def test_without_the_extension(packed, monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", "the extension rmtkern._C is not there; run setup.py")
    monkeypatch.setattr(cpu, "_C", None)
    with pytest.raises(KernelUnavailable, match=r"cpu: the extension rmtkern._C is not there"):
        ops.linear(torch.randn(3, 64), packed)
    rows = [row for row in ops.available().rows if row[:2] == ("bitmask", "cpu")]
    assert rows == [("bitmask", "cpu", "-", False, "the extension rmtkern._C is not there; run setup.py")]
    assert ops.linear(torch.randn(3, 64), packed, backend="reference").shape == (3, 16)


def test_the_reference_runs_only_when_named(packed, monkeypatch):
    x, w = torch.randn(3, 64), packed.unpack()
    called = []
    kernel = ops.KERNELS["bitmask"]["reference"]
    real = kernel.linear
    monkeypatch.setattr(kernel, "linear", lambda *args: called.append(1) or real(*args))
    ops.linear(x, packed)
    assert not called
    assert_as_accurate_as_dense(ops.linear(x, packed, backend="reference"), x, w)
    assert len(called) == 1
    monkeypatch.setenv("RMTKERN_BACKEND", "reference")
    ops.linear(x, packed)
    assert len(called) == 2
    ops.linear(x, packed, backend="cpu")  # the argument wins
    assert len(called) == 2


def test_unknown_backend(packed, monkeypatch):
    with pytest.raises(ValueError, match=r"backend is 'gpu'; valid: cpu, cuda, triton, reference"):
        ops.linear(torch.randn(3, 64), packed, backend="gpu")
    monkeypatch.setenv("RMTKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"RMTKERN_BACKEND is 'fast'; valid: cpu, cuda, triton, reference"):
        ops.linear(torch.randn(3, 64), packed)


def test_first_use_is_logged_once(packed, caplog):
    ops._used.clear()
    with caplog.at_level(logging.INFO, logger="rmtkern.ops"):
        ops.linear(torch.randn(3, 64), packed)
        ops.linear(torch.randn(3, 64), packed)
    assert [record.getMessage() for record in caplog.records] == ["first use of kernel bitmask/cpu"]


def test_unknown_layout():
    with pytest.raises(
        ValueError, match=r"unknown layout 'csr'; valid: dense, bitmask, block, nofm, lowrank, spectral"
    ):
        ops.load_kernels("csr")


def test_available_lists_every_combination():
    table = ops.available()
    found = {(layout, backend) for layout, backend, *_ in table.rows}
    assert found == {(layout, backend) for layout in LAYOUTS for backend in ops.NAMES}
    for layout, backend, isa, runs, why in table.rows:
        assert runs or why, (layout, backend, isa)
    assert {isa for layout, backend, isa, runs, _ in table.rows if layout == "nofm" and runs} == {*cpu.isas(), "-"}
    assert set(cpu.isas()) <= set(ops.ISAS)
    assert "bitmask" in str(table) and "why not" in str(table)
    rows = json.loads(table.to_json())
    assert len(rows) == len(table.rows) and set(rows[0]) == {"layout", "backend", "isa", "runs", "why"}


def test_available_says_which_isa_the_cpu_lacks(monkeypatch):
    monkeypatch.setattr(cpu, "isas", lambda: ["portable"])
    rows = [row[2:] for row in ops.available().rows if row[:2] == ("bitmask", "cpu")]
    assert rows == [
        ("portable", True, ""),
        ("avx512_bf16", False, "this CPU lacks avx512_bf16"),
        ("avx512", False, "this CPU lacks avx512"),
        ("avx2", False, "this CPU lacks avx2"),
    ]


def test_a_layout_must_write_its_methods():
    class Nothing(PackedWeight):
        layout, parts = "nothing", ()

    with pytest.raises(NotImplementedError):
        Nothing.pack(torch.ones(2, 2))
    assert list(Nothing.variants(torch.ones(2, 2))) == [{}]
    assert Nothing((2, 2), {"n": 1, "m": 2}, ()).label == "nothing(n=1,m=2)"


def test_the_accuracy_rule_can_fail():
    w, x, b = random_sparse(32, 64, 0.5), torch.randn(5, 64), torch.randn(32)
    exact = (x.double() @ w.double().t() + b.double()).float()
    assert_as_accurate_as_dense(exact, x, w, b)
    wrong = exact.clone()
    wrong[2, 3] += 1e-4
    with pytest.raises(AssertionError, match=r"times what the accuracy rule allows"):
        assert_as_accurate_as_dense(wrong, x, w, b)
    wrong[2, 3] = float("nan")
    assert accuracy_excess(wrong, x, w, b) == float("inf")
    with pytest.raises(ValueError, match=r"y: expected \[5, 32\] torch.float32, got \[5, 32\] torch.float64"):
        accuracy_excess(exact.double(), x, w, b)


def test_random_sparse():
    assert random_sparse(64, 64, 1.0).count_nonzero() == 0
    assert random_sparse(64, 64, 0.0).count_nonzero() == 64 * 64
    # 4096 draws at 0.7: a standard deviation of 0.0072, so 5 of them
    assert abs(1 - random_sparse(64, 64, 0.7).count_nonzero() / 4096 - 0.7) < 0.036
    assert bool(((random_sparse(8, 64, 0, nofm=(2, 4)) != 0).view(8, 16, 4).sum(-1) == 2).all())
    with pytest.raises(ValueError, match=r"sparsity: expected 0 to 1, got 2"):
        random_sparse(8, 8, 2)
    with pytest.raises(ValueError, match=r"k: expected a multiple of m = 4, got 6"):
        random_sparse(8, 6, 0, nofm=(2, 4))


def test_the_dispatcher_is_passed_by_only_where_nobody_looks(packed):
    x = torch.randn(3, 64)
    plain = ops.linear(x, packed)
    with torch.profiler.profile() as seen:
        assert torch.equal(ops.linear(x, packed), plain)
    assert "rmtkern::cpu_linear" in {event.name for event in seen.events()}
    graph = make_fx(lambda x: ops.linear(x, packed))(x)
    assert any("cpu_linear" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(2 * x), ops.linear(2 * x, packed))
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(lambda x: ops.linear(x, packed), x)
    assert torch.equal(traced(2 * x), ops.linear(2 * x, packed))
    assert cpu.unwatched(x) and not cpu.unwatched(torch.nn.Parameter(x))
    assert not torch.func.vmap(lambda row: row * cpu.unwatched(row))(x).any()


def test_a_call_reads_the_parts_where_they_lie_now(packed):
    x = torch.randn(3, 64)
    ops.linear(x, packed)
    packed.values.mul_(2)  # in place
    assert torch.equal(ops.linear(x, packed), ops.linear(x, LAYOUTS["bitmask"].pack(packed.unpack())))
    packed.share_memory()  # the same tensors in other memory
    packed.values.mul_(2)
    assert torch.equal(ops.linear(x, packed), ops.linear(x, LAYOUTS["bitmask"].pack(packed.unpack())))
    other = LAYOUTS["bitmask"].pack(2 * packed.unpack())
    packed.load_state_dict(other.state_dict(), assign=True)  # other tensors
    assert torch.equal(ops.linear(x, packed), ops.linear(x, other))


def test_a_kernel_that_no_device_has_timed_comes_last():
    assert ops._candidates("cuda", "dense", None) == ("cuda", "triton")
    assert ops._candidates("cuda", "nofm", None) == ("triton", "cuda")
    assert ops._candidates("cuda", "nofm", "cuda") == ("cuda",)
    assert ops._candidates("cpu", "nofm", None) == ("cpu",)
    assert ops._candidates("meta", "nofm", None) == ()
