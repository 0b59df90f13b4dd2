"""Compiles a Triton kernel for a GPU that is not here and reads what the machine code says. No driver is needed.

Its process must not have TRITON_INTERPRET set. It knows no kernel of ours.
"""

import hashlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Limits:
    """CUDA C Programming Guide, technical specifications per compute capability; bytes of shared memory."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536


LIMITS = {
    "sm_80": Limits(2048, 32, 167936, 166912),
    "sm_86": Limits(1536, 16, 102400, 101376),
    "sm_89": Limits(1536, 24, 102400, 101376),
    "sm_90": Limits(2048, 32, 233472, 232448),
    "sm_100": Limits(2048, 32, 233472, 232448),
    "sm_120": Limits(1536, 24, 102400, 101376),
}
LDS_GFX942 = 65536

# name of a kind of instruction -> how its SASS mnemonic begins
KINDS = {
    "tensor": r"HMMA|HGMMA|UTC\w*MMA|QMMA|OMMA",
    "HGMMA": r"HGMMA",
    "UTCMMA": r"UTC\w*MMA",
    "LDGSTS": r"LDGSTS",
    "UTMALDG": r"UTMALDG",
    "local": r"LDL|STL",
    "POPC": r"POPC",
    "FFMA": r"FFMA",
    "LDG": r"LDG\b",
    "STG": r"STG\b",
}


@dataclass(frozen=True)
class Figures:
    """What was read from one compiled kernel.

    Args:
        registers: 32-bit registers of a thread (VGPRs on AMD).
        spilled: bytes of stack and local memory of a thread (spilled VGPRs on AMD).
        shared: bytes of shared memory of a block.
        blocks: blocks that fit on a multiprocessor, 0 if the shared memory does not fit (waves per SIMD on AMD).
        loop: instructions of the hot loop; 0 if there is none.
        instructions: instructions of the kernel.
        kinds: kind -> instructions of it in the kernel.
        code: first digits of the hash of the assembly.
    """

    registers: int
    spilled: int
    shared: int
    blocks: int
    loop: int
    instructions: int
    kinds: Mapping[str, int]
    code: str


def blocks_per_multiprocessor(arch: str, registers: int, shared: int, warps: int) -> int:
    """Blocks of `warps` warps that are resident together; 0 if the shared memory is more than a block may have.

    As NVIDIA's cuda_occupancy.h: a warp's registers are allocated in units of 256, in one of four equal files; the
    shared memory of a block in units of 128 bytes, 1 KiB of it reserved.
    """
    limits = LIMITS[arch]
    if shared > limits.shared_per_block:
        return 0
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = 4 * (limits.registers // 4 // of_a_warp) // warps
    by_shared = limits.shared // (math.ceil((shared + 1024) / 128) * 128)
    return min(by_registers, by_shared, limits.threads // (32 * warps), limits.blocks)


def mnemonics(sass: str) -> list[str]:
    """The instructions of a disassembly, without operands."""
    found = re.finditer(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    return [match.group(1) for match in found]


def hot_loop(sass: str) -> list[str]:
    """The instructions of the backward branch whose body has the largest share of tensor instructions, or []."""
    lines = sass.splitlines()
    labels: dict[str, int] = {}
    best: list[str] = []
    best_share = -1.0
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label.group(1)] = i
        branch = re.search(r"\bBRA\S*\s+.*`\((\.L_x_\d+)\)", line)
        if branch and branch.group(1) in labels:
            body = mnemonics("\n".join(lines[labels[branch.group(1)] : i + 1]))
            share = sum(bool(re.match(KINDS["tensor"], op)) for op in body) / max(1, len(body))
            if share > best_share:
                best, best_share = body, share
    return best


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([BINARIES / name, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def compile_kernel(
    kernel: Any,
    arch: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Iterable[str] = (),
    *,
    warps: int,
    stages: int,
) -> Any:
    """Compile a `triton.jit` function.

    Args:
        kernel: the function.
        arch: a name in TARGETS.
        types: argument -> Triton type, such as "*fp16" or "i32", of every argument that is no constant.
        constants: argument -> value of every constexpr (None for a pointer that is not given).
        aligned: arguments that are multiples of 16 (pointers: bytes), as the JIT finds for ordinary tensors.
        warps: warps of a program.
        stages: buffers of the pipeline.

    Returns:
        Triton's CompiledKernel.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attrs)
    return triton.compile(source, target=TARGETS[arch], options={"num_warps": warps, "num_stages": stages})


def _hash(assembly: str) -> str:
    without_lines = re.sub(r"//.*|^\s*\.(loc|file).*|^\s*;.*", "", assembly, flags=re.M)
    return hashlib.sha256(without_lines.encode()).hexdigest()[:12]


def _amd_figures(compiled: Any) -> Figures:
    text = compiled.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"no {pattern!r} in the amdgcn assembly; Triton's format changed, adapt this reader")
        return int(found.group(1))

    ops = re.findall(r"^\s+([a-z]\w+)", text.split(".section")[0], re.M)
    kinds = {"tensor": sum(op.startswith("v_mfma") for op in ops)}
    shared = compiled.metadata.shared
    waves = number(r"; Occupancy: (\d+)") if shared <= LDS_GFX942 else 0
    spilled = number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.private_segment_fixed_size:\s+(\d+)")
    vgprs = number(r"\.vgpr_count:\s+(\d+)")
    return Figures(vgprs, spilled, shared, waves, 0, len(ops), kinds, _hash(text))


def figures(compiled: Any, arch: str) -> Figures:
    """Read a compiled kernel; `arch` is the one it was compiled for."""
    if arch.startswith("gfx"):
        return _amd_figures(compiled)
    cubin = compiled.asm["cubin"]
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"no REG and STACK in {usage!r}; cuobjdump's format changed, adapt this reader")
    registers, stack, local = map(int, found.groups())
    sass = _tool("nvdisasm", "-c", cubin)
    ops = mnemonics(sass)
    counts = Counter(kind for op in ops for kind, pattern in KINDS.items() if re.match(pattern, op))
    shared = compiled.metadata.shared
    blocks = blocks_per_multiprocessor(arch, registers, shared, compiled.metadata.num_warps)
    code = _hash(compiled.asm["ptx"])
    return Figures(registers, stack + local, shared, blocks, len(hot_loop(sass)), len(ops), dict(counts), code)
