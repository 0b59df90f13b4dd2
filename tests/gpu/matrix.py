"""Compiles every shipped kernel and config for every architecture and holds the figures to rules and to a baseline.

`python -m tests.gpu.matrix` checks, as make gpu-static does; `--update` rewrites baseline.json and says what got worse.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from rmtkern.layouts.block.triton import blocks_kernel
from rmtkern.layouts.gpu_configs import ARCHITECTURES, DESCRIBING, Config, candidates, precision
from rmtkern.layouts.nofm.triton import EPILOGUE, epilogue_kernel, pairs_kernel
from rmtkern.layouts.spectral.triton import RANK
from rmtkern.layouts.triton import GROUP
from rmtkern.layouts.triton_descriptor import descriptor_kernel
from rmtkern.layouts.triton_product import product_kernel
from rmtkern.layouts.triton_strips import strips_kernel
from tests.gpu import compiler, nvrtc
from tests.gpu.cuda_cases import CudaCase, compile_cuda, cuda_cases
from tests.gpu.more_cases import OtherCase, compile_other, other_cases

BASELINE = Path(__file__).with_name("baseline.json")
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
RAGGED = ("sm_80", "sm_90", "sm_100")  # where N and K that are no multiples of 16 are compiled as well
# figure -> how much of the baseline a new compilation may reach; blocks may not fall
SLACK = {"registers": 1.05, "shared": 1.0, "loop": 1.05, "instructions": 1.10}
# lowrank runs dense's, with its tiles
KERNELS = {
    "dense": product_kernel,
    "bitmask": strips_kernel,
    "spectral": strips_kernel,
    "block": blocks_kernel,
    "nofm": pairs_kernel,
    "descriptor": descriptor_kernel,
}
ONLY = {"descriptor": DESCRIBING}  # architectures, where not all
WITHOUT = {"bitmask": ("a_ptr", "b_ptr")}  # pointers that a layout does not give
PAIRS = ("dense", "bitmask", "spectral")  # gate-up pairs with every tile
DTYPES = {"spectral": ("fp32", "bf16")}
INDICES = {"masks_ptr": "*i64"} | dict.fromkeys(
    ("starts_ptr", "begins_ptr", "columns_ptr", "places_ptr", "picks_ptr"), "*i32"
)
WIDE, WIDER = (64, 64), (128, 128)  # blocks of W as wide as the widest tile, and wider
BLOCKS = {"block": ((16, 16), (32, 32), WIDE, WIDER)}


TOGETHER = 24  # compilations whose machine code is read at once


@dataclass(frozen=True)
class Case:
    """One compilation: bias, GELU, scale and residual are all there, which needs the most registers."""

    layout: str
    dtype: str
    arch: str
    config: Config
    aligned: bool
    gated: bool = False
    block: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        kind = ("" if self.aligned else "/ragged") + ("/gated" if self.gated else "")
        block = "" if self.block is None else f"/{self.block[0]}x{self.block[1]}"
        return f"{self.layout}{block}/{self.dtype}/{self.config.label}{kind}/{self.arch}"


def cases() -> Iterator[Case | OtherCase | CudaCase]:
    """Every shipped config of every kernel, whose tables know only the size of an element, and so fp16 once for each.

    Gate-up pairs for one dtype of each size, of most layouts with the largest tile alone; ragged N and K likewise, on
    some architectures. Of blocks of W both only where they are as wide as the widest tile, and the largest tile alone
    where they are wider.
    """
    for layout, arch in product(KERNELS, ARCHITECTURES):
        if arch not in ONLY.get(layout, ARCHITECTURES):
            continue
        for dtype, block in product(DTYPES.get(layout, ITEMSIZE), BLOCKS.get(layout, (None,))):
            tiles = candidates(layout, ITEMSIZE[dtype], arch, block=block)
            if dtype == "fp16" or block == WIDER:
                if block in (None, WIDER):
                    yield Case(layout, dtype, arch, tiles[-1], True, block=block)
                continue
            for config in tiles:
                yield Case(layout, dtype, arch, config, True, block=block)
                if layout in PAIRS or (block in (None, WIDE) and config == tiles[-1]):
                    yield Case(layout, dtype, arch, config, True, True, block)
            if arch in RAGGED and block in (None, WIDE):
                for config in candidates(layout, ITEMSIZE[dtype], arch, False, block):
                    yield Case(layout, dtype, arch, config, False, block=block)
    for arch, dtype in product(ARCHITECTURES, ("fp16", "bf16")):
        if arch.startswith("sm_8"):  # where PyTorch has a product on sparse tensor cores, which this one follows
            yield from (Case("epilogue", dtype, arch, EPILOGUE, True, gated) for gated in (False, True))
    yield from other_cases()
    yield from cuda_cases()


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel of a case."""
    config = case.config
    kernel = epilogue_kernel if case.layout == "epilogue" else KERNELS[case.layout]
    constants = {
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "GROUP": GROUP,
        "ACTIVATION": "gelu",
        "GATED": case.gated,
        "EVEN_K": case.aligned,
        "PRECISION": precision(ITEMSIZE[case.dtype], case.arch),
    }
    if kernel is strips_kernel:
        constants |= {"RANK": RANK if case.layout == "spectral" else 0}
    if case.block is not None:
        constants |= {"R": case.block[0], "C": case.block[1]}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants |= dict.fromkeys(WITHOUT.get(case.layout, ()))
    types = {}
    for name in kernel.arg_names:
        if name not in constants:
            types[name] = INDICES.get(name, f"*{case.dtype}") if name.endswith("_ptr") else "i32"
            if name.endswith("_desc"):
                rows = config.bm if name == "x_desc" else config.bn
                types[name] = f"tensordesc<{case.dtype}[{rows},{config.bk}]>"
    multiples = {name for name, kind in types.items() if kind == "i32" and case.aligned} - {"T"}
    aligned = [name for name in types if name.endswith("_ptr") or name in multiples]
    return compiler.compile_kernel(
        kernel, case.arch, types, constants, aligned, warps=config.warps, stages=config.stages
    )


