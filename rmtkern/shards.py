"""Tensors in one safetensors file or in several with an index, as transformers writes them. It knows no model.

What stands in an index is not trusted: a shard is a plain file name beside the index, and holds what the index says.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rmtkern import storage
from rmtkern.errors import short
from rmtkern.storage import MAX_HEADER, read_json, read_names, replacing, write_tensors

__all__ = [
    "INDEX",
    "SUFFIX",
    "WEIGHTS",
    "as_bytes",
    "locate",
    "nbytes_of",
    "read_metadata",
    "read_tensors",
    "shard_of",
    "target_of",
    "write",
]

SUFFIX = ".safetensors"
INDEX = ".index.json"
"""What stands after the name of the one file in the name of an index."""
WEIGHTS = "model.safetensors"
"""Name of the one file in a folder."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SERIES = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def as_bytes(size: int | str) -> int:
    """A size in bytes.

    Args:
        size: bytes, or a number and a unit such as "5GB" or "500 MiB".

    Raises:
        TypeError: neither an int nor a str.
        ValueError: not such a text, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"max_shard_size: expected bytes or a text such as '5GB', got {type(size).__name__}")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if isinstance(size, str) and found is None:
        raise ValueError(f"max_shard_size: expected bytes or a text such as '5GB' or '500MiB', got {short(size)}")
    nbytes = size if isinstance(size, int) else int(float(found[1]) * _UNITS[found[2].upper()])  # type: ignore[index]
    if nbytes < 1:
        raise ValueError(f"max_shard_size: expected at least one byte, got {short(size)}")
    return nbytes


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that a path to write to means: itself if it ends in ".safetensors", else `WEIGHTS` in that folder.

    Raises:
        ValueError: the folder is a file.
    """
    given = Path(path)
    if given.suffix == SUFFIX and not given.is_dir():
        return given
    if given.exists() and not given.is_dir():
        raise ValueError(f"{given}: is a file; give a name that ends in {SUFFIX}, or a folder")
    return given / WEIGHTS


def locate(path: str | os.PathLike[str]) -> Path:
    """The safetensors file, or the index of several, that a path to read means.

    Args:
        path: of a safetensors file or an index; of a file that is only there in shards; or of a folder with `WEIGHTS`.

    Raises:
        ValueError: nothing is there.
    """
    given = Path(path)
    source = given / WEIGHTS if given.is_dir() else given
    index = source.with_name(source.name + INDEX)
    if source.is_file():  # as in transformers, one file goes before an index
        return source
    if index.is_file():
        return index
    what = f"no {WEIGHTS} and no {index.name} in it" if given.is_dir() else "no such file"
    raise ValueError(f"{given}: {what}; give the path of a safetensors file, of an index of shards, or of their folder")


def _shard(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}{SUFFIX}"


def _is_index(source: Path) -> bool:
    return source.name.endswith(INDEX)


def _check_name(key: str, shard: object) -> None:
    """Refuse a shard that is more than the name of a file beside the index."""
    plain = isinstance(shard, str) and shard.isprintable() and len(shard.encode()) <= 255 and not set(shard) & {*"/\\"}
    if not plain or not str(shard).endswith(SUFFIX):
        raise ValueError(f"tensor {short(key)} lies in {short(shard)}, which is no plain name of a {SUFFIX} file")


