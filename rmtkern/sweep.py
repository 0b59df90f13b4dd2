"""Accuracy against sparsity for several methods, one CSV row each; a row that is there is not computed again.

It joins prune_ and evaluate; it draws nothing and knows no method.
"""

import copy
import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rmtkern.api import prune_
from rmtkern.evaluation import evaluate
from rmtkern.models import prunable_weights
from rmtkern.progress import progress
from rmtkern.pruning.plan import PruneConfig
from rmtkern.storage import replacing
from rmtkern.tables import Table

__all__ = ["Sweep", "SweepRow", "sweep"]

DENSE = "dense"


@dataclass(frozen=True)
class SweepRow:
    """One line of the CSV. The first six say what was asked; a line that agrees in them is used again.

    Args:
        weights: first 16 hexadecimal digits of the SHA-256 of the dense model's parameters and buffers.
        data: name of the images that were scored.
        calibration: name of the calibration images; empty for a method that uses none.
        method: of prune_, or "dense".
        pattern: of prune_.
        sparsity: asked of the selected weights, [0, 1).
        top1: share of images whose best class is right, [0, 1].
        top5: share whose five best classes hold the right one, [0, 1].
        loss: mean cross-entropy [nats].
        images: scored.
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

    @property
    def key(self) -> tuple[Any, ...]:
        """What was asked."""
        return (self.weights, self.data, self.calibration, self.method, self.pattern, self.sparsity)

    @classmethod
    def from_cells(cls, cells: dict[str, str]) -> Self:
        """From one line of the CSV.

        Raises:
            ValueError, KeyError, TypeError: not such a line.
        """
        return cls(**{field.name: field.type(cells[field.name]) for field in fields(cls)})  # type: ignore[operator]


@dataclass(frozen=True)
class Sweep:
    """The rows that were asked for, dense first; prints as a table.

    Args:
        rows: in the order of the request.
        computed: how many of them this call computed.
    """

    rows: tuple[SweepRow, ...]
    computed: int

    @property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Method (and pattern, where there are several) -> (sparsity, top-1) from dense on, for plots."""
        dense, *others = self.rows
        several = len({row.pattern for row in others}) > 1
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in others:
            name = f"{row.method} {row.pattern}" if several else row.method
            curves.setdefault(name, [(0.0, dense.top1)]).append((row.sparsity, row.top1))
        return curves

    def table(self) -> Table:
        """One line per row."""
        lines = [(row.method, row.pattern, row.sparsity, round(100 * row.top1, 2), round(100 * row.top5, 2), row.loss)
                 for row in self.rows]  # fmt: skip
        notes = [f"{self.rows[0].images} images; {self.computed} of {len(self.rows)} rows computed now"]
        return Table(("method", "pattern", "sparsity", "top-1 %", "top-5 %", "loss"), lines, notes)

    def __str__(self) -> str:
        return self.table().to_text()


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
    show_progress: bool | None = None,
) -> Sweep:
    """Prune copies of a model by every method, to every pattern and sparsity, and score each.

    The CSV is complete after every row (written beside it, then renamed), so an interrupted sweep goes on where it
    stopped, and methods or sparsities can be added later. Rows for other weights or data may share the file.

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
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Sweep.

    Raises:
        TypeError, ValueError: as prune_ and evaluate raise them; a request that is no PruneConfig is refused before
            anything is computed; a file that is no such CSV is refused and left alone.
    """
    path = Path(path)
    configs = [
        PruneConfig(sparsity, method, pattern=pattern, targets=targets, ignore=ignore).resolve(calibration is not None)  # type: ignore[arg-type]
        for method in methods for pattern in patterns for sparsity in sparsities
    ]  # fmt: skip
    if not configs:
        raise ValueError("sweep: expected at least one method, one pattern and one sparsity")
    prunable_weights(model, targets, ignore)
    known = {row.key: row for row in _read(path)}
    weights = _fingerprint(model)
    wanted = [(weights, data, "", DENSE, "", 0.0)]
    for config in configs:
        used = calibration_data if config.needs_calibration else ""
        wanted.append((weights, data, used, config.method, config.pattern, config.sparsity))
    computed = 0
    for key, made in progress(list(zip(wanted, [None, *configs], strict=True)), "sweep", show=show_progress):
        if key in known:
            continue
        pruned = copy.deepcopy(model)
        if made is not None:
            prune_(pruned, made, calibration=calibration if made.needs_calibration else None, show_progress=False)
        found = evaluate(pruned, images, limit=limit, show_progress=False)
        known[key] = SweepRow(*key, found.top1, found.top5, found.loss, found.count)
        _write(path, list(known.values()))
        computed += 1
    return Sweep(tuple(known[key] for key in wanted), computed)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> list[SweepRow]:
    if not path.exists():
        return []
    columns = [field.name for field in fields(SweepRow)]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise ValueError(
                f"{path}: expected a CSV with the columns {','.join(columns)}; give another file, or remove this one"
            )
        try:
            return [SweepRow.from_cells(cells) for cells in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a row of a sweep ({error}); remove it") from error


def _write(path: Path, rows: Sequence[SweepRow]) -> None:
    columns = [field.name for field in fields(SweepRow)]
    text = Table(columns, [list(asdict(row).values()) for row in rows]).to_csv()
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        file.write(text)