def violations(case: Case | OtherCase | CudaCase, figures: compiler.Figures) -> list[str]:
    """What a compilation breaks of the rules that hold without a baseline."""
    found = []
    if figures.spilled or figures.kinds.get("local"):
        found.append(f"{figures.spilled} bytes spilled, {figures.kinds.get('local', 0)} local memory instructions")
    if not figures.blocks:
        found.append(f"{figures.shared} bytes of shared memory or the registers do not fit")
    if isinstance(case, Case) and case.layout == "epilogue":
        return found
    needed = ["tensor"] if isinstance(case, Case) else [*case.needed]
    if case.arch.startswith("sm_"):
        if isinstance(case, Case) and case.layout == "descriptor":
            needed.append("UTMALDG")  # the copy by a descriptor
        elif isinstance(case, Case) and case.aligned:
            needed.append("LDGSTS")  # the asynchronous copy of the pipeline
        if isinstance(case, Case) and case.config.bm >= 64 and case.arch in ("sm_90", "sm_100"):
            needed.append("HGMMA" if case.arch == "sm_90" else "UTCMMA")
        if not figures.loop and (isinstance(case, Case) or case.loops):
            found.append("no loop found in the machine code")
    found += [f"no {kind} instruction" for kind in needed if not figures.kinds.get(kind)]
    return found


def regressions(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """Which figures are worse than the baseline allows."""
    worse = [
        f"{figure} {before[figure]} -> {now[figure]}"
        for figure, slack in SLACK.items()
        if now[figure] > before[figure] * slack
    ]
    if now["blocks"] < before["blocks"]:
        worse.append(f"blocks {before['blocks']} -> {now['blocks']}")
    return worse


def _compile(case: Case | OtherCase | CudaCase) -> Any:
    if isinstance(case, Case):
        return compile_case(case)
    return compile_other(case) if isinstance(case, OtherCase) else compile_cuda(case)


def _run(some: Sequence[Case | OtherCase | CudaCase]) -> list[compiler.Figures | str]:
    """The figures of cases of one architecture, or why one does not compile."""
    found: dict[int, Any] = {}
    compiled = {}
    for i, case in enumerate(some):
        try:
            compiled[i] = _compile(case)
        except Exception as error:
            found[i] = f"does not compile: {error!r:.300}"
    found |= dict(zip(compiled, compiler.figures_of([*compiled.values()], some[0].arch), strict=True))
    return [found[i] for i in range(len(some))]


def _portions(selected: Sequence[Any]) -> list[list[Any]]:
    """The cases of each architecture, a few at a time."""
    by_arch: dict[str, list[Any]] = {}
    for case in selected:
        by_arch.setdefault(case.arch, []).append(case)
    return [some[i : i + TOGETHER] for some in by_arch.values() for i in range(0, len(some), TOGETHER)]


def _start(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    gc.freeze()  # what was imported stays


def check(update: bool, jobs: int, only: str) -> int:
    """Compile all cases whose name contains `only`, print a line for each and what is wrong; 0 if nothing is."""
    began = time.perf_counter()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"kernels": {}}
    compilers = {"triton": triton.__version__, "nvrtc": nvrtc.version()}
    for name, version in compilers.items():
        if baseline.get(name) not in (None, version) and not update:
            print(f"the baseline is of {name} {baseline[name]}, this is {version}: install it or --update")
            return 1
    before = baseline["kernels"]
    selected = [case for case in cases() if only in case.name]
    portions = _portions(selected)
    bad, kernels = [], dict(before) if only else {}
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, get_context("spawn"), _start, (cache,)) as pool,
    ):
        for case, result in zip(chain(*portions), chain.from_iterable(pool.map(_run, portions)), strict=True):
            if isinstance(result, str):
                bad.append(f"{case.name}: {result}")
                continue
            row = {k: v for k, v in asdict(result).items() if k in (*SLACK, "blocks")}
            print(case.name, *(f"{key} {value}" for key, value in row.items()), result.code, flush=True)
            bad += [f"{case.name}: {problem}" for problem in violations(case, result)]
            if case.name in before:
                worse = regressions(row, before[case.name])
                if update and worse:
                    print(f"worse than the baseline: {case.name}: {'; '.join(worse)}")
                elif worse:
                    bad += [f"{case.name}: {problem}" for problem in worse]
            elif not update:
                bad.append(f"{case.name}: not in the baseline; run with --update and commit it with the kernel")
            kernels[case.name] = row
    if not only and not update:
        bad += [f"{name}: in the baseline but not compiled; run with --update" for name in set(before) - set(kernels)]
    if update and not bad:
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items()))
        versions = json.dumps(compilers)[1:-1]
        BASELINE.write_text(f'{{{versions}, "kernels": {{\n{rows}\n}}}}\n')
    print(f"{len(selected)} compilations, {len(bad)} problems, {time.perf_counter() - began:.0f} s")
    print("\n".join(bad))
    return bool(bad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    sys.exit(check(options.update, options.jobs, options.only))
