"""pack_ where it does not run on a CPU: which device a model is on, and timing by a device's events, on fakes.

What stands in for a GPU here is a description of one (`cuda_device`) whose clock times CPU tensors: the whole path of
pack_ runs, with the kernels of this CPU. tests/gpu/test_packing.py runs it with the Triton kernels.
"""

import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import PackedLinear
from rmtkern.packing import pack, pack_, unpack_
from rmtkern.packing.device import cuda_device, device_of
from rmtkern.packing.events import LAUNCH_BOUND, EventTimer
from rmtkern.testing import assert_as_accurate_as_dense, random_sparse


def mlp(sparsity=0.9, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    for i in (0, 2):
        model[i].weight.data = random_sparse(*model[i].weight.shape, sparsity, seed=i)
    return model.to(dtype)


class WallClock:
    """Times on this CPU; says that giving the work took `host` of it."""

    def __init__(self, host=0.1):
        self.host = host
        self.captured = 0

    def ms(self, call, repeats):
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        taken = 1e3 * (time.perf_counter() - start) / repeats
        return taken, self.host * taken

    def capture(self, calls):
        self.captured += 1
        return dict(calls)


class Script:
    """A clock that runs nothing: each call has a list of (device, host) times [ms] to come, the last repeated."""

    def __init__(self, fails=None):
        self.fails = fails
        self.order = []

    def ms(self, call, repeats):
        self.order.append((call.name, repeats))
        return call.times.pop(0) if len(call.times) > 1 else call.times[0]

    def capture(self, calls):
        if self.fails:
            raise RuntimeError(self.fails)
        return {name: Scripted(f"graph of {name}", [call.graph]) for name, call in calls.items()}


class Scripted:
    def __init__(self, name, times, graph=(0.01, 0.001)):
        self.name, self.times, self.graph = name, list(times), graph


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes pack_ take every model to be on a GPU that there is not; the arguments are cuda_device's."""

    def use(clock=None, reason=None, name="Fake GPU", arch="compute capability 9.0"):
        device = cuda_device(name, arch, clock or WallClock(), reason)
        monkeypatch.setattr(pack, "device_of", lambda model, examples: device)
        return device

    return use


def cheap(label):
    """A timer that says 1 ms for a form and 2 ms for the others, and that the packed model is the fastest."""

    def timer(calls, budget_ms):
        for call in calls.values():
            call()
        return {name: 1.0 if name in (label, "packed") else 2.0 for name in calls}

    return timer


# which device


def test_a_model_on_meta_is_refused():
    with pytest.raises(ValueError, match=r"model: 0\.weight is on device meta and has no values; call model\.to_empty"):
        pack_(mlp().to("meta"), torch.randn(3, 64, device="meta"))


def test_an_example_elsewhere_is_refused_before_anything_changes():
    model = mlp()
    before = [id(module) for module in model.modules()]
    for example in (torch.randn(3, 64, device="meta"), {"input": torch.randn(3, 64, device="meta")}):
        with pytest.raises(
            ValueError, match=r"example 1: a tensor is on meta, the model on cpu; move it: \.to\('cpu'\)"
        ):
            pack_(model, [torch.randn(3, 64), example])
    assert before == [id(module) for module in model.modules()]


def test_mixed_devices_are_refused():
    model = mlp()
    with FakeTensorMode():
        model[2].weight = nn.Parameter(torch.empty(32, 96, device="cuda"))
    with pytest.raises(ValueError, match=r"on one device, got cpu \(0\.weight\), cuda:0 \(2\.weight\); call model\.to"):
        pack_(model, torch.randn(3, 64))
    assert type(model[0]) is nn.Linear


def test_a_scalar_of_the_cpu_may_be_an_argument_anywhere():
    with FakeTensorMode():
        model = nn.ParameterList([torch.empty(4, device="xpu")])
    device = device_of(model, [((torch.tensor(0.5),), {})])
    assert device.reason == "device xpu:0; there are kernels for cpu and cuda only: call model.cpu() to pack it"
    with pytest.raises(ValueError, match=r"example 0: a tensor is on cpu, the model on xpu:0; move it"):
        device_of(model, [((torch.ones(1),), {})])


def test_the_cpu_is_timed_as_ever():
    device = device_of(mlp(), [])
    assert device.kernels and not device.name and not device.here and "onednn" in device.dense


# what a GPU's candidates, keys and report are


def test_candidates_keys_and_report_of_a_gpu(on_gpu):
    device = on_gpu()
    model = mlp()
    expected = [module.weight.detach().clone() for module in (model[0], model[2])]
    report = pack_(model, torch.randn(5, 64), timer=cheap("bitmask"), budget_ms=1)
    dense = {label for layer in report.layers for label in layer.ms[5] if label.startswith("dense/")}
    assert dense == {"dense/torch", "dense/own"} and report.packed_layers == 2
    assert f"on {device.name}" in str(report) and device.name.startswith("Fake GPU, compute capability 9.0, triton ")
    for key in report.decisions:
        assert key.cpu == "Fake GPU" and key.threads == 1
        assert key.isa.startswith("compute capability 9.0, triton ") and key.isa.endswith("float32 highest")
    unpack_(model)
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2), expected, strict=True))


