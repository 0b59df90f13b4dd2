"""Files on disk: written complete or not at all, and safetensors: metadata and tensors. It knows no model, no layout.

A header is checked here by name before the safetensors library maps the tensors, so that an error says which tensor.
"""

import json
import math
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rmtkern.errors import short

__all__ = [
    "DTYPE_NAMES",
    "LINE",
    "check_tensors",
    "read_json",
    "read_metadata",
    "read_names",
    "read_tensors",
    "replacing",
    "write_tensors",
]

MAX_HEADER = 100_000_000
"""Largest safetensors header, or index of shards, that is read [bytes]; the safetensors library's own limit."""
LINE = 64
"""Bytes of a cache line: tensors of a multiple of it begin at one, so that kernels can use them where they lie."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What safetensors calls a dtype."""
_ENTRY = {"dtype", "shape", "data_offsets"}
_MAX_DIMENSIONS = 64  # of a torch tensor


def read_json(text: bytes) -> Any:
    """What a JSON text says.

    Args:
        text: UTF-8.

    Raises:
        ValueError: it is not complete JSON, or names a key of an object twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {short(name)} stands there twice")
            found[name] = value
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _check_entries(entries: Mapping[str, Any], nbytes: int) -> None:
    """Refuse tensors that do not cover the bytes after the header one after another; the message names the tensor."""
    spans = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != _ENTRY:
            raise ValueError(f"tensor {short(name)}: expected dtype, shape and data_offsets, got {short(entry)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"tensor {short(name)}: unknown dtype {short(dtype)}; known: {', '.join(_DTYPES)}")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
            raise ValueError(f"tensor {short(name)}: expected a shape of integers >= 0, got {short(shape)}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise ValueError(f"tensor {short(name)}: expected two data_offsets >= 0, got {short(offsets)}")
        begin, end = offsets
        wanted = math.prod(shape) * _DTYPES[dtype].itemsize
        if end - begin != wanted:
            raise ValueError(f"tensor {short(name)}: {dtype} {short(shape)} has {wanted} bytes, not {end - begin}")
        if end > nbytes:
            raise ValueError(f"tensor {short(name)} ends {end - nbytes} bytes after the end of the file")
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            what = "overlaps the one before" if begin < place else f"begins {begin - place} bytes after the one before"
            raise ValueError(f"tensor {short(name)} {what}")
        place = end
    if place != nbytes:
        raise ValueError(f"{nbytes - place} bytes at its end belong to no tensor")


def _read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata and the checked entries of a safetensors file."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"{source}: no such file; give the path of a safetensors file")
    size = source.stat().st_size
    with source.open("rb") as file:
        head = file.read(8)
        if len(head) < 8 or (length := struct.unpack("<Q", head)[0]) > MAX_HEADER:
            raise ValueError(f"{source}: not a safetensors file; give one, or copy it again")
        text = file.read(min(length, size))
    try:
        if len(text) < length or not text.startswith(b"{"):
            raise ValueError("its header is cut off" if len(text) < length else "its header is no JSON object")
        header = read_json(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not a table of texts")
        _check_entries(header, size - 8 - length)
    except ValueError as error:
        raise ValueError(f"{source}: not a complete safetensors file: {str(error)[:200]}; copy it again") from error
    return metadata, header


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The safetensors metadata of a file, without its tensors.

    Args:
        path: of the file.

    Returns:
        Name -> text; {} if the file has none.

    Raises:
        ValueError: no such file, or not a complete safetensors file; it names the tensor.
    """
    return _read_header(path)[0]


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of a safetensors file's tensors; ValueError as `read_metadata`."""
    return list(_read_header(path)[1])


def read_tensors(path: str | os.PathLike[str], *, mmap: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: of the file.
        mmap: map the file into memory, so that its pages are read when they are used and are shared by processes;
            False copies them, which a file that may change in place needs.

    Raises:
        ValueError: no such file, a damaged one, or not safetensors; it names the tensor.
    """
    _read_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy it again") from error
    return tensors if mmap else {name: tensor.clone() for name, tensor in tensors.items()}


def check_tensors(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse what safetensors cannot hold; ValueError names it.

    Args:
        state: name -> what should be a tensor; in the state of a quantised layer not everything is.
        path: of the file that it was for.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path}: {name} is no tensor but a {type(tensor).__name__}, which safetensors does not hold"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: tensor {name} has dtype {tensor.dtype}, which safetensors does not hold")


def write_tensors(state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file; complete or not at all: beside it first, then renamed.

    Tensors of whole cache lines come first and begin at one, in the file and so in memory that it is mapped to. No more
    than one tensor is held beside those given.

    Args:
        state: name -> tensor on any device; those that share memory are stored once for each name.
        path: of the file.
        metadata: name -> text, beside `format: pt`.

    Raises:
        ValueError: an entry is no tensor, or its dtype has no name in safetensors.
        OSError: the file cannot be written; an old one is as it was.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    check_tensors(state, path)
    names = sorted(state, key=lambda name: (state[name].nbytes % LINE > 0, -state[name].itemsize, name))
    place = 0
    for name in names:
        tensor = state[name]
        end = place + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            if state[name].numel():
                plain = state[name].detach().cpu().contiguous()
                file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


def _sync(path: Path) -> None:
    """Wait until what was written to a file, or to the names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file that takes the place of another one when the block ends well, and is gone when it does not.

    Args:
        path: of the file in the end.

    Yields:
        The path to write to, beside it; nothing is there yet.

    Raises:
        OSError: the file cannot be written; an old one is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as if written directly: some libraries make private files
        _sync(temporary)  # before the rename, or a crash of the machine could leave an empty file of that name
        temporary.replace(target)
        _sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
