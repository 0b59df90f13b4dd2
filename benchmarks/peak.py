"""The FMA peak of one thread, measured on instructions that touch registers only; fp32 FMA and vdpbf16ps.

It is the yardstick of the peak shares; it knows no kernel.
"""

import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["fma_peak"]

SOURCE = """
#include <stdio.h>
#include <time.h>
int main(void) {
    double best = 1e9;
    for (int round = 0; round < 20; ++round) {
        struct timespec from, to;
        __asm__ volatile(ZEROS ::: CLOBBERS);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
        for (int i = 0; i < 500000; ++i)
            __asm__ volatile(FMAS ::: CLOBBERS);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
        double s = (to.tv_sec - from.tv_sec) + 1e-9 * (to.tv_nsec - from.tv_nsec);
        if (s < best) best = s;
    }
    printf("%.3f", 500000.0 * FLOPS / best / 1e9);
}
"""


@dataclass(frozen=True)
class _Fma:
    """One instruction: its name, register prefix, chains in flight, flops of one, and what the CPU must have."""

    instruction: str
    register: str
    chains: int
    flops: int
    cpu_flag: str
    compiler_flag: str


_FMAS = {
    ("float32", "avx512"): _Fma("vfmadd231ps", "zmm", 24, 2 * 16, "avx512f", "-mavx512f"),
    ("float32", "avx2"): _Fma("vfmadd231ps", "ymm", 12, 2 * 8, "fma", "-mavx2"),
    ("bfloat16", "avx512"): _Fma("vdpbf16ps", "zmm", 24, 2 * 32, "avx512_bf16", "-mavx512f"),
}


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())


@functools.cache
def fma_peak(dtype: str, isa: str) -> float | None:
    """Peak of one thread.

    Args:
        dtype: "float32" or "bfloat16".
        isa: "avx512", "avx2" or "portable"; a name with a suffix counts as the set before it.

    Returns:
        GFLOP/s, or None where this CPU has no such instruction or there is no C compiler.
    """
    fma = _FMAS.get((dtype, isa.partition("_")[0]))
    compiler = shutil.which("cc")
    if fma is None or compiler is None or fma.cpu_flag not in _cpu_flags():
        return None
    names = [f"{fma.register}{i}" for i in range(fma.chains + 2)]
    *accumulators, a, b = (f"%%{name}" for name in names)
    zero = "vpxord" if fma.register == "zmm" else "vpxor"
    parts = {
        "ZEROS": "".join(f'"{zero} {r}, {r}, {r}\\n"' for r in (*accumulators, a, b)),
        "FMAS": "".join(f'"{fma.instruction} {a}, {b}, {r}\\n"' for r in accumulators),
        "CLOBBERS": ", ".join(f'"{name}"' for name in names),
        "FLOPS": str(fma.chains * fma.flops),
    }
    source = SOURCE
    for name, text in parts.items():
        source = source.replace(name, text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.c"
        path.write_text(source)
        program = str(path.with_suffix(""))
        subprocess.run([compiler, "-O2", fma.compiler_flag, str(path), "-o", program], check=True)
        return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
