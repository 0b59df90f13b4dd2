"""CUDA C++ compiled by NVRTC, as CuPy does it; the library comes with PyTorch's CUDA wheels. No driver is needed.

Source: NVRTC's documentation, "User Interface".
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["compile_to", "version"]


@functools.cache
def _library() -> ctypes.CDLL:
    places = (Path(place) for place in getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", ()))
    found = [path for place in places for path in sorted(place.glob("*/lib/libnvrtc.so.*")) if ".alt" not in path.name]
    if not found:
        raise FileNotFoundError("no libnvrtc; it comes with torch for CUDA, or by: pip install nvidia-cuda-nvrtc")
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):  # which it looks for by its name alone
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(found[-1]))


def version() -> str:
    """Such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _check(code: int, log: str = "") -> None:
    if code:
        _library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"nvrtc: {_library().nvrtcGetErrorString(code).decode()} {log}".strip())


def _output(program: Any, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, text))
    return text.raw


def compile_to(kind: str, source: str, arch: str, options: Sequence[str], name: str = "kernel.cu") -> bytes:
    """Compile a module.

    Args:
        kind: "PTX" or "CUBIN".
        source: CUDA C++.
        arch: such as "sm_80".
        options: of the compiler.
        name: of the file in messages and line numbers.

    Raises:
        RuntimeError: it does not compile; with the compiler's log.
    """
    nvrtc, program = _library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        given = [f"-arch={arch if kind == 'CUBIN' else arch.replace('sm', 'compute')}", "-lineinfo", *options]
        code = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*map(str.encode, given)))
        _check(code, _output(program, "ProgramLog").rstrip(b"\0").decode() if code else "")
        return _output(program, kind)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
