"""How long each linear takes in each pattern: measured elsewhere, kept as JSON, read between the measured sparsities.

Pure data, as a plan is: it measures nothing and knows no kernel.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Self

from rmtkern.errors import short
from rmtkern.pruning.pattern import parse_pattern
from rmtkern.tables import Table, Tabulated

__all__ = ["LayerTimes", "PatternTimes"]

FORMAT, FORMAT_VERSION = "rmtkern pattern times", 1


def _ms(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a time in ms, got {short(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite time above 0 ms, got {short(value)}")
    return float(value)


@dataclass(frozen=True)
class LayerTimes:
    """Times of one weight, and of all others of the same shape, tokens and epilogue.

    Args:
        names: of the parameters that this holds for, such as "blocks.0.mlp.fc1.weight".
        shape: (N, K) of each.
        dense_ms: one of them in its fastest dense form [ms].
        ms: pattern -> sparsity -> one of them in its fastest sparse form for it [ms].

    Raises:
        TypeError: a field of the wrong type.
        ValueError: no name, an unknown pattern, a sparsity outside [0, 1), or a time that is not finite and above 0.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    dense_ms: float
    ms: Mapping[str, Mapping[float, float]]

    def __post_init__(self) -> None:
        for name in ("names", "shape"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, list | tuple):
                raise TypeError(f"{name}: expected a tuple, got {short(value)}")
            object.__setattr__(self, name, tuple(value))
        if not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"names: expected the names of parameters, got {short(self.names)}")
        if len(self.shape) != 2 or not all(type(size) is int and size > 0 for size in self.shape):
            raise ValueError(f"shape: expected [N, K], got {short(self.shape)}")
        object.__setattr__(self, "dense_ms", _ms("dense_ms", self.dense_ms))
        if not isinstance(self.ms, Mapping):
            raise TypeError(f"ms: expected times by pattern and sparsity, got {short(self.ms)}")
        found: dict[str, dict[float, float]] = {}
        for pattern, times in self.ms.items():
            parse_pattern(pattern)
            if not isinstance(times, Mapping):
                raise TypeError(f"ms of {pattern!r}: expected times by sparsity, got {short(times)}")
            for sparsity, value in times.items():
                if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
                    raise ValueError(f"ms of {pattern!r}: expected sparsities in [0, 1), got {short(sparsity)}")
                found.setdefault(pattern, {})[float(sparsity)] = _ms(f"ms of {pattern!r} at {sparsity}", value)
        object.__setattr__(self, "ms", {pattern: dict(sorted(times.items())) for pattern, times in found.items()})

    def at(self, pattern: str, sparsity: float) -> float | None:
        """Time in a pattern at a sparsity [ms], linear between two measured ones; None beyond them."""
        times = self.ms.get(pattern, {})
        below = max((known for known in times if known <= sparsity + 1e-12), default=None)
        above = min((known for known in times if known >= sparsity - 1e-12), default=None)
        if below is None or above is None:
            return None
        share = (sparsity - below) / (above - below) if above > below else 0.0
        return times[below] + share * (times[above] - times[below])


@dataclass(frozen=True)
class PatternTimes(Tabulated):
    """Times of the linears of a model in several patterns; `rmtkern.time_patterns` measures them.

    Args:
        layers: one for each kind of linear; no name twice.
        dtype: that they ran in, such as "bfloat16".
        threads: of torch.
        cpu: as environment.cpu_model names it.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a weight with two times.
    """

    layers: tuple[LayerTimes, ...]
    dtype: str = ""
    threads: int = 1
    cpu: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if wrong := [layer for layer in self.layers if not isinstance(layer, LayerTimes)]:
            raise TypeError(f"layers: expected LayerTimes, got {short(wrong[0])}")
        names = [name for layer in self.layers for name in layer.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"layers: expected each weight once, got {twice[0]} in two of them")

    def of(self, name: str) -> LayerTimes | None:
        """The times of a weight by its parameter's name, or None."""
        return next((layer for layer in self.layers if name in layer.names), None)

    def total_ms(self, pattern: str | None = None, sparsity: float = 0.0) -> float:
        """All linears in one pattern at one sparsity, each dense where that is not known to be faster [ms].

        Args:
            pattern: None: all dense.
            sparsity: of each.
        """
        total = 0.0
        for layer in self.layers:
            ms = None if pattern is None else layer.at(pattern, sparsity)
            total += len(layer.names) * (layer.dense_ms if ms is None else min(ms, layer.dense_ms))
        return total

    def table(self) -> Table:
        """One row for each kind of linear, pattern and measured sparsity."""
        rows = [
            (f"{layer.shape[0]}x{layer.shape[1]}", len(layer.names), pattern, sparsity, ms, layer.dense_ms / ms)
            for layer in self.layers
            for pattern, times in layer.ms.items()
            for sparsity, ms in times.items()
        ]
        notes = [f"{self.dtype} on {self.threads} thread(s) of {self.cpu}"]
        return Table(("shape", "weights", "pattern", "sparsity", "ms", "x dense"), rows, notes)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        record = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        for layer in record["layers"]:  # JSON has only strings as names
            layer["ms"] = {pattern: [list(pair) for pair in times.items()] for pattern, times in layer["ms"].items()}
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not the JSON of PatternTimes; says what is wrong.
        """
        try:
            record = json.loads(text)
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise ValueError(f"expected a JSON object with format {FORMAT!r}, got {short(record)}")
            if record.get("version") != FORMAT_VERSION:
                raise ValueError(f"expected format version {FORMAT_VERSION}, got {short(record.get('version'))}")
            layers = tuple(
                LayerTimes(**{**layer, "ms": {pattern: dict(pairs) for pattern, pairs in layer["ms"].items()}})
                for layer in record["layers"]
            )
            rest: dict[str, Any] = {one.name: record[one.name] for one in fields(cls) if one.name != "layers"}
            return cls(layers, **rest)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the JSON of PatternTimes ({error!r}); expected what to_json wrote") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write `to_json` to a file.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: no such file, or not one of pattern times.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}; give a file that PatternTimes.save wrote") from error
