"""Files that are written whole or not at all, and safetensors: metadata and tensors. It knows no model, no layout."""

import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["read_metadata", "read_tensors", "replacing", "write_tensors"]

MAX_HEADER = 100_000_000
"""Largest safetensors header that is read [bytes]; the limit of the safetensors library itself."""


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The safetensors metadata of a file, without its tensors.

    Args:
        path: of the file.

    Returns:
        Name -> text; {} if the file has none.

    Raises:
        ValueError: no such file, or not a complete safetensors header.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"{source}: no such file; give the path of a safetensors file")
    with source.open("rb") as file:
        head = file.read(8)
        if len(head) < 8 or (length := struct.unpack("<Q", head)[0]) > MAX_HEADER:
            raise ValueError(f"{source}: not a safetensors file; give one, or copy it again")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a complete safetensors file ({str(error)[:60]}); copy it again") from error
    found = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{source}: not a safetensors file: its metadata is not a table of texts; copy it again")
    return found


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is damaged or not safetensors.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy it again") from error


def write_tensors(state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write tensors to a file; complete or not at all: beside it first, then renamed.

    Args:
        state: name -> tensor on any device; those that share memory are stored once for each name.
        path: of the file.
        metadata: name -> text, beside `format: pt`.

    Raises:
        OSError: the file cannot be written; an old one is as it was.
    """
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        start = plain.untyped_storage().data_ptr()
        kept[name] = plain.clone() if start in seen else plain
        seen.add(start)
    with replacing(path) as temporary:
        save_file(kept, temporary, metadata={"format": "pt", **metadata})


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
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