def _read_index(source: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The texts of an index's metadata, and tensor -> shard; ValueError without the file's name."""
    if source.stat().st_size > MAX_HEADER:
        raise ValueError(f"it is larger than {MAX_HEADER} bytes")
    index = read_json(source.read_bytes())
    if not isinstance(index, dict) or not isinstance(index.get("metadata", {}), dict):
        raise ValueError("it is not an object with metadata and weight_map")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"weight_map: expected the file of each tensor, got {short(places)}")
    for key, shard in places.items():
        _check_name(key, shard)
    texts = {name: text for name, text in index.get("metadata", {}).items() if isinstance(text, str)}
    return texts, places


def _check_series(shards: list[str]) -> None:
    """Refuse an index that names some of its numbered shards and not the others."""
    found = [match for shard in shards if (match := _SERIES.fullmatch(shard))]
    series = {(match["stem"], match["count"]) for match in found}
    if len(found) < len(shards) or len(series) > 1:
        return  # somebody named them in another way
    (stem, count), numbers = series.pop(), {int(match["number"]) for match in found}
    lost = [number for number in range(1, int(count) + 1) if number not in numbers]
    if lost:
        raise ValueError(f"it places no tensor in shard {_shard(stem, lost[0], int(count))}")


def _check_shards(source: Path, places: Mapping[str, str]) -> None:
    """Refuse shards that are missing, hold a tensor twice, or hold other tensors than the index says."""
    shards = sorted(set(places.values()))
    _check_series(shards)
    for shard in shards:
        if not source.with_name(shard).is_file():
            keys = [key for key, place in places.items() if place == shard]
            raise ValueError(f"shard {shard} is missing, with {len(keys)} tensors ({short(keys[0])}, ...)")
    held: dict[str, str] = {}
    for shard in shards:
        for key in read_names(source.with_name(shard)):
            if key in held:
                raise ValueError(f"tensor {short(key)} stands in two shards, {held[key]} and {shard}")
            held[key] = shard
    for key, shard in held.items():
        if places.get(key) != shard:
            theirs = "names it nowhere" if key not in places else f"says that {places[key]} does"
            raise ValueError(f"shard {shard} holds the tensor {short(key)}, but the index {theirs}")
    for key, shard in places.items():
        if key not in held:
            raise ValueError(f"shard {shard} lacks the tensor {short(key)}")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of the metadata, of a safetensors file or an index.

    Args:
        path: as `locate` takes it.

    Raises:
        ValueError: nothing is there, or a damaged file; it names the tensor.
    """
    source = locate(path)
    if not _is_index(source):
        return storage.read_metadata(source)
    try:
        return _read_index(source)[0]
    except ValueError as error:
        raise ValueError(f"{source}: not a complete index: {error}; copy it again") from error


def read_tensors(path: str | os.PathLike[str], *, mmap: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the shards of an index, on the CPU.

    Args:
        path: as `locate` takes it.
        mmap: as `storage.read_tensors` takes it.

    Raises:
        ValueError: nothing is there, a damaged file, or shards that are missing, hold a tensor twice, or hold another
            tensor than the index says; it names the shard and the tensor.
    """
    source = locate(path)
    if not _is_index(source):
        return storage.read_tensors(source, mmap=mmap)
    try:
        places = _read_index(source)[1]
        _check_shards(source, places)
    except ValueError as error:
        raise ValueError(f"{source}: {error}; copy the index and its shards again") from error
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        tensors |= storage.read_tensors(source.with_name(shard), mmap=mmap)
    return tensors


def nbytes_of(path: str | os.PathLike[str]) -> int:
    """Size of the files that hold a checkpoint: of the one file, or of an index and its shards [bytes].

    Args:
        path: as `locate` takes it, of files that can be read.
    """
    source = locate(path)
    shards = set(_read_index(source)[1].values()) if _is_index(source) else ()
    return sum(file.stat().st_size for file in (source, *map(source.with_name, shards)))


def shard_of(path: str | os.PathLike[str], key: str) -> str | None:
    """Name of the shard that holds a tensor, or None if all are in one file.

    Args:
        path: as `locate` takes it, of files that can be read.
        key: the tensor's name.
    """
    source = locate(path)
    return _read_index(source)[1].get(key) if _is_index(source) else None


def _split(state: Mapping[str, Tensor], most: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, in parts of at most so many bytes; a larger one has a part of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    nbytes = 0
    for key, tensor in state.items():
        if most is not None and parts[-1] and nbytes + tensor.nbytes > most:
            parts.append({})
            nbytes = 0
        parts[-1][key] = tensor
        nbytes += tensor.nbytes
    return parts


def _shards_of(index: Path, stem: str) -> set[str]:
    """Names of the shards that an index of ours has; none if it is not there, damaged or somebody else's."""
    try:
        shards = set(_read_index(index)[1].values())
    except (OSError, ValueError):
        return set()
    ours = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{8}}")
    return {shard for shard in shards if (match := _SERIES.fullmatch(shard)) and ours.fullmatch(match["stem"])}


def write(
    state: Mapping[str, Tensor],
    target: str | os.PathLike[str],
    metadata: Mapping[str, str],
    max_shard_size: int | None = None,
) -> None:
    """Write tensors to a safetensors file, or to shards and their index beside it; complete or not at all.

    A new index takes the place of the old one only when all of its shards are there under names of their own, so that
    a crash leaves the old files whole; then the old shards go. The names are `<stem>-<hash>-00001-of-00003.safetensors`
    and `<stem>.safetensors.index.json`.

    Args:
        state: name -> tensor on any device.
        target: of the one file; its folder is there.
        metadata: name -> text, beside `format: pt`.
        max_shard_size: most bytes of tensors in a file, unless one tensor has more; None for one file.

    Raises:
        ValueError: a tensor's dtype has no name in safetensors, or the stem cannot be in a shard's name.
        OSError: a file cannot be written; old ones are as they were.
    """
    target = Path(target)
    stem, index = target.name.removesuffix(SUFFIX), target.with_name(target.name + INDEX)
    old = _shards_of(index, stem)
    parts = _split(state, max_shard_size)
    if len(parts) == 1:
        write_tensors(state, target, metadata)
        index.unlink(missing_ok=True)
        shards: list[str] = []
    else:
        content = json.dumps([dict(metadata), [list(part) for part in parts]])
        series = f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        shards = [_shard(series, number, len(parts)) for number in range(1, len(parts) + 1)]
        _check_name(next(iter(state)), shards[0])
        _write_shards(parts, shards, index, metadata)
        target.unlink(missing_ok=True)
    for shard in old - set(shards):
        index.with_name(shard).unlink(missing_ok=True)


def _write_shards(parts: list[dict[str, Tensor]], shards: list[str], index: Path, metadata: Mapping[str, str]) -> None:
    fresh = [index.with_name(shard) for shard in shards if not index.with_name(shard).exists()]
    try:
        for part, shard in zip(parts, shards, strict=True):
            write_tensors(part, index.with_name(shard), {})
        places = {key: shard for part, shard in zip(parts, shards, strict=True) for key in part}
        nbytes = sum(tensor.nbytes for part in parts for tensor in part.values())
        record = {"metadata": {"total_size": nbytes, "format": "pt", **metadata}, "weight_map": places}
        with replacing(index) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
    except BaseException:
        for path in fresh:
            path.unlink(missing_ok=True)
        raise
