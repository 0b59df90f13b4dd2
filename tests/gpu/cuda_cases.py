"""The compilations of the CUDA C++ kernel of 2:4 for matrix.py, by NVRTC as CuPy has it."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rmtkern.gpu import ARCHITECTURES
from rmtkern.layouts.gpu_configs import Config, candidates
from rmtkern.layouts.nofm import sparse_product
from tests.gpu import nvrtc


@dataclass(frozen=True)
class CudaCase:
    """One compilation, with GELU."""

    dtype: str
    arch: str
    config: Config
    aligned: bool = True
    gated: bool = False
    needed = ("tensor", "sparse", "LDGSTS")
    loops = True

    @property
    def name(self) -> str:
        kind = ("" if self.aligned else "/ragged") + ("/gated" if self.gated else "")
        return f"sparse_product/{self.dtype}/{self.config.label}{kind}/{self.arch}"


def cuda_cases() -> Iterator[CudaCase]:
    """Every tile for every NVIDIA architecture, with both widths of copies; float16 and pairs with the largest tile."""
    for arch in (name for name in ARCHITECTURES if name.startswith("sm_")):
        for aligned in (True, False):
            tiles = candidates("sparse_product", 2, arch, aligned)
            yield from (CudaCase("bf16", arch, config, aligned) for config in tiles)
            yield CudaCase("bf16", arch, tiles[-1], aligned, gated=True)
            if aligned:
                yield CudaCase("fp16", arch, tiles[-1])


def compile_cuda(case: CudaCase) -> Any:
    """What compiler.figures reads of a case, as of Triton's compiled kernels."""
    widths = sparse_product.WIDE if case.aligned else sparse_product.NARROW
    options = sparse_product.options(case.config, case.dtype == "bf16", "gelu", case.gated, widths)
    cubin, ptx = (nvrtc.compile_to(kind, sparse_product.source(), case.arch, options) for kind in ("CUBIN", "PTX"))
    metadata = SimpleNamespace(shared=sparse_product.shared_bytes(case.config), num_warps=case.config.warps)
    return SimpleNamespace(asm={"cubin": cubin, "ptx": ptx.rstrip(b"\0").decode()}, metadata=metadata)