def test_decisions_hold_for_one_kind_of_gpu_and_one_precision(on_gpu, monkeypatch):
    on_gpu()
    known = pack_(mlp(), torch.randn(5, 64), timer=cheap("bitmask"), budget_ms=1).decisions

    def reused(**changes):
        on_gpu(**changes)
        return pack_(mlp(), torch.randn(5, 64), timer=cheap("bitmask"), budget_ms=1, decisions=known).groups_reused

    assert reused() == 2
    assert reused(name="Other GPU") == reused(arch="compute capability 8.0") == 0
    for name, value in (("RMTKERN_AUTOTUNE", "1"), ("RMTKERN_BACKEND", "cpu")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert reused() == 0
    device = cuda_device("g", "a", WallClock())
    assert device.keys(EventTimer(WallClock(), graphs=False))["isa"] == f"{device.here['isa']}, kernel by kernel"
    assert device.keys(device.timer) == device.keys(cheap("bitmask")) == device.here
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert cuda_device("g", "a", WallClock()).here["isa"].endswith("float32 high")
    finally:
        torch.set_float32_matmul_precision(previous)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(32), nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_and_layer_norm_stay_pytorchs(on_gpu):
    on_gpu()
    report = pack_(nn.Sequential(Attention()).eval(), torch.randn(2, 7, 32), timer=cheap("dense/own"), budget_ms=1)
    assert report.attention == () and report.norms == ()


def test_without_a_kernel_every_layer_stays_and_says_why(on_gpu):
    on_gpu(reason="no kernel runs layout 'dense' on cuda:0: triton: the package triton is not installed")
    model = mlp()

    def never(calls, budget_ms):
        raise AssertionError("nothing is there to time")

    report = pack_(model, torch.randn(5, 64), timer=never)
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert all("triton: the package triton is not installed" in layer.reason for layer in report.layers)


def test_why_there_is_no_kernel_is_asked_of_the_backends(monkeypatch):
    from rmtkern import ops
    from rmtkern.packing import device

    assert device._reason_against(torch.device("cpu")) is None  # nothing is launched: own runs on this CPU
    monkeypatch.setattr(ops, "_candidates", lambda device, layout, backend: ("cuda", "triton"))
    monkeypatch.setitem(ops.KERNELS, "dense", {"cuda": "this", "triton": "the package triton is not installed"})
    reason = device._reason_against(torch.device("cpu"))
    assert reason == "no kernel runs layout 'dense' on cpu: cuda: this; triton: the package triton is not installed"


def test_float16_is_for_gpus(on_gpu):
    with_cpu = pack_(mlp(dtype=torch.float16), torch.randn(3, 64).half(), timer=cheap("bitmask"))
    assert all("hold torch.float32 and torch.bfloat16 here" in layer.reason for layer in with_cpu.layers)
    on_gpu()
    report = pack_(mlp(dtype=torch.float16), torch.randn(3, 64).half(), timer=cheap("bitmask"), budget_ms=1)
    # this CPU's kernels refuse float16, so nn.Linear is all that is left of the candidates
    assert all(
        [*layer.ms[3]] == ["dense/torch"] and "x is torch.float16; cast" in layer.reason for layer in report.layers
    )


# timing


def test_the_whole_path_with_a_clock_and_graphs(on_gpu):
    clock = WallClock(host=1.0)
    on_gpu(clock)
    model, x = mlp(), torch.randn(5, 64)
    exact = model.double()(x.double()).float()
    model.float()
    report = pack_(model, x, budget_ms=2)
    with torch.no_grad():
        assert torch.allclose(model(x), exact, atol=1e-5)
    assert clock.captured >= 3  # two layers, and the whole model at least once
    assert all("timed under CUDA graphs" in layer.reason for layer in report.layers)
    assert "example 0 was timed under CUDA graphs" in report.notes
    assert all(ms > 0 for layer in report.layers for ms in layer.ms[5].values())


def test_calls_that_the_device_does_not_wait_for_are_not_captured(on_gpu):
    clock = WallClock(host=LAUNCH_BOUND / 2)
    on_gpu(clock)
    report = pack_(mlp(), torch.randn(5, 64), budget_ms=2)
    assert clock.captured == 0 and "example 0 was timed kernel by kernel" in report.notes


def test_graphs_count_in_place_of_what_was_captured():
    slow, fast = Scripted("slow", [(1.0, 1.0)], (0.3, 0.01)), Scripted("fast", [(2.0, 0.1)], (0.2, 0.01))
    timer = EventTimer(Script())
    assert timer({"slow": slow, "fast": fast}, 10) == {"slow": 0.3, "fast": 0.2}
    assert timer.how == "under CUDA graphs"
    assert EventTimer(Script(), graphs=False)({"slow": slow, "fast": fast}, 10) == {"slow": 1.0, "fast": 2.0}


def test_a_capture_that_fails_leaves_all_kernel_by_kernel():
    timer = EventTimer(Script(fails="called a synchronizing CUDA operation\nand more"))
    found = timer({"a": Scripted("a", [(1.0, 1.0)]), "b": Scripted("b", [(2.0, 2.0)])}, 10)
    assert found == {"a": 1.0, "b": 2.0}
    assert timer.how == "kernel by kernel, as CUDA graphs failed: called a synchronizing CUDA operation"


def test_rounds_are_interleaved_and_medians_taken():
    # two calls to set up, one to size the rounds, five rounds, of which one is disturbed
    times = [(50.0, 0.1), (1.0, 0.1), (1.0, 0.1), (1.0, 0.1), (90.0, 0.1), (1.0, 0.1), (2.0, 0.1), (2.0, 0.1)]
    clock = Script()
    found = EventTimer(clock)({"a": Scripted("a", times), "b": Scripted("b", [(3.0, 0.1)])}, 1)
    assert found == {"a": 2.0, "b": 3.0}
    names = [name for name, _ in clock.order]
    assert names == [*"aabbab", *"abbaabbaab"]


def test_short_calls_are_repeated_and_the_budget_ends_the_rounds():
    clock = Script()
    EventTimer(clock)({"a": Scripted("a", [(0.05, 0.001)])}, 20)
    rounds = clock.order[3:]
    assert {repeats for _, repeats in rounds} == {10}
    assert 0.05 * 11 * (len(rounds) - 1) < 20 <= 0.05 * 11 * len(rounds)
    clock = Script()
    EventTimer(clock)({"a": Scripted("a", [(1500.0, 1.0)])}, 20)
    assert len(clock.order[3:]) == 3


# dense on a device


@pytest.mark.parametrize("gated", [0, 20])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "silu"])
def test_pytorchs_linear_with_every_epilogue(activation, gated):
    from rmtkern.layouts.dense import cuda
    from rmtkern.layouts.pairs import interleave, rows_of

    x, gate, up = torch.randn(7, 24), torch.randn(20, 24), torch.randn(20, 24)
    bias, scale, residual = torch.randn(2, 20), torch.randn(20), torch.randn(7, 20)
    if gated:
        weight = LAYOUTS["dense"].pack(interleave(gate, up))
        assert weight.shape[0] == rows_of(20)
        y = cuda.linear(x, weight, interleave(*bias), activation, residual, scale, gated)
        assert_as_accurate_as_dense(y, x, gate, bias[0], activation, residual, scale, (up, bias[1]))
    else:
        y = cuda.linear(x, LAYOUTS["dense"].pack(gate), bias[0], activation, residual, scale)
        assert_as_accurate_as_dense(y, x, gate, bias[0], activation, residual, scale)


def test_a_packed_layer_of_a_gpu_holds_pytorchs_form_where_it_won(on_gpu):
    on_gpu()

    def timer(calls, budget_ms):
        tokens = next(iter(calls.values()))() if "original" not in calls else None
        best = "dense/torch" if tokens is not None and len(tokens) == 3 else "bitmask"
        return {name: 1.0 if name in (best, "packed") else 2.0 for name in calls}

    model = mlp()
    pack_(model, [torch.randn(3, 64), torch.randn(40, 64)], timer=timer, budget_ms=1)
    assert isinstance(model[0], PackedLinear)
    assert [form.label for form in model[0].forms] == ["dense/torch", "bitmask"]
    with pytest.raises(KernelUnavailable, match=r"cuda: (no CUDA device|x is on cpu, the weight on cpu; move both to)"):
        from rmtkern.ops import linear

        linear(torch.randn(3, 64), model[0].forms[0], backend="cuda")
