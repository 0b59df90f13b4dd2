"""benchmarks/run.py --device cuda without a device: cases, options, budget, rows and tables, on a clock of the CPU."""

import copy
import time

import pytest
import torch
from torch import nn

from benchmarks import cases, contenders, gpu, gpu_kernel, gpu_model, record, run
from benchmarks.cases import KernelCase, ModelCase, Pruned
from benchmarks.contenders import Unavailable

FACTS = {"gpu": "Fake GPU 9000", "capability": "9.0", "driver": "1.2", "cuda": "13.0", "triton": "3.8.0"}


class WallClock:
    """Times on this CPU as if it launched and computed at once; a "graph" is the call itself."""

    def ms(self, call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        taken = 1e3 * (time.perf_counter() - start) / repeats
        return taken, taken

    def capture(self, calls):
        return dict(calls)


class NoGraphs(WallClock):
    """Captures everything but one call."""

    def capture(self, calls):
        if "torch bf16" in calls:
            raise RuntimeError("it waits for the device\nat length")
        return dict(calls)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A "GPU" that is this CPU, small layers and models, and results in a folder of their own."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setitem(cases.LAYERS, "toy", (96, 64))
    monkeypatch.setattr(gpu_kernel, "BUDGET_MS", 1.0)
    monkeypatch.setattr(gpu_model, "BUDGET_MS", 1.0)
    monkeypatch.setattr(gpu_model, "PACK_MS", 1.0)
    gpu_kernel._packed.cache_clear()
    return gpu.Gpu(torch.device("cpu"), WallClock(), FACTS)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x.flatten(1))))


def toy(case):
    torch.manual_seed(0)
    return Toy().eval(), (3, 4, 4)


def parsed(*options):
    return run.parse_args(["--device", "cuda", *options])


