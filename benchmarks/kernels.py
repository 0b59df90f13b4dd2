"""Times every CPU kernel against the strongest dense linear of the same process, interleaved, correct first.

`python -m benchmarks.kernels [--quick]` prints a table and writes results/kernels-<cpu>.csv. On one thread the clock is
the thread's CPU time, so that a busy machine does not count; on several it is wall time.
"""

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.record import results_file, stamped, write_rows
from rmtkern.environment import cpu_model
from rmtkern.layouts import cpu
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.bitmask import BitmaskWeight
from rmtkern.layouts.block import BlockWeight
from rmtkern.layouts.nofm import NofMWeight
from rmtkern.tables import Table

LAYERS = {
    "vit_b.qkv": (2304, 768),
    "vit_b.proj": (768, 768),
    "vit_b.fc1": (3072, 768),
    "vit_b.fc2": (768, 3072),
    "vit_s.fc1": (1536, 384),
    "vit_s.fc2": (384, 1536),
    "demo.fc1": (1024, 256),
    "demo.fc2": (256, 1024),
}
"""(N, K) of the layers; demo is the width-256 model of rmtkern.demo."""

GELU = {None: (lambda y: y, "none", ""), "gelu": (functional.gelu, "gelu", "none")}
"""activation -> the torch function, oneDNN's name and algorithm."""


@dataclass(frozen=True)
class Case:
    """One interleaved run: the dense forms of a layer and the same layer in some layouts at some sparsities."""

    layer: str
    tokens: int
    contenders: tuple[tuple[str, float], ...] = (("bitmask", 0.5), ("bitmask", 0.7), ("bitmask", 0.9))
    activation: str | None = None
    threads: int = 1


def cases(quick: bool) -> Iterator[Case]:
    """What is timed; quick: the target's shape only."""
    blocks = tuple((f"block {r}x1", sparsity) for r in (2, 4, 8) for sparsity in (0.5, 0.7, 0.9))
    many = (*Case.contenders, ("bitmask", 0.0), ("bitmask", 0.8), ("bitmask", 0.95), ("nofm", 0.5), *blocks)
    yield Case("vit_b.fc1", 1576, many)
    if quick:
        return
    yield Case("vit_b.fc1", 1576, activation="gelu")
    for tokens in (1, 16, 197):
        yield Case("vit_b.fc1", tokens, (*Case.contenders, ("nofm", 0.5), *blocks))
    for layer in ("vit_b.fc2", "vit_b.qkv", "vit_b.proj", "vit_s.fc1", "vit_s.fc2"):
        yield Case(layer, 197)
        yield Case(layer, 1576)
    yield Case("demo.fc1", 3136)
    yield Case("demo.fc2", 3136)
    for tokens in (197, 1576):
        yield Case("vit_b.fc1", tokens, (*Case.contenders, *blocks), threads=2)


