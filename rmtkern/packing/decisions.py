"""Decisions: the times that pack_ measured, by what they depend on; saved as JSON and used again.

It checks and stores times, and knows no module, no kernel and not how a form is chosen from them.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

from rmtkern.environment import cpu_model
from rmtkern.errors import short
from rmtkern.layouts import cpu
from rmtkern.storage import replacing

__all__ = ["DecisionKey", "DecisionLog", "Decisions", "Times"]

Times = Mapping[int, Mapping[str, float]]  # token count -> candidate -> ms

FORMAT, FORMAT_VERSION = "rmtkern decisions", 1
MAX_NBYTES = 64 * 2**20
"""Largest file that is read. An entry takes under 1 KiB, and a model a few dozen entries."""


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name}: expected a non-empty string, got {short(value)}")


def _count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {short(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {short(value)}")


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"{name}: expected a non-empty list, got {short(value)}")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class DecisionKey:
    """What the times of one group of layers depend on; times are used again only where every field is equal.

    Args:
        cpu: as `environment.cpu_model` names it; on a GPU, its name.
        isa: instruction set of our kernels: RMTKERN_ISA, or the best one here, or "none" without the extension; the
            name of the backend if RMTKERN_BACKEND forces another one. On a GPU: its compute capability, the version of
            triton, PyTorch's precision of float32 products, and what else the times depend on, such as autotuned tiles.
        threads: of torch; 1 on a GPU.
        rmtkern: package version.
        torch: version of PyTorch, which runs the dense forms.
        shape: (N, K).
        dtype: of the weight, such as "float32".
        bias: whether there is one.
        activation: a name in `ops.ACTIVATIONS` or None.
        tokens: token counts T, ascending.
        sparsity_step: sparsity in whole steps of `packing.SPARSITY_STEP`.
        candidates: labels of the forms that were tried, sorted.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range.
    """

    cpu: str
    isa: str
    threads: int
    rmtkern: str
    torch: str
    shape: tuple[int, int]
    dtype: str
    bias: bool
    activation: str | None
    tokens: tuple[int, ...]
    sparsity_step: int
    candidates: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("cpu", "isa", "rmtkern", "torch", "dtype"):
            _text(name, getattr(self, name))
        if self.activation is not None:
            _text("activation", self.activation)
        _count("threads", self.threads)
        _count("sparsity_step", self.sparsity_step, 0)
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias: expected a bool, got {short(self.bias)}")
        for name in ("shape", "tokens"):
            sizes = _tuple(name, getattr(self, name))
            for size in sizes:
                _count(name, size)
            object.__setattr__(self, name, sizes)
        if len(self.shape) != 2:
            raise ValueError(f"shape: expected [N, K], got {short(self.shape)}")
        if list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError(f"tokens: expected ascending counts, got {short(self.tokens)}")
        labels = _tuple("candidates", self.candidates)
        for label in labels:
            _text("candidates", label)
        object.__setattr__(self, "candidates", tuple(sorted(set(labels))))


def _milliseconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a time in ms, got {short(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not 0 < found < math.inf:
        raise ValueError(f"expected a finite time above 0 ms, got {short(value)}")
    return found


def _checked(key: DecisionKey, ms: object) -> dict[int, dict[str, float]]:
    """A copy of the times that belong to a key."""
    if not isinstance(ms, Mapping) or set(ms) != set(key.tokens):
        raise ValueError(f"ms: expected times for the token counts {list(key.tokens)}, got {short(ms)}")
    found = {}
    for tokens in key.tokens:
        times = ms[tokens]
        if not isinstance(times, Mapping) or not times or not set(times) <= set(key.candidates):
            raise ValueError(
                f"ms at {tokens} tokens: expected times of {', '.join(key.candidates)}, got {short(times)}"
            )
        try:
            found[tokens] = {label: _milliseconds(value) for label, value in times.items()}
        except (TypeError, ValueError) as error:
            raise type(error)(f"ms at {tokens} tokens: {error}") from error
    return found


class Decisions(Mapping[DecisionKey, Times]):
    """Measured times by key; read-only.

    Args:
        entries: key -> token count -> candidate -> ms.

    Raises:
        TypeError: a key or a time of the wrong type.
        ValueError: times that do not belong to the key, or that are NaN, infinite, zero or negative.
    """

    def __init__(self, entries: Mapping[DecisionKey, Times] | None = None) -> None:
        self._entries: dict[DecisionKey, Times] = {}
        for key, ms in (entries or {}).items():
            if not isinstance(key, DecisionKey):
                raise TypeError(f"entries: expected keys of type DecisionKey, got {short(key)}")
            self._entries[key] = _checked(key, ms)

    def __getitem__(self, key: DecisionKey) -> Times:
        return self._entries[key]

    def __iter__(self) -> Iterator[DecisionKey]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Decisions({len(self)} entries)"

    def merge(self, other: "Decisions") -> "Decisions":
        """The entries of both; those of `other` where both have one.

        Raises:
            TypeError: `other` is no Decisions.
        """
        if not isinstance(other, Decisions):
            raise TypeError(f"other: expected Decisions, got {type(other).__name__}; Decisions.load reads a file")
        return Decisions({**self, **other})

    def records(self) -> list[dict[str, Any]]:
        """One JSON-safe object per entry: its key and its times [ms]."""
        return [{"key": asdict(key), "ms": ms} for key, ms in self.items()]

    @classmethod
    def from_records(cls, records: object) -> Self:
        """The inverse of `records`, also after JSON has made strings of the token counts.

        Raises:
            ValueError: not such a list; says which entry is wrong.
        """
        if not isinstance(records, list):
            raise ValueError(f"entries: expected a list, got {short(records)}")
        found: dict[DecisionKey, Times] = {}
        for index, entry in enumerate(records):
            try:
                key, ms = _entry(entry)
            except (TypeError, ValueError) as error:
                raise ValueError(f"entry {index}: {error}") from error
            if key in found:
                raise ValueError(f"entry {index}: expected each key once, got one a second time")
            found[key] = ms
        return cls(found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, complete or not at all.

        Args:
            path: of the file; written beside it first, then renamed.

        Raises:
            OSError: it cannot be written.
        """
        record = {"format": FORMAT, "version": FORMAT_VERSION, "entries": self.records()}
        with replacing(path) as temporary, temporary.open("x", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote; anything else is refused whole.

        Args:
            path: of the file.

        Raises:
            ValueError: no such file, or damaged, too large, foreign, of another format version, or with a wrong entry.
        """
        source = Path(path)
        remedy = "pass a file that pack_ or Decisions.save wrote, or remove it to measure again"
        if not source.is_file():
            raise ValueError(f"{source}: no such file of decisions; {remedy}")
        try:
            with source.open("rb") as file:
                data = file.read(MAX_NBYTES + 1)
            if len(data) > MAX_NBYTES:
                raise ValueError(f"expected at most {MAX_NBYTES} bytes, got more")
            return cls.from_records(_entries(data))
        except RecursionError as error:
            raise ValueError(f"{source}: not a file of decisions: it is nested too deeply; {remedy}") from error
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: not a file of decisions: {error}; {remedy}") from error


def _entries(data: bytes) -> object:
    """What a file holds as entries, not checked; ValueError says what is wrong with the file around them."""
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("expected UTF-8 text, got other bytes") from error
    except ValueError as error:
        raise ValueError(f"expected complete JSON, got an error in it ({short(str(error))})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"expected a JSON object with format {FORMAT!r}, got {short(record)}")
    if type(record.get("version")) is not int or record["version"] != FORMAT_VERSION:
        raise ValueError(f"expected format version {FORMAT_VERSION}, got {short(record.get('version'))}")
    return record.get("entries")


def _entry(entry: Any) -> tuple[DecisionKey, Times]:
    if not isinstance(entry, dict) or set(entry) != {"key", "ms"}:
        raise ValueError(f"expected an object with key and ms, got {short(entry)}")
    names = [field.name for field in fields(DecisionKey)]
    if not isinstance(entry["key"], dict) or set(entry["key"]) != set(names):
        raise ValueError(f"key: expected an object with {', '.join(names)}, got {short(entry['key'])}")
    key = DecisionKey(**entry["key"])
    names = [str(tokens) for tokens in key.tokens]  # JSON has only strings as names
    ms = {str(tokens): times for tokens, times in entry["ms"].items()} if isinstance(entry["ms"], dict) else {}
    if set(ms) != set(names):
        raise ValueError(f"ms: expected times for the token counts {', '.join(names)}, got {short(entry['ms'])}")
    return key, _checked(key, {tokens: ms[str(tokens)] for tokens in key.tokens})


def _isa() -> str:
    """What our kernels run on now."""
    backend = os.environ.get("RMTKERN_BACKEND")
    if backend and backend != "cpu":
        return backend
    found = cpu.isas()
    return os.environ.get("RMTKERN_ISA") or found[0] if found else "none"


class DecisionLog:
    """What one call of pack_ may use again, and what it measures.

    Args:
        source: decisions to use; a path to read them from, where the new ones are added (the file need not be there
            yet); or None.
        here: cpu, isa and threads of the keys, if they are not this CPU's.

    Raises:
        TypeError: `source` has the wrong type.
        ValueError: a file that is not one of decisions, or a path in no folder.
    """

    def __init__(
        self, source: Decisions | str | os.PathLike[str] | None, here: Mapping[str, Any] | None = None
    ) -> None:
        from rmtkern import __version__  # not above: the package imports this file

        if source is not None and not isinstance(source, Decisions | str | os.PathLike):
            raise TypeError(f"decisions: expected Decisions, a path or None, got {type(source).__name__}")
        self.path = None if source is None or isinstance(source, Decisions) else Path(source)
        self.known = source if isinstance(source, Decisions) else Decisions()
        if self.path is not None:
            if not self.path.parent.is_dir():
                raise ValueError(f"decisions: {self.path} is in no folder that exists; create {self.path.parent} first")
            if self.path.exists():
                self.known = Decisions.load(self.path)
        self.given = source is not None
        self.reused = 0
        self.measured = 0
        self._new: dict[DecisionKey, Times] = {}
        self._here: dict[str, Any] = {
            "cpu": cpu_model(),
            "isa": _isa(),
            "threads": torch.get_num_threads(),
            "rmtkern": __version__,
            "torch": torch.__version__,
            **(here or {}),
        }

    def key(self, weight: torch.Tensor, **what: Any) -> DecisionKey:
        """The key of a measurement here.

        Args:
            weight: [N, K].
            what: the remaining fields of DecisionKey.
        """
        dtype = str(weight.dtype).removeprefix("torch.")
        return DecisionKey(**self._here, shape=(weight.shape[0], weight.shape[1]), dtype=dtype, **what)

    def add(self, key: DecisionKey, ms: Times, *, fresh: bool) -> None:
        """Note the times of one group; only fresh ones become new entries.

        Times that a file could not hold (a timer of one's own may give infinity) are used once and not kept.
        """
        if not fresh:
            self.reused += 1
            return
        self.measured += 1
        plain = {tokens: {label: float(value) for label, value in times.items()} for tokens, times in ms.items()}
        if all(0 < value < math.inf for times in plain.values() for value in times.values()):
            self._new[key] = plain

    @property
    def new(self) -> Decisions:
        """What was measured."""
        return Decisions(self._new)

    def save(self) -> None:
        """Add what was measured to the file, if there is a path; entries that others added meanwhile stay."""
        if self.path is None or (self.path.exists() and not self._new):
            return
        held = Decisions.load(self.path) if self.path.exists() else self.known
        held.merge(self.new).save(self.path)
