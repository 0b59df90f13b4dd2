"""A packed model with the rest of PyTorch: compile, export, copies, casts, autocast, processes, threads."""

import concurrent.futures
import copy
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import rmtkern
from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.layouts import LAYOUTS
from rmtkern.nn import PackedLinear
from rmtkern.packing import pack_, unpack_
from rmtkern.packing.multihead import PackedMultihead
from rmtkern.packing.sites import KernelForward
from rmtkern.testing import random_sparse
from tests.fuzz import net, ours_wins

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit():
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 5, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    rmtkern.prune_(model, 0.6, "uniform", show_progress=False)
    return model


def packed(dtype=None):
    """A packed ViT that uses every kernel, and the dense one."""
    model = vit()
    dense = copy.deepcopy(model)
    pack_(model, IMAGES, dtype=dtype, timer=ours_wins, show_progress=False)
    assert len(KernelForward.of(model)) == 5 and sum(isinstance(m, PackedLinear) for m in model.modules()) == 4
    return model, dense


def everything():
    """A packed model with lent weights, a gate-up pair and nn.MultiheadAttention, and the dense one."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(random_sparse(*parameter.shape, 0.6))
    dense, x = copy.deepcopy(model), torch.randn(1, 7, 40)
    pack_(model, x, timer=ours_wins, show_progress=False)
    assert isinstance(model.attn, PackedMultihead)
    return model, dense, x


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = got.detach().double(), want.detach().double()
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), *(pytest.param("inductor", dynamic, marks=SLOW) for dynamic in (False, True))],
)
def test_compile_as_one_graph(backend, dynamic):
    model, _ = packed()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        for images in (IMAGES, torch.randn(5, 3, 32, 32)) if dynamic else (IMAGES,):
            close(compiled(images), model(images))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_one_layer_under_inductor():
    """The short form of what the slow tests do with whole models."""
    linear = PackedLinear(LAYOUTS["bitmask"].pack(random_sparse(8, 64, 0.5)), torch.randn(8))
    model, x = nn.Sequential(linear, nn.Softmax(-1)), torch.randn(3, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True)(x), model(x))


@SLOW
def test_compile_everything_a_file_can_hold():
    model, dense, x = everything()
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True)(x), dense(x))


def exported(model, dynamic=True):
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        return torch.export.export(model, (IMAGES,), dynamic_shapes={"x": {0: batch}} if dynamic else None)


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=SLOW)])
def test_export_save_and_load(dtype):
    model, _ = packed(dtype)
    file = io.BytesIO()
    torch.export.save(exported(model), file)
    file.seek(0)
    program = torch.export.load(file)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"rmtkern.cpu_linear.default", "rmtkern.cpu_attention.default"} <= names
    assert not any("weight.dense" in name for name in program.state_dict)  # no dense weight in it
    with torch.no_grad():
        for images in (IMAGES, torch.randn(5, 3, 32, 32)):
            close(program.module()(images), model(images), 1e-5 if dtype is None else 0.03)


RUN = """
import sys, torch
import rmtkern  # registers the operators
images, want = torch.load(sys.argv[2])
run = torch._inductor.aoti_load_package(sys.argv[1])
with torch.no_grad():
    got = run(images)
