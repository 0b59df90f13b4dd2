"""Accuracy against sparsity, and against measured speed, for several methods; a CSV row each, none computed twice.

It joins prune_, evaluate and, if asked, pack_ (through speed.py); it draws and times nothing and knows no method.
"""

import copy
import csv
import hashlib
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rmtkern.api import prune_
from rmtkern.environment import cpu_model
from rmtkern.evaluation import Evaluation, evaluate
from rmtkern.models import prunable_weights
from rmtkern.packing.timing import Timer
from rmtkern.progress import progress
from rmtkern.pruning.plan import PruneConfig
from rmtkern.speed import packed_copy
from rmtkern.storage import replacing
from rmtkern.tables import Table, Tabulated
from rmtkern.token_merging import merging_of

__all__ = ["PACK", "Sweep", "SweepRow", "load_sweeps", "sweep"]

DENSE = "dense"
PACK = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a point can be packed in."""


@dataclass(frozen=True)
class SweepRow:
    """One line of the CSV. The first six say what was asked; a line that agrees in them is used again.

    Where the model was packed too, the next four say how and on what, and the rest what came out; else they are empty,
    as they are for the lines of files from before they existed.

    Args:
        weights: first 16 hexadecimal digits of the SHA-256 of the dense model's parameters and buffers, and of how it
            merges tokens, if it does.
        data: name of the images that were scored.
        calibration: name of the calibration images; empty for a method that uses none.
        method: of prune_, or "dense".
        pattern: of prune_.
        sparsity: asked of the selected weights, [0, 1).
        top1: share of images whose best class is right, [0, 1].
        top5: share whose five best classes hold the right one, [0, 1].
        loss: mean cross-entropy [nats].
        images: scored.
        pack: "float32" or "bfloat16": what the packed model and the dense ones beside it ran in.
        example: shape of the input that was timed, such as "8x3x224x224".
        threads: of torch.
        cpu: that ran it.
        original_ms: the pruned model before packing [ms].
        dense_ms: the same with every linear in its fastest dense form [ms].
        packed_ms: packed [ms].
        packed_top1: share of images that the packed model gets right, [0, 1].
    """

    weights: str
    data: str
    calibration: str
    method: str
    pattern: str
    sparsity: float
    top1: float
    top5: float
    loss: float
    images: int
    pack: str = ""
    example: str = ""
    threads: int | None = None
    cpu: str = ""
    original_ms: float | None = None
    dense_ms: float | None = None
    packed_ms: float | None = None
    packed_top1: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What was asked of the pruned model."""
        return (self.weights, self.data, self.calibration, self.method, self.pattern, self.sparsity)

    @property
    def packing(self) -> tuple[Any, ...]:
        """What was asked of the packed model."""
        return (self.pack, self.example, self.threads, self.cpu)

    @property
    def unpacked(self) -> Self:
        """The row without what is about packing."""
        return type(self)(*(getattr(self, name) for name in ASKED))

    @property
    def speedup(self) -> float | None:
        """The faster of the two dense models over the packed one; None if it was not packed."""
        if self.original_ms is None or self.dense_ms is None or self.packed_ms is None:
            return None
        return min(self.original_ms, self.dense_ms) / self.packed_ms

    @classmethod
    def from_cells(cls, cells: dict[str, str]) -> Self:
        """From one line of the CSV, which may lack the columns about packing.

        Raises:
            ValueError, KeyError, TypeError: not such a line.
        """
        row = cls(**{name: _value(name, cells[name]) for name in COLUMNS if name in cells or name in ASKED})
        if row.pack and (row.speedup is None or row.packed_top1 is None):
            raise ValueError("a packed model without times and top-1")
        if not all(math.isfinite(value) for value in asdict(row).values() if isinstance(value, float)):
            raise ValueError("NaN or an infinite number")
        return row


COLUMNS = [field.name for field in fields(SweepRow)]
ASKED = COLUMNS[: COLUMNS.index("pack")]
"""Columns of every file; the others came later."""


def _value(name: str, cell: str) -> Any:
    if not isinstance(cell, str):
        raise TypeError(f"no {name}")
    if name in ("sparsity", "top1", "top5", "loss"):
        return float(cell)
    if name == "images":
        return int(cell)
    if name == "threads":
        return int(cell) if cell else None
    if name in ("original_ms", "dense_ms", "packed_ms", "packed_top1"):
        return float(cell) if cell else None
    return cell