def test_the_cases_are_those_asked_for():
    kernels, models = list(cases.gpu_kernel_cases()), list(cases.gpu_model_cases())
    for case in kernels:
        n_rows, n_cols = cases.LAYERS[case.layer]
        assert case.dtype == "bfloat16" and case.threads == 0 and case.tokens % cases.IMAGE == 0
        for name in case.contenders:
            numbers = contenders.parse(name).numbers
            assert n_rows % numbers.get("r", 1) == 0 and n_cols % numbers.get("c", numbers.get("m", 1)) == 0
    assert {case.tokens // cases.IMAGE for case in kernels} == {case.batch for case in models} == {1, 8, 64, 256}
    assert [case.batch for case in models[:4]] == [1, 8, 64, 256] and models[0].model.startswith("vit_base")
    assert len({case.name for case in (*kernels, *models)}) == len(kernels) + len(models)
    assert {pruned.dtype for case in models for pruned in case.contenders} == {"bfloat16"}


def test_without_a_device_it_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA device: this PyTorch sees none; run it on a machine with a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--device", "cuda", "--level", "growth"],
            "--level growth is for the CPU; with --device cuda: kernel or model",
        ),
        (["--device", "cuda", "--threads", "1"], "--threads is for the CPU"),
        (["--device", "cuda", "--base", "HEAD"], "--base is for the CPU"),
        (["--device", "cuda", "--budget", "0"], "--budget: expected seconds above 0, got 0.0"),
        (["--level", "kernel", "--budget", "9"], "--budget is for --device cuda"),
        ([], "--level: say which on the CPU: kernel, mlp, normed, attention, model, growth"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        run.parse_args(options)
    assert message in capsys.readouterr().err


def test_options_select_cases():
    found = gpu.select("kernel", parsed("--batches", "1", "8", "--only", "bitmask 0.5"))
    assert {case.tokens for case in found} == {cases.IMAGE, 8 * cases.IMAGE}
    assert {case.contenders for case in found} == {("bitmask 0.5",)}
    assert [case.name for case in gpu.select("model", parsed("--quick"))] == ["vit_base_patch16_224 B=1"]
    assert parsed().budget == gpu.BUDGET_S < 600


def test_rows_of_a_layer(fake):
    said = []
    case = KernelCase("toy", 33, ("dense own", "bitmask 0.5", "block 4x2 0.9", "lowrank 8"), "bfloat16", threads=0)
    with torch.no_grad():
        rows = {row["form"]: row for row in gpu_kernel.measure(case, fake, said.append)}
    assert set(rows) == {"dense torch", *case.contenders}  # no compiler without an activation, no 2:4 on a CPU
    assert any(line.startswith("skip torch 2:4: ") for line in said)
    for row in rows.values():
        assert row["strongest"] == "dense torch" and row["launch"] == "under CUDA graphs"
        assert row["vs_strongest"] == row["vs_cublas"] == pytest.approx(rows["dense torch"]["p50_ms"] / row["p50_ms"])
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["max_rel_err"] < 0.05
    assert rows["bitmask 0.5"]["gflops_dense_equivalent"] / rows["bitmask 0.5"]["gflops"] == pytest.approx(2, rel=0.1)
    assert rows["bitmask 0.5"]["weight_bytes"] < rows["dense torch"]["weight_bytes"]


def test_a_form_that_is_not_there_is_said_and_a_wrong_one_stops(fake, monkeypatch):
    said = []
    gpu_kernel.measure(KernelCase("toy", 5, ("block 32x32 0.5",), "bfloat16", threads=0), fake, said.append)
    assert any(line.startswith("skip block 32x32 0.5: ") for line in said)
    monkeypatch.setattr(gpu_kernel, "linear", lambda x, *args, **options: x.new_zeros(len(x), 96))
    with pytest.raises(RuntimeError, match=r"bitmask 0\.5: .* times the error that is allowed"):
        gpu_kernel.measure(KernelCase("toy", 5, ("bitmask 0.5",), "bfloat16", threads=0), fake, said.append)


PACKED = (Pruned("bfloat16"), Pruned("bfloat16", "unstructured", 0.9), Pruned("bfloat16", "2:4", 0.5))


def test_rows_of_a_model(fake, monkeypatch):
    monkeypatch.setattr(gpu_model, "create", toy)
    said = []
    rows = gpu_model.measure(ModelCase("toy", 4, PACKED, 0), fake, said.append, compiled=False)
    found = {(row["form"], row["launch"]): row for row in rows}
    forms = ("torch bf16", "bfloat16 dense", "bfloat16 unstructured 0.9", "bfloat16 2:4")
    assert set(found) == {(form, launch) for form in forms for launch in ("eager", "graph")}
    for (_, launch), row in found.items():
        dense = found["torch bf16", launch]["p50_ms"]
        assert row["strongest"] == "torch bf16" and row["vs_strongest"] == pytest.approx(dense / row["p50_ms"])
        assert row["vs_dense_graph"] == pytest.approx(found["torch bf16", "graph"]["p50_ms"] / row["p50_ms"])
        assert row["vs_compile"] is None and row["images_per_s"] == pytest.approx(4e3 / row["p50_ms"])
    packed = found["bfloat16 unstructured 0.9", "eager"]
    assert packed["sparsity"] == 0.9 and packed["pack_seconds"] > 0 and " x" in packed["forms"]
    assert any(line.startswith("skip torch 2:4: ") for line in said)


def test_a_model_that_computes_something_else_is_no_row(fake, monkeypatch):
    monkeypatch.setattr(gpu_model, "create", toy)

    def wrong(model, *args, **options):
        model.fc2.weight.data *= 2
        return type("Report", (), {"layers": (), "notes": ()})()

    monkeypatch.setattr(gpu_model, "pack_", wrong)
    with pytest.raises(RuntimeError, match=r"bfloat16 dense: relative error .*, allowed"):
        gpu_model.measure(ModelCase("toy", 4, PACKED[:1], 0), fake, print, compiled=False)


def test_what_cannot_be_captured_stays_eager(fake, monkeypatch):
    monkeypatch.setattr(gpu_model, "create", toy)
    said, device = [], copy.copy(fake)
    object.__setattr__(device, "clock", NoGraphs())
    rows = gpu_model.measure(ModelCase("toy", 4, PACKED[:1], 0), device, said.append, compiled=False)
    assert {(row["form"], row["launch"]) for row in rows} == {
        ("torch bf16", "eager"), ("bfloat16 dense", "eager"), ("bfloat16 dense", "graph"),
    }  # fmt: skip
    assert "skip torch bf16 as a graph: it waits for the device" in said
    assert all(row["vs_dense_graph"] is None for row in rows)


def small_cases(level):
    if level == "kernel":
        return [KernelCase("toy", rows, ("bitmask 0.5",), "bfloat16", threads=0) for rows in (3, 5, 7)]
    return [ModelCase("toy", 2, PACKED[:1], 0)]


def test_a_run_writes_rows_with_the_device_and_replaces_them(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "CASES", {level: (lambda level=level: small_cases(level)) for level in gpu.CASES})
    monkeypatch.setattr(gpu_model, "create", toy)
    real = gpu_model.measure
    monkeypatch.setattr(gpu_model, "measure", lambda *args: real(*args, compiled=False))
    monkeypatch.setattr(gpu, "find", lambda: fake)
    for _ in range(2):
        assert run.main(["--device", "cuda"]) == 0
    rows = record.read_rows(tmp_path / "gpu-kernel-fake-gpu-9000.csv")
    assert len(rows) == 6 and all(row[name] == value for row in rows for name, value in FACTS.items())
    assert all(row["torch"] == torch.__version__ and row["date"] for row in rows)
    assert len(record.read_rows(tmp_path / "gpu-model-fake-gpu-9000.csv")) == 4
    printed = capsys.readouterr().out
    assert "gpu Fake GPU 9000, capability 9.0, driver 1.2" in printed and "10 rows in benchmarks/results" in printed
    assert "vs_cublas" in printed and "vs_dense_graph" in printed


def test_the_budget_ends_a_case_and_those_after_it(fake, monkeypatch, capsys):
    started = []

    def endless(case, device, say):
        started.append(case.name)
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(gpu_kernel, "measure", endless)
    monkeypatch.setattr(gpu_model, "measure", endless)
    monkeypatch.setattr(gpu, "CASES", {level: (lambda level=level: small_cases(level)) for level in gpu.CASES})
    monkeypatch.setattr(gpu, "find", lambda: fake)
    begin = time.monotonic()
    assert run.main(["--device", "cuda", "--budget", "0.3"]) == 1
    assert time.monotonic() - begin < 5 and len(started) == 1
    assert "no time was left of 0.3 s for: toy T=3 bfloat16, toy T=5 bfloat16, " in capsys.readouterr().out


def test_a_level_leaves_time_for_the_next(fake, monkeypatch):
    now = [0.0]
    ran = []

    def taking(seconds):
        def measure(case, device, say):
            now[0] += seconds
            ran.append(case.name)
            return []

        return measure

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_kernel, "measure", taking(30.0))
    monkeypatch.setattr(gpu_model, "measure", taking(30.0))
    monkeypatch.setattr(gpu, "CASES", {level: (lambda level=level: small_cases(level)) for level in gpu.CASES})
    done = gpu.run(parsed("--budget", "100"), fake, print, print)
    assert ran == ["toy T=3 bfloat16", "toy B=2"]  # a second layer would end after 40 % of the time
    assert done.cut == ["toy T=5 bfloat16", "toy T=7 bfloat16"]


@pytest.mark.parametrize(
    ("error", "failed", "said"),
    [
        (RuntimeError("wrong"), ["toy B=2: wrong"], []),
        (torch.OutOfMemoryError("no"), [], ["skip toy B=2: the device has too little memory"]),
        (Unavailable("no timm"), [], ["skip toy B=2: no timm"]),
    ],
)
def test_a_case_that_fails_does_not_end_the_run(fake, monkeypatch, error, failed, said):
    lines = []

    def fails(*args):
        raise error

    monkeypatch.setattr(gpu_model, "measure", fails)
    monkeypatch.setattr(gpu, "CASES", {"model": lambda: small_cases("model")})
    done = gpu.run(parsed("--level", "model"), fake, lines.append, print)
    assert done.failed == failed and lines == said and done.rows == 0