def random_weight(n_rows: int, n_cols: int, layout: str, sparsity: float) -> Tensor:
    """Normal entries; a Bernoulli mask of entries or mini-blocks, or for nofm exactly 2 of 4."""
    weight = torch.randn(n_rows, n_cols)
    if layout != "nofm":
        r = block_rows(layout)
        return weight * (torch.rand(n_rows // r, n_cols) >= sparsity).repeat_interleave(r, 0)
    dropped = torch.rand(n_rows, n_cols // 4, 4).argsort(-1)[..., 2:]
    return weight.view(n_rows, -1, 4).scatter(-1, dropped, 0.0).view(n_rows, n_cols)


def block_rows(layout: str) -> int:
    """Rows of a mini-block: 4 of "block 4x1", 1 of "bitmask"."""
    return int(layout.removeprefix("block ").removesuffix("x1")) if layout.startswith("block") else 1


def pack(layout: str, weight: Tensor) -> PackedWeight:
    """The weight in a layout: "bitmask", "block 4x1" or "nofm" (2:4)."""
    if layout.startswith("block"):
        return BlockWeight.pack(weight, r=block_rows(layout), c=1)
    return BitmaskWeight.pack(weight) if layout == "bitmask" else NofMWeight.pack(weight, n=2, m=4)


def time_all(calls: dict[str, Callable[[], Any]], work: float, threads: int, repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds per call [repeats], every call once in each round; `work` (flops) sets how often a round calls."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    inner = max(1, int(4e8 / work))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            for _ in range(inner):
                call()
            if round_:
                times[name].append((clock() - start) / inner * 1e3)
    return {name: np.array(samples) for name, samples in times.items()}


def dense_calls(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> dict[str, Callable[[], Tensor]]:
    """Every fp32 dense form that torch offers for this layer."""
    function, name, algorithm = GELU[activation]
    calls: dict[str, Callable[[], Tensor]] = {"dense torch": lambda: function(functional.linear(x, weight, bias))}
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        calls["dense onednn"] = lambda: onednn(x, weight, bias, name, [], algorithm)
        calls["dense onednn prepacked"] = lambda: onednn(x, prepacked, bias, name, [], algorithm)
    return calls


def relative_error(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> float:
    """Largest error against float64, relative to the largest output."""
    exact = GELU[activation][0](functional.linear(x.double(), weight.double(), bias.double()))
    return float((got - exact).abs().max() / exact.abs().max())


def run(case: Case, peak: float | None, repeats: int) -> list[dict[str, Any]]:
    """Check, time and describe one case; RuntimeError if a kernel is less accurate than twice the dense op."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    n_rows, n_cols = LAYERS[case.layer]
    x, bias = torch.randn(case.tokens, n_cols), torch.randn(n_rows)
    dense = torch.randn(n_rows, n_cols)
    calls = dense_calls(x, dense, bias, case.activation)
    allowed = 2 * relative_error(calls["dense torch"](), x, dense, bias, case.activation) + 4 * 2**-23
    errors = {name: relative_error(call(), x, dense, bias, case.activation) for name, call in calls.items()}
    nbytes = dict.fromkeys(calls, dense.numel() * 4)
    kept = dict.fromkeys(calls, 1.0)
    baselines = tuple(calls)
    for layout, sparsity in case.contenders:
        name = f"{layout} {sparsity:g}"
        weight = random_weight(n_rows, n_cols, layout, sparsity)
        packed = pack(layout, weight)
        calls[name] = lambda packed=packed: cpu.linear(x, packed, bias, case.activation, None)
        errors[name] = relative_error(calls[name](), x, weight, bias, case.activation)
        nbytes[name], kept[name] = packed.nbytes, float((weight != 0).float().mean())
        if errors[name] > allowed:
            raise RuntimeError(f"{case} {name}: relative error {errors[name]:.2e}, allowed {allowed:.2e}")
    flops = 2.0 * case.tokens * n_rows * n_cols
    times = time_all(calls, flops, case.threads, repeats)
    p50 = {name: float(np.median(samples)) for name, samples in times.items()}
    strongest = min(baselines, key=p50.__getitem__)
    rows = []
    for name, samples in times.items():
        executed = flops * kept[name] / p50[name] / 1e6
        rows.append(
            {
                "layer": case.layer,
                "T": case.tokens,
                "N": n_rows,
                "K": n_cols,
                "form": name,
                "activation": case.activation,
                "threads": case.threads,
                "clock": "thread CPU" if case.threads == 1 else "wall",
                "p20_ms": float(np.quantile(samples, 0.2)),
                "p50_ms": p50[name],
                "p80_ms": float(np.quantile(samples, 0.8)),
                "vs_torch": p50["dense torch"] / p50[name],
                "vs_onednn": p50["dense onednn"] / p50[name] if "dense onednn" in p50 else None,
                "vs_strongest": p50[strongest] / p50[name],
                "strongest": strongest,
                "max_rel_err": errors[name],
                "gflops": executed,
                "gflops_dense_equivalent": flops / p50[name] / 1e6,
                "peak_share": executed / peak / case.threads if peak else None,
                "weight_bytes": nbytes[name],
            }
        )
    return rows


PEAK_SOURCE = """
#include <stdio.h>
#include <time.h>
typedef float vec __attribute__((vector_size(WIDTH * 4)));
int main(void) {
    vec a[12] = {}, b = {}, c = {};
    double best = 1e9;
    for (int round = 0; round < 20; ++round) {
        struct timespec from, to;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
        for (int i = 0; i < 1000000; ++i)
            __asm__ volatile(FMAS : REGISTERS : CONSTANTS);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
        double s = (to.tv_sec - from.tv_sec) + 1e-9 * (to.tv_nsec - from.tv_nsec);
        if (s < best) best = s;
    }
    printf("%.3f", 1000000 * 12 * 2.0 * WIDTH / best / 1e9);
}
"""


def fma_peak(isa: str) -> float | None:
    """GFLOP/s of one thread on register-only FMAs, measured; None without a C compiler or for a portable ISA."""
    width = {"avx512": 16, "avx2": 8}.get(isa)
    compiler = shutil.which("cc")
    if width is None or compiler is None:
        return None
    fmas = "".join(f'"vfmadd231ps %13, %12, %{i}\\n"' for i in range(12))
    registers = ", ".join(f'"+v"(a[{i}])' for i in range(12))
    source = PEAK_SOURCE.replace("FMAS", fmas).replace("REGISTERS", registers).replace("CONSTANTS", '"v"(b), "v"(c)')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.c"
        path.write_text(source)
        flags = ["-O2", "-mavx512f" if isa == "avx512" else "-mavx2", "-mfma", f"-DWIDTH={width}"]
        subprocess.run([compiler, *flags, str(path), "-o", str(path.with_suffix(""))], check=True)
        done = subprocess.run([str(path.with_suffix(""))], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    """Run the cases, print what matters, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the target's shape, and no CSV")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    isa, model = cpu.isas()[0], cpu_model()
    peak = fma_peak(isa)
    print(f"{model}, {isa}, torch {torch.__version__}, FMA peak {peak and round(peak)} GFLOP/s per thread")
    rows = []
    for case in cases(options.quick):
        done = run(case, peak, options.repeats)
        shown = ("form", "p50_ms", "vs_torch", "vs_onednn", "vs_strongest", "gflops", "peak_share", "max_rel_err")
        print(f"\n{case.layer} T={case.tokens} activation={case.activation} threads={case.threads}")
        print(Table(shown, [[row[name] for name in shown] for row in done]).to_text(), flush=True)
        rows += done
    if not options.quick:
        path = results_file("kernels")
        write_rows(path, [stamped(row, isa=isa, peak_gflops=peak) for row in rows])
        print(f"\nwrote {path.name}")


if __name__ == "__main__":
    main()
