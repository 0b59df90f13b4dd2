"""pack_ with the Triton kernels: in the interpreter on a description of a GPU, and on a device, timed by its clock."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from rmtkern.nn import PackedLinear
from rmtkern.packing import guard, pack, pack_, unpack_
from rmtkern.packing.device import cuda_device, device_of
from rmtkern.packing.events import CudaClock, EventTimer
from rmtkern.testing import accuracy_excess, assert_as_accurate_as_dense, random_sparse

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Block(nn.Module):
    """Attention and an MLP, as in a ViT."""

    def __init__(self, width=128, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def sparse(model, sparsity=0.9):
    for seed, module in enumerate(model.modules()):
        if isinstance(module, nn.Linear):
            module.weight.data = random_sparse(*module.weight.shape, sparsity, seed=seed) / 8
    return model.eval()


def prefer(label):
    """A timer that runs each call once and says that one form is the fastest, and so the packed model."""

    def timer(calls, budget_ms):
        for call in calls.values():
            call()
        return {name: 1.0 if name in (label, "packed") else 2.0 for name in calls}

    return timer


class NoClock:
    """What `prefer` leaves unused."""

    def ms(self, call, repeats):
        raise AssertionError("a timer was given")

    def capture(self, calls):
        raise AssertionError("a timer was given")


# in the interpreter


@pytest.mark.interpreted
@pytest.mark.parametrize("label", ["bitmask", "dense/own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers_run_the_triton_kernels(dtype, label, monkeypatch):
    monkeypatch.setenv("RMTKERN_BACKEND", "triton")
    device = cuda_device("Fake GPU", "compute capability 8.0", NoClock())
    monkeypatch.setattr(pack, "device_of", lambda model, examples: device)
    model = sparse(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))).to(dtype)
    first = model[0]
    x = torch.randn(7, 64).to(dtype)
    report = pack_(model, x, timer=prefer(label), budget_ms=1)
    assert [(layer.form, layer.activation) for layer in report.layers] == [(label, "gelu"), (label, None)]
    assert all(isinstance(model[i], PackedLinear) for i in (0, 2))
    with torch.no_grad():
        assert_as_accurate_as_dense(model[0](x), x, first.weight, first.bias, "gelu")
    unpack_(model)
    assert torch.equal(model[0].weight, first.weight)


# on a device


def vit(dtype):
    return sparse(nn.Sequential(Block(), Block())).to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [[1], [1, 16]], ids=str)
def test_a_packed_model_is_the_model(dtype, images):
    model = vit(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = [torch.randn(batch, 197, 128, device="cuda", dtype=dtype) for batch in images]
    wide = sparse(nn.Sequential(Block(), Block())).cuda().double()
    wide.load_state_dict({name: value.double() for name, value in before.items()})
    with torch.no_grad():
        dense = [model(x) for x in examples]
        exact = [wide(x.double()) for x in examples]
    report = pack_(model, examples, budget_ms=30)
    assert torch.cuda.get_device_name() in str(report) and len(report.end_to_end) == len(images)
    assert any("was timed" in note for note in report.notes)
    with torch.no_grad():
        for x, plain, true in zip(examples, dense, exact, strict=True):
            allowed = 2 * (plain - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max()
            assert (model(x) - true).abs().max() <= allowed
    for times in report.end_to_end if len(images) == 1 else ():  # of several, one may prefer what another loses by
        assert times.packed_ms <= (1 + guard.GUARD_NOISE) * min(times.original_ms, times.dense_ms)
    unpack_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("label", ["bitmask", "dense/own"])
def test_a_packed_model_never_waits_and_runs_as_a_cuda_graph(label):
    model, x = vit(torch.bfloat16), torch.randn(1, 197, 128, device="cuda", dtype=torch.bfloat16)
    report = pack_(model, x, timer=prefer(label))
    assert all(layer.form.startswith(label) for layer in report.layers)
    with torch.no_grad():
        expected = model(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_a_layer_that_holds_two_forms_calls_cublas_where_it_won():
    def timer(calls, budget_ms):
        shape = next(iter(calls.values()))().shape if "original" not in calls else (0,)
        best = "dense/torch" if shape[0] == 3 else "bitmask"
        return {name: 1.0 if name in (best, "packed") else 2.0 for name in calls}

    model = sparse(nn.Sequential(nn.Linear(64, 96))).cuda()
    plain = model[0]
    examples = [torch.randn(rows, 64, device="cuda") for rows in (3, 400)]
    pack_(model, examples, timer=timer)
    assert [form.label for form in model[0].forms] == ["dense/torch", "bitmask"]
    with torch.no_grad():
        assert torch.equal(model(examples[0]), plain(examples[0]))
        assert accuracy_excess(model(examples[1]), examples[1], plain.weight, plain.bias) <= 1


@pytest.mark.gpu
def test_decisions_are_used_again():
    x = torch.randn(1, 197, 128, device="cuda")
    known = pack_(vit(torch.float32), x, budget_ms=20).decisions
    assert {key.cpu for key in known} == {torch.cuda.get_device_name()}
    assert pack_(vit(torch.float32), x, budget_ms=20, decisions=known).groups_measured == 0


@pytest.mark.gpu
def test_the_clock_orders_what_differs_tenfold():
    a, b = (torch.randn(size, size, device="cuda") for size in (1024, 4096))
    timer = EventTimer(CudaClock(a.device))
    found = timer({"small": lambda: a @ a, "large": lambda: b @ b}, 50)  # 64 times the work
    assert found["large"] > 5 * found["small"] > 0


@pytest.mark.gpu
def test_short_calls_are_timed_under_graphs_and_what_waits_is_not():
    x = torch.randn(8, 8, device="cuda")
    timer = EventTimer(CudaClock(x.device))
    timer({"add": lambda: x + 1}, 5)
    assert timer.how == "under CUDA graphs"
    found = timer({"add": lambda: x + 1, "wait": lambda: (x.sum().item(), torch.randn(3, device="cuda"))}, 5)
    assert timer.how.startswith("kernel by kernel, as CUDA graphs failed: ") and found["wait"] > 0
    assert torch.cuda.get_sync_debug_mode() == 0 and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator is none of a capture's


@pytest.mark.gpu
def test_where_model_and_example_must_be():
    model = vit(torch.float32)
    with pytest.raises(ValueError, match=r"example 0: a tensor is on cpu, the model on cuda:0; move it"):
        pack_(model, torch.randn(1, 197, 128))
    model[1].cpu()
    with pytest.raises(ValueError, match=r"on one device, got cuda:0 \(0\..*\), cpu \(1\..*\); call model\.to"):
        pack_(model, torch.randn(1, 197, 128, device="cuda"))


@pytest.mark.gpu
def test_a_device_without_kernels_leaves_every_layer(monkeypatch):
    from rmtkern import ops

    why = "the package triton is not installed"
    monkeypatch.setitem(ops.KERNELS, "dense", {**ops.KERNELS.get("dense", {}), "cuda": why, "triton": why})
    model, x = vit(torch.float32), torch.randn(1, 197, 128, device="cuda")
    assert "triton: the package triton is not installed" in device_of(model, []).reason
    report = pack_(model, x)
    assert report.packed_layers == 0 and all("triton is not installed" in layer.reason for layer in report.layers)