print(float((got - want).abs().max() / want.abs().max()))
"""


@SLOW
def test_aot_inductor_runs_in_another_process(tmp_path):
    model, _ = packed()
    path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "vit.pt2"))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "example.pt")
    argv = [sys.executable, "-c", RUN, path, str(tmp_path / "example.pt")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_copies_are_independent(dtype):
    model, _ = packed(dtype)
    with torch.no_grad():
        want = model(IMAGES)
        twin, shallow = copy.deepcopy(model), copy.copy(model)
        memory = {tensor.data_ptr() for tensor in model.state_dict().values()}
        assert not memory & {tensor.data_ptr() for tensor in twin.state_dict().values()}
        assert {type(module) for module in twin.modules()} == {type(module) for module in model.modules()}
        unpack_(model)
        assert torch.equal(twin(IMAGES), want)
        assert unpack_(twin) == 4
    assert type(shallow) is type(model)
    whole, _, x = everything()
    with torch.no_grad():
        twin = copy.deepcopy(whole)
        assert torch.equal(twin(x), whole(x))
        assert twin.mlp.forward.module is twin.mlp and twin.attn.forward.module is twin.attn


def test_copies_of_one_packed_linear():
    linear = PackedLinear(LAYOUTS["bitmask"].pack(random_sparse(8, 64, 0.5)), torch.randn(8))
    linear.note = ["mine"]
    x = torch.randn(3, 64)
    for twin, deep in ((copy.copy(linear), False), (copy.deepcopy(linear), True)):
        assert torch.equal(twin(x), linear(x)) and twin.note == ["mine"]
        assert (twin.note is linear.note) is (twin.weight is linear.weight) is not deep
    pair = copy.deepcopy(nn.ModuleList([linear, linear]))
    assert pair[0] is pair[1]


def test_pickle_is_refused_with_advice(tmp_path):
    advice = r"a packed model is not pickled, .*: use rmtkern\.save\(model, path\) and rmtkern\.load\(path, model\)"
    model, _ = packed()
    only_kernels = vit()
    pack_(only_kernels, IMAGES, layouts=[], timer=ours_wins, show_progress=False)
    for one in (model, everything()[0], only_kernels, model.blocks[0].mlp.fc1):
        for protocol in (2, pickle.HIGHEST_PROTOCOL):
            with pytest.raises(PackedModelError, match=advice):
                pickle.dumps(one, protocol)
        with pytest.raises(PackedModelError, match=advice):
            torch.save(one, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = copy.deepcopy(model)
    again.load_state_dict(state)
    unpack_(model), unpack_(again)
    pickle.loads(pickle.dumps(model))  # an ordinary model again


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_casts_give_the_cast_weight_or_keep_it(source, target):
    """Every layout: what `.to(dtype)` leaves is the rounded weight in the same layout, or the weight that was there."""
    forms = [("dense", {"form": form}, None) for form in range(4)]
    forms += [("bitmask", {}, None), ("nofm", {"n": 2, "m": 4}, (2, 4))]
    if source == torch.float32:
        forms += [("block", {"r": 4, "c": 1}, None), ("nofm", {"n": 1, "m": 16}, (1, 16))]
    else:
        forms += [("block", {"r": 4, "c": 2}, None), ("block", {"r": 1, "c": 2}, None)]
    dense = {name: random_sparse(48, 128, 0.6, nofm=nofm).to(source) for _, _, nofm in forms for name in [nofm]}
    found = [LAYOUTS[layout].pack(dense[nofm], **params) for layout, params, nofm in forms]
    factors = torch.randn(48, 3).to(source), torch.randn(3, 128).to(source)
    found += [LAYOUTS["lowrank"].from_factors(*factors), LAYOUTS["spectral"].from_parts(*factors, dense[(2, 4)])]
    for weight in found:
        before, linear = weight.unpack(), PackedLinear(copy.deepcopy(weight), torch.randn(48).to(source))
        x = torch.randn(5, 128).to(source)
        y = linear(x)
        linear.to(target)
        now = linear.weight
        assert now.dtype in (source, target) and now.shape == weight.shape, weight.label
        assert linear.unpack().weight.dtype == linear.bias.dtype == target
        if now.dtype == target:
            factored = weight.layout in ("lowrank", "spectral") and source != target
            assert torch.equal(now.unpack(), before.to(target)) or factored
            close(now.unpack().float(), before.float(), 0.02)
        else:
            assert torch.equal(now.unpack(), before)  # kept as it was, to the bit
        assert (now.dtype == target) == (target in weight.dtypes)
        try:
            close(linear(x.to(target)).float(), y.float(), 0.03)
        except (KernelUnavailable, ValueError) as error:  # the second where the params are not written in this dtype
            assert re.search(rf"x is {target}.*; cast|bfloat16|must have shape|params|mini-block", str(error))
            fixed = weight.layout in ("block", "nofm") and weight.params != {"n": 2, "m": 4}
            assert target in (torch.float16, torch.float64) or fixed
        cast = now.dtype == target
        linear.to(source)
        assert cast or torch.equal(linear.weight.unpack(), before)
        close(linear(x).float(), y.float(), 0.03)


def test_a_model_cast_as_a_whole():
    model, dense = packed()
    with torch.no_grad():
        want = dense(IMAGES)
        low = copy.deepcopy(model).bfloat16()
        got = low(IMAGES.bfloat16())
        assert got.dtype == torch.bfloat16
        close(got.float(), want, 0.05)
        assert {m.weight.layout for m in low.modules() if isinstance(m, PackedLinear)} == {"bitmask"}
        close(low.float()(IMAGES), want, 0.05)
        half = copy.deepcopy(model).half()
        with pytest.raises(KernelUnavailable, match=r"x is torch\.float16; cast to torch\.float32 or torch\.bfloat16"):
            half(IMAGES.half())
        assert unpack_(half) == 4
        dense.half()
        assert all(torch.equal(a, b) for a, b in zip(half.parameters(), dense.parameters(), strict=True))
        double = copy.deepcopy(model).double()
        with pytest.raises(KernelUnavailable, match=r"x is torch\.float64; cast to torch\.float32"):
            double(IMAGES.double())
        unpack_(double)
        assert torch.equal(double(IMAGES.double()), vit().double()(IMAGES.double()))


def test_a_model_behind_an_interface_that_is_cast_says_what_to_do():
    model, dense = packed(torch.bfloat16)
    with torch.no_grad():
        close(model.bfloat16()(IMAGES), dense(IMAGES), 0.05)  # its insides already are
        model.float()
        with pytest.raises(PackedModelError, match=r"packed in torch\.bfloat16 behind a torch\.float32 .*unpack_"):
            model(IMAGES)
        unpack_(model)
        close(model(IMAGES), dense(IMAGES), 0.05)


def test_devices_and_memory_formats():
    model, _ = packed()
    with torch.no_grad():
        want = model(IMAGES)
        assert torch.equal(model.to("cpu").to(memory_format=torch.channels_last)(IMAGES), want)
        model.share_memory()
        assert torch.equal(model(IMAGES), want)
    assert all(tensor.is_meta for tensor in model.to("meta").state_dict().values())


@pytest.mark.parametrize("build", [packed, everything])
def test_autocast_gives_the_dtype_that_dense_gives(build):
    model, dense, *x = build()
    x = x[0] if x else IMAGES
    with torch.no_grad():
        exact = dense(x)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = model(x), dense(x)
        assert got.dtype == want.dtype
        close(got.float(), exact, 0.05)
        error, theirs = ((y.float() - exact).abs().max() for y in (got, want))
        assert error <= 2 * theirs  # weights stay in float32, so it is at most as coarse
        assert torch.equal(model(x), model(x)) and model(x).dtype == torch.float32


def test_autocast_of_single_layers():
    weight = LAYOUTS["bitmask"].pack(random_sparse(8, 64, 0.5))
    linear, x = PackedLinear(weight, torch.randn(8)), torch.randn(3, 64)
    plain = linear.unpack()
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            got, want = linear(given), plain(given)
            assert got.dtype == want.dtype == torch.bfloat16
            close(got.float(), plain(given).float(), 0.02)
        with torch.autocast("cpu", enabled=False):
            assert linear(x).dtype == torch.float32
        torch._dynamo.reset()
        with torch.no_grad():
            assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))
        with pytest.raises(ValueError, match=r"bias: expected \[8\] torch\.float64"):  # which autocast leaves alone
            linear(x.double())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PackedModelError, match="no backward pass"):
        linear(x).sum().backward()


@pytest.mark.parametrize("build", [packed, everything])
def test_inference_mode(build):
    model, dense, *x = build()
    x = x[0] if x else IMAGES
    with torch.inference_mode():
        y = model(x)
        assert y.is_inference()
        close(y, dense(x))


class Features(Dataset):
    """Runs a packed model on each item, in the worker."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.images[index : index + 1])[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_data_loader_workers(threads):
    """The parent has run kernels, on threads too, before it forks: a pool of theirs must not be waited for."""
    model, _ = packed()
    images, before = torch.randn(6, 3, 32, 32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            want = torch.cat([model(images[i : i + 1]) for i in range(6)])
        loader = DataLoader(Features(model, images), 2, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert torch.equal(torch.cat(list(loader)), want)
        with torch.no_grad():
            assert torch.equal(model(images[:1]), want[:1])
    finally:
        torch.set_num_threads(before)


def serve(model, images, want, seconds, workers):
    """Each thread runs the model until the time is over; how many calls were made, each with the same bits."""
    end = time.monotonic() + seconds

    def work(first):
        count = 0
        while time.monotonic() < end or count == 0:
            i = (first + count) % len(images)
            with torch.inference_mode():
                assert torch.equal(model(images[i]), want[i])
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(work, range(workers)))


def served(seconds, workers, threads, dtype):
    """Calls that were made in ten rounds, each on new threads, and how much memory each round left behind [KiB]."""
    model, _ = packed(dtype)
    images = [torch.randn(batch, 3, 32, 32) for batch in (1, 2, 3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            want = [model(one) for one in images]
        calls, memory = 0, []
        for _ in range(10):
            calls += serve(model, images, want, seconds / 10, workers)
            memory.append(resident())
        return calls, memory
    finally:
        torch.set_num_threads(before)


def resident():
    """Memory of this process [KiB]."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def assert_flat(memory):
    """The second half of the rounds takes no more than the first one, but for an arena of the allocator or two."""
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 8 * 1024, memory


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("workers", "threads"), [(4, 2), (8, 1)])
def test_threads_that_serve_one_model(workers, threads, dtype):
    calls, memory = served(1, workers, threads, dtype)
    assert calls >= 10 * workers
    assert_flat(memory)


@SLOW
@pytest.mark.soak
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_eight_threads_for_five_minutes(dtype, pytestconfig, record_property):
    seconds = pytestconfig.getoption("--soak-seconds")
    calls, memory = served(seconds, workers=8, threads=1, dtype=dtype)
    record_property("soak", f"{calls} calls in {seconds:g} s, memory {memory[0]} to {max(memory)} KiB")
    assert calls > seconds
    assert_flat(memory)


def test_a_leak_is_seen():
    with pytest.raises(AssertionError):
        assert_flat([100_000 + 2_000 * step for step in range(10)])
    assert_flat([90_000, 140_000, 140_100, 141_000, 140_900, 141_100, 140_000, 142_000, 141_900, 142_100])


def test_data_parallel_and_distributed_wraps(tmp_path):
    model, _ = packed()
    with torch.no_grad():
        want = model(IMAGES)
        assert torch.equal(nn.DataParallel(model)(IMAGES), want)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model).eval()
        with torch.inference_mode():
            assert torch.equal(wrapped(IMAGES), want)
    finally:
        torch.distributed.destroy_process_group()


def test_a_packed_linear_under_vmap_and_functional_call():
    linear = PackedLinear(LAYOUTS["bitmask"].pack(random_sparse(8, 64, 0.5)), torch.randn(8))
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        got = torch.func.functional_call(linear, {"bias": torch.zeros(8)}, (x,))
        close(got, F.linear(x, linear.weight.unpack()))
