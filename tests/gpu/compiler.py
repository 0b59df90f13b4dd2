"""Compiles a Triton kernel for a GPU that is not here and reads what the machine code says. No driver is needed.

Its process must not have TRITON_INTERPRET set. It knows no kernel of ours.
"""

import hashlib
import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
INSTRUCTION = 16  # bytes of one in machine code

# name of a kind of instruction -> how its SASS mnemonic begins
KINDS = {
    "tensor": r"HMMA|HGMMA|UTC\w*MMA|QMMA|OMMA",
    "sparse": r"HMMA\.SP",
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


@dataclass(frozen=True)
class Op:
    """One instruction of machine code: where it is, its mnemonic, and where it branches to if it does."""

    address: int
    name: str
    target: int | None = None


def read_code(sass: str) -> list[Op]:
    """The instructions of a disassembly whose branches have addresses."""
    found = re.finditer(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)", sass, re.M)
    ops = []
    for address, name, operands in (match.groups() for match in found):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.split(".")[0] == "BRA" else None
        ops.append(Op(int(address, 16), name, int(target.group(1), 16) if target else None))
    return ops


def hot_loop(code: Sequence[Op]) -> list[str]:
    """Mnemonics of the backward branch whose body has the largest share of tensor instructions, or []."""
    best: list[str] = []
    best_share = -1.0
    for branch in code:
        if branch.target is not None and branch.target < branch.address:
            body = [op.name for op in code if branch.target <= op.address <= branch.address]
            share = sum(bool(re.match(KINDS["tensor"], name)) for name in body) / len(body)
            if share > best_share:
                best, best_share = body, share
    return best


def _tool(name: str, *flags: str, image: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run([BINARIES / name, *flags, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin, which is an ELF file of 64 bits: its sections .text.*, one after the other."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    strings = headers[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", strings + name)
    )


def disassemble(arch: str, codes: Sequence[bytes]) -> list[list[Op]]:
    """The instructions of some machine codes; all by one call, since the tool takes its time to start."""
    if not codes:
        return []
    number = arch.removeprefix("sm_")
    name = f"SM{number}{'a' if int(number) >= 90 else ''}"
    ops = read_code(_tool("nvdisasm", "--binary", name, image=b"".join(codes)))
    by_address = {op.address: op for op in ops}
    found, begin = [], 0
    for code in codes:
        inside = (by_address.get(begin + at) for at in range(0, len(code), INSTRUCTION))
        moved = (op for op in inside if op is not None)
        found.append(
            [Op(op.address - begin, op.name, None if op.target is None else op.target - begin) for op in moved]
        )
        begin += len(code)
    return found


def compile_kernel(
    kernel: Any,
    arch: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Iterable[str] = (),
    *,
    warps: int,
    stages: int,
    most_registers: int | None = None,
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
        most_registers: that a thread may have, where they are to be fewer than it needs.

    Returns:
        Triton's CompiledKernel.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    if most_registers is not None:  # NVIDIA's alone know it
        options["maxnreg"] = most_registers
    return triton.compile(source, target=TARGETS[arch], options=options)


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


def figures_of(compiled: Sequence[Any], arch: str) -> list[Figures]:
    """Read compiled kernels; `arch` is the one that they were compiled for."""
    if arch.startswith("gfx"):
        return [_amd_figures(kernel) for kernel in compiled]
    codes = disassemble(arch, [machine_code(kernel.asm["cubin"]) for kernel in compiled])
    return [_nvidia_figures(kernel, arch, code) for kernel, code in zip(compiled, codes, strict=True)]


def figures(compiled: Any, arch: str) -> Figures:
    """Read one compiled kernel."""
    return figures_of([compiled], arch)[0]


def _nvidia_figures(compiled: Any, arch: str, code: Sequence[Op]) -> Figures:
    usage = _tool("cuobjdump", "--dump-resource-usage", image=compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"no REG and STACK in {usage!r}; cuobjdump's format changed, adapt this reader")
    registers, stack, local = map(int, found.groups())
    counts = Counter(kind for op in code for kind, pattern in KINDS.items() if re.match(pattern, op.name))
    shared = compiled.metadata.shared
    blocks = blocks_per_multiprocessor(arch, registers, shared, compiled.metadata.num_warps)
    digits = _hash(compiled.asm["ptx"])
    return Figures(registers, stack + local, shared, blocks, len(hot_loop(code)), len(code), dict(counts), digits)
