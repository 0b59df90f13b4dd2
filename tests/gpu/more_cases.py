"""The compilations of kernels that are no layout's linear, for matrix.py: each for every architecture, at its tile."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from rmtkern.gpu import ARCHITECTURES, precision
from rmtkern.layouts import triton_masked
from rmtkern.layouts.gpu_configs import choose
from rmtkern.layouts.triton import GROUP
from rmtkern.spectrum import triton_sparsify
from tests.gpu import compiler

RAGGED = ("sm_80", "sm_90", "sm_100")  # where sizes that are no multiples of 16 are compiled as well
PRODUCTS = {
    "sparsify/recompose": triton_sparsify.recompose_kernel,
    "masked/forward": triton_masked.forward_kernel,
    "masked/input": triton_masked.input_gradient_kernel,
    "masked/weight": triton_masked.weight_gradient_kernel,
}
PASSES = {
    "sparsify/select": triton_sparsify.select_kernel,
    "sparsify/equals": triton_sparsify.rows_kernel,
    "sparsify/rows": triton_sparsify.rows_kernel,
    "masked/activation": triton_masked.activation_gradient_kernel,
}
KERNELS = {**PRODUCTS, **PASSES}
# argument -> type, where it is a pointer and not of the weight's dtype
FACTORS = ("u_ptr", "s_ptr", "vh_ptr", "limit_u_ptr", "limit_v_ptr")
TYPES = {**dict.fromkeys((*FACTORS, "sums_ptr"), "*fp32"), "ties_ptr": "*i64"} | dict.fromkeys(
    ("words_ptr", "counts_ptr", "prefix_ptr", "histogram_ptr"), "*i32"
)
# any number, also where the other sizes are multiples of 16
ANY = {"sparsify": ("N", "ROWS", "PER_GROUP", "GROUP_ROWS", "WORDS"), "masked": ("T",)}


@dataclass(frozen=True)
class OtherCase:
    """One compilation; the dtype is that of the weight."""

    op: str
    dtype: str
    arch: str
    aligned: bool

    @property
    def name(self) -> str:
        return f"{self.op}/{self.dtype}{'' if self.aligned else '/ragged'}/{self.arch}"

    @property
    def needed(self) -> tuple[str, ...]:
        """Kinds of instructions that the kernel must have."""
        if self.op not in PRODUCTS:
            return ()
        if not self.arch.startswith("sm_"):
            return ("tensor",)
        own = {"sm_90": ("HGMMA",), "sm_100": ("UTCMMA",)}
        return ("tensor", *(("LDGSTS",) if self.aligned else ()), *own.get(self.arch, ()))

    @property
    def loops(self) -> bool:
        """Whether the kernel has a loop."""
        return self.op != "masked/activation"


def other_cases() -> Iterator[OtherCase]:
    """Every kernel in float32 and in bfloat16, from which float16 differs only in a conversion.

    On some architectures alone: sizes that are no multiples of 16, and a bfloat16 weight that is read or written once.
    """
    for op, arch in product(KERNELS, ARCHITECTURES):
        multiplies = op in PRODUCTS and op.startswith("masked/")
        yield OtherCase(op, "fp32", arch, True)
        if arch in RAGGED or multiplies:
            yield OtherCase(op, "bf16", arch, True)
        if arch in RAGGED and op in PRODUCTS:
            yield OtherCase(op, "fp32", arch, False)
        if arch in RAGGED and multiplies:
            yield OtherCase(op, "bf16", arch, False)


def _sparsify(step: str, case: OtherCase) -> tuple[dict[str, Any], int, int]:
    tiles = triton_sparsify.TILES
    if step == "select":
        tile = tiles["select"]
        return {"SHIFT": 20, "BINS": 2048, "BLOCK": tile.bn, "STEPS": tile.bk}, tile.warps, tile.stages
    if step == "recompose":
        tile = tiles["recompose" if case.aligned else "ragged"]
        constants = {"BK": tile.bk, "EVEN_R": case.aligned, "TALL": False, "PRECISION": precision(4, case.arch)}
    else:
        tile = tiles["rows"]
        constants = {"ties_ptr": None, "words_ptr": None} if step == "equals" else {}
    return {"BM": tile.bm, "BN": tile.bn, **constants}, tile.warps, tile.stages


def _masked(step: str, case: OtherCase) -> tuple[dict[str, Any], int, int]:
    if step == "activation":
        return {"BM": triton_masked.BM, "BN": triton_masked.BN, "ACTIVATION": "gelu"}, 4, 1
    itemsize = 4 if case.dtype == "fp32" else 2
    tile = choose("masked", itemsize, case.arch, 1000, case.aligned)
    constants = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": GROUP, "EVEN": case.aligned}
    constants |= {"PRECISION": precision(itemsize, case.arch)}
    return constants | ({"ACTIVATION": "gelu"} if step == "forward" else {}), tile.warps, tile.stages


def compile_other(case: OtherCase) -> Any:
    """Triton's compiled kernel of a case."""
    op, step = case.op.split("/")
    constants, warps, stages = (_sparsify if op == "sparsify" else _masked)(step, case)
    kernel = KERNELS[case.op]
    own = {"threshold_ptr": "*i32" if step in ("equals", "rows") else "*fp32"}
    types = {
        name: (TYPES | own).get(name, f"*{case.dtype}") if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    aligned = [name for name in types if name.endswith("_ptr") or (case.aligned and name not in ANY[op])]
    return compiler.compile_kernel(kernel, case.arch, types, constants, aligned, warps=warps, stages=stages)