@dataclass(frozen=True)
class Sweep(Tabulated):
    """The rows that were asked for, dense first; prints as a table.

    Args:
        rows: in the order of the request.
        computed: how many of them this call computed.
    """

    rows: tuple[SweepRow, ...]
    computed: int

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Method (and pattern, calibration, if there are several) -> (sparsity, top-1) from dense on, for plots."""
        return self._curves([(row.sparsity, row.top1) for row in self.rows])

    @property
    def latency_curves(self) -> dict[str, list[tuple[float, float]]]:
        """The same with (sparsity, packed ms), from the packed dense model on; empty without packing."""
        points = [(row.sparsity, row.packed_ms) for row in self.rows]
        timed = [(sparsity, ms) for sparsity, ms in points if ms is not None]
        return self._curves(timed) if len(timed) == len(points) else {}

    @property
    def speed_curves(self) -> dict[str, list[tuple[float, float]]]:
        """The same with (speed-up over the strongest dense form, top-1 of the packed model); empty without packing."""
        points = [(row.speedup, row.packed_top1) for row in self.rows]
        timed = [(speedup, top1) for speedup, top1 in points if speedup is not None and top1 is not None]
        return self._curves(timed) if len(timed) == len(points) else {}

    def _curves(self, points: Sequence[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
        patterns = len({row.pattern for row in self.rows[1:]}) > 1
        calibrations = len({row.calibration for row in self.rows[1:] if row.calibration}) > 1
        curves: dict[str, list[tuple[float, tuple[float, float]]]] = {}
        for row, point in zip(self.rows[1:], points[1:], strict=True):
            name = f"{row.method} {row.pattern}" if patterns else row.method
            if calibrations and row.calibration:
                name = f"{name} ({row.calibration})"
            curves.setdefault(name, []).append((row.sparsity, point))
        return {
            name: [points[0], *(point for _, point in sorted(line, key=lambda pair: pair[0]))]
            for name, line in curves.items()
        }

    def table(self) -> Table:
        """One line per row."""
        columns = ["method", "pattern", "sparsity", "top-1 %", "top-5 %", "loss"]
        lines: list[tuple[Any, ...]] = [
            (row.method, row.pattern, row.sparsity, round(100 * row.top1, 2), round(100 * row.top5, 2), row.loss)
            for row in self.rows
        ]
        notes = [f"{self.rows[0].images} images; {self.computed} of {len(self.rows)} rows computed now"]
        if self.speed_curves:
            first = self.rows[0]
            columns += ["dense ms", "packed ms", "speed-up", "packed top-1 %"]
            lines = [
                (*line, min(row.original_ms or 0.0, row.dense_ms or 0.0), row.packed_ms, row.speedup,
                 round(100 * (row.packed_top1 or 0.0), 2))
                for line, row in zip(lines, self.rows, strict=True)
            ]  # fmt: skip
            notes.append(
                f"packed in {first.pack}, input {first.example}, {first.threads} thread(s); dense ms: the strongest "
                "dense form in the same dtype, timed in the same run"
            )
        return Table(columns, lines, notes)


def sweep(
    model: nn.Module,
    images: Any,
    path: str | Path,
    *,
    sparsities: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
    methods: Sequence[str] = ("magnitude", "row", "seb"),
    patterns: Sequence[str] = ("unstructured",),
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    calibration: Tensor | Iterable[Any] | None = None,
    data: str = "images",
    calibration_data: str = "calibration",
    limit: int | None = None,
    pack: str | None = None,
    example: Tensor | None = None,
    timer: Timer | None = None,
    show_progress: bool | None = None,
) -> Sweep:
    """Prune copies of a model by every method, to every pattern and sparsity, and score each; pack and time it too.

    The CSV is complete after every row (written beside it, then renamed), so an interrupted sweep goes on where it
    stopped, and methods or sparsities can be added later, or packing. Rows for other weights or data may share the
    file, and so may rows packed otherwise or timed on another CPU or thread count, which are not used for this one.

    Args:
        model: not changed.
        images: as evaluation.evaluate takes them; read once for every row.
        path: of the CSV; made if it is not there.
        sparsities: of the selected weights, each [0, 1).
        methods: of prune_.
        patterns: of prune_.
        targets: as prune_ takes them; name them in `data` if one file holds several choices.
        ignore: as prune_ takes it.
        calibration: for the methods that use images, as prune_ takes it; a list, a loader or a tensor.
        data: name of `images` in the CSV.
        calibration_data: name of `calibration` in the CSV.
        limit: score at most so many images.
        pack: also pack each point, and the dense model, in "float32" or "bfloat16", time it against the strongest dense
            form in that dtype as `pack_` does, and score it packed. The model must be float32, on the CPU.
        example: what the packed model is timed on, [B, ...]; needed with `pack`.
        timer: as `pack_` takes it.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Sweep.

    Raises:
        TypeError, ValueError, PackedModelError: as prune_, evaluate and pack_ raise them; a request that is no
            PruneConfig is refused before anything is computed; a file that is no such CSV is refused and left alone.
    """
    path = Path(path)
    configs = [
        PruneConfig(sparsity, method, pattern=pattern, targets=targets, ignore=ignore).resolve(calibration is not None)  # type: ignore[arg-type]
        for method in methods for pattern in patterns for sparsity in sparsities
    ]  # fmt: skip
    if not configs:
        raise ValueError("sweep: expected at least one method, one pattern and one sparsity")
    packing = _packing(pack, example)
    prunable_weights(model, targets, ignore)
    known = _read(path)
    weights = _fingerprint(model)
    wanted = [(weights, data, "", DENSE, "", 0.0)]
    for config in configs:
        used = calibration_data if config.needs_calibration else ""
        wanted.append((weights, data, used, config.method, config.patterns[0], config.sparsity))
    rows: list[SweepRow] = []
    computed = 0
    with tempfile.TemporaryDirectory() as folder:  # times of layers, from one point to the next
        decisions = Path(folder) / "decisions.json"
        points = list(zip(wanted, [None, *configs], strict=True))
        for key, made in progress(points, "sweep", show=show_progress):
            scored = [row for row in known if row.key == key]
            fitting = [row for row in scored if pack is None or row.packing == packing]
            if not fitting:
                pruned = copy.deepcopy(model).eval()
                if made is not None:
                    seen = calibration if made.needs_calibration else None
                    prune_(pruned, made, calibration=seen, show_progress=False)
                row = scored[0] if scored else _scored(key, evaluate(pruned, images, limit=limit, show_progress=False))
                if pack is not None:
                    options = {"dtype": PACK[pack], "decisions": decisions, "timer": timer, "show_progress": False}
                    packed, (times,) = packed_copy(pruned, example, **options)
                    found = evaluate(packed, images, limit=limit, show_progress=False)
                    ms = (times.original_ms, times.dense_ms, times.packed_ms)
                    row = SweepRow(*(*_cells(row)[: len(ASKED)], *packing, *ms, found.top1))
                known = [*(old for old in known if old.key != key or old.pack), row]
                fitting = [row]
                _write(path, known)
                computed += 1
            rows.append(fitting[0].unpacked if pack is None else fitting[0])
    return Sweep(tuple(rows), computed)


def load_sweeps(path: str | Path) -> tuple[Sweep, ...]:
    """What a CSV of `sweep` holds, by model and images.

    Args:
        path: of the file.

    Returns:
        For each model and images a Sweep of everything that was scored, without packing; after it, one for each way in
        which it was packed and timed. Dense is first, then by method, pattern, calibration and sparsity.

    Raises:
        ValueError: no such file, no such CSV, or rows without the dense one of their model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the CSV that rmtkern sweep wrote")
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], SweepRow]] = {}
    for row in _read(path):
        groups.setdefault((row.weights, row.data, ""), {})[row.key] = row.unpacked
        if row.pack:
            groups.setdefault((row.weights, row.data, row.packing), {})[row.key] = row
    found = []
    for (weights, data, _), rows in groups.items():
        dense = [row for row in rows.values() if row.method == DENSE]
        others = sorted(
            (row for row in rows.values() if row.method != DENSE),
            key=lambda row: (row.method, row.pattern, row.calibration, row.sparsity),
        )
        if not dense:
            raise ValueError(f"{path}: no row of the dense model {weights} on {data}; sweep it again")
        found.append(Sweep((*dense, *others), 0))
    return tuple(found)


def _packing(pack: str | None, example: Tensor | None) -> tuple[str, str, int | None, str]:
    """The cells that say how a point is packed here."""
    if pack is None:
        return ("", "", None, "")
    if pack not in PACK:
        raise ValueError(f"pack: expected {' or '.join(PACK)} or None, got {pack!r}")
    if not isinstance(example, Tensor):
        raise TypeError(
            f"example: expected a tensor of images [B, ...] to time the packed model on, got {type(example).__name__}"
        )
    return (pack, "x".join(map(str, example.shape)), torch.get_num_threads(), cpu_model())


def _scored(key: tuple[Any, ...], found: Evaluation) -> SweepRow:
    return SweepRow(*(*key, found.top1, found.top5, found.loss, found.count))


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256(str(merging_of(model) or "").encode())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> list[SweepRow]:
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:  # a foreign file then has other columns
        reader = csv.DictReader(file)
        if reader.fieldnames not in (ASKED, COLUMNS):
            raise ValueError(
                f"{path}: expected a CSV with the columns {','.join(COLUMNS)}; give another file, or remove this one"
            )
        try:
            return [SweepRow.from_cells(cells) for cells in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a row of a sweep ({error}); remove it") from error


def _cells(row: SweepRow) -> list[Any]:
    return list(asdict(row).values())


def _write(path: Path, rows: Sequence[SweepRow]) -> None:
    text = Table(COLUMNS, [_cells(row) for row in rows]).to_csv()
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        file.write(text)
