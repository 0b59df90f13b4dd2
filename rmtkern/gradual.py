"""Pruning in cycles: one sparsity after another with fine-tuning after each, by a method that may change on the way.

It joins prune_, finetune_ and evaluate; it knows no method's mathematics.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from rmtkern.api import prune_
from rmtkern.evaluation import evaluate
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.pruning.target import ROUNDING
from rmtkern.tables import Table, Tabulated
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

__all__ = ["CYCLE", "DROP_THRESHOLD", "GRID", "Cycle", "Gradual", "prune_gradually_"]

DROP_THRESHOLD = "drop-threshold"
"""Method: "magnitude" until the accuracy has dropped too far, "ser" from the next sparsity on."""

GRID = tuple(round(0.05 * step, 2) for step in range(1, 15))
"""The published sparsities: 0.05 to 0.70."""

CYCLE = FinetuneConfig(
    epochs=1, lr=3e-5, optimizer="sgd", weight_decay=1e-6, batch_size=128, warmup=0.25, floor=0.01, distill=0.0
)
"""The published fine-tuning of one cycle (SGD, momentum 0.9, label smoothing 0.1, clipped at 1, cosine to 1 %)."""


FURTHER = ("budget", "score", "repair", "restore", "permute", "haar", "alpha_regime", "theta", "soft_threshold",
           "legacy", "spikes")  # fmt: skip
"""The fields of a PruneConfig that `prune_gradually_` passes on."""


@dataclass(frozen=True)
class Cycle:
    """One sparsity.

    Args:
        sparsity: of the selected weights, [0, 1).
        method: that prune_ was asked for.
        pruned: top-1 on the held-out images before fine-tuning, [0, 1]; None without any.
        accuracy: the same afterwards.
        epoch: of the fine-tuning whose state was kept; 0: none was better than the pruned model.
        stopped: why the fine-tuning ended early; None: it ran to its end.
    """

    sparsity: float
    method: str
    pruned: float | None
    accuracy: float | None
    epoch: int
    stopped: str | None


@dataclass(frozen=True)
class Gradual(Tabulated):
    """What `prune_gradually_` did; prints as a table.

    Args:
        cycles: in order.
        plan: of the last cycle; its zeros are the model's.
        reference: top-1 of the model before the first cycle on the held-out images, [0, 1]; None without any.
        drop: accuracy that method "drop-threshold" allowed; None for other methods.
    """

    cycles: tuple[Cycle, ...]
    plan: PrunePlan
    reference: float | None
    drop: float | None

    def table(self) -> Table:
        """One row per cycle."""

        def percent(value: float | None) -> float | None:
            return None if value is None else round(100 * value, 2)

        rows = [(cycle.sparsity, cycle.method, percent(cycle.pruned), percent(cycle.accuracy), cycle.epoch)
                for cycle in self.cycles]  # fmt: skip
        notes = [] if self.reference is None else [f"before the first: {percent(self.reference)} %"]
        if self.drop is not None:
            methods = [cycle.method for cycle in self.cycles]
            at = f"at {self.cycles[methods.index('ser') - 1].sparsity:g}" if "ser" in methods else "not yet"
            notes.append(f"fallen by more than {100 * self.drop:g} points: {at}")
        notes += [f"{cycle.sparsity:g} stopped: {cycle.stopped}" for cycle in self.cycles if cycle.stopped]
        return Table(("sparsity", "method", "pruned top-1 %", "top-1 %", "kept epoch"), rows, notes)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        facts = {"cycles": [asdict(cycle) for cycle in self.cycles], "reference": self.reference, "drop": self.drop}
        return json.dumps({**facts, "plan": json.loads(self.plan.to_json())}, indent=1)


def prune_gradually_(
    model: nn.Module,
    train_loader: Any,
    sparsities: Sequence[float] = GRID,
    method: str = "hybrid",
    *,
    held_out: Any = None,
    drop: float = 0.007,
    pattern: str = "unstructured",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    calibration: Any = None,
    teacher: nn.Module | str | Path | None = None,
    finetune: FinetuneConfig | None = None,
    seed: int = 0,
    show_progress: bool | None = None,
    **fields: Any,
) -> Gradual:
    """Prune to one sparsity after another, in place, fine-tuning the survivors after each; zeros only grow.

    If anything fails, the model is as the last finished step (pruning or fine-tuning) left it.

    Args:
        model: a classifier; afterwards an ordinary dense model with the zeros of `Gradual.plan`.
        train_loader: labelled training data, as finetune_ takes them.
        sparsities: rising, each [0, 1).
        method: of prune_ ("hybrid": "magnitude" to 20 %, "ser" above; or one method throughout), or "drop-threshold":
            "magnitude" until the fine-tuned top-1 on `held_out` is more than `drop` below that of the model at the
            start, and "ser" from the next sparsity on; the cycle that fell too far is kept.
        held_out: a part of the training data that is not in `train_loader`, and never the images that you report on: a
            pair (images, labels) or a loader of such pairs. It scores every cycle and chooses the best state of each
            fine-tuning; needed by "drop-threshold". None: finetune_ takes its own part away.
        drop: for "drop-threshold", [0, 1); 0.007 is 0.7 points.
        pattern: as prune_ takes it, without n:m.
        targets: as prune_ takes them.
        ignore: as prune_ takes it.
        calibration: as prune_ takes it; None: `train_loader`, for methods that need images.
        teacher: as finetune_ takes it.
        finetune: of every cycle; None: CYCLE, the published one.
        seed: as prune_ takes it.
        show_progress: progress bar; None: only on a terminal.
        fields: further fields of PruneConfig, for every cycle, such as repair="obs"; but `haar` is for the first cycle
            alone, as published: method "seb" with haar=0.5 and alpha_regime=True is what the tables of arXiv 2606.02608
            call Classical RMT (method "rmt" is the cycles of arXiv 2503.01922).

    Returns:
        The report of all cycles, with the last plan.

    Raises:
        TypeError, ValueError: as prune_, finetune_ and evaluate raise them; an unknown field; sparsities that do not
            rise; a method "drop-threshold" without held-out images; data that can be read once only. All before
            anything is changed.

    Source: arXiv 2606.02608, Hybrid Magnitude-SER and its drop-threshold variant; there, validation labels decide.
    """
    finetune = CYCLE if finetune is None else finetune
    if not isinstance(finetune, FinetuneConfig):
        raise TypeError(f"finetune: expected a FinetuneConfig, got {type(finetune).__name__}")
    steps = _steps(sparsities)
    adaptive = method == DROP_THRESHOLD
    _check_drop(drop, adaptive, held_out)
    for name, data in (("train_loader", train_loader), ("held_out", held_out), ("calibration", calibration)):
        if isinstance(data, Iterator):
            raise TypeError(
                f"{name}: got {type(data).__name__}, which can be read once only, and every cycle reads it; pass a "
                "list, a DataLoader or tensors"
            )
    calibration = train_loader if calibration is None else calibration

    unknown = [name for name in fields if name not in FURTHER]
    if unknown:
        raise TypeError(f"prune_gradually_: unknown field {unknown[0]!r}; expected one of {', '.join(FURTHER)}")

    def config(sparsity: float, name: str) -> PruneConfig:
        more = {**fields, **({} if sparsity == steps[0] else {"haar": 0.0})}
        return PruneConfig(sparsity, name, pattern=pattern, targets=targets, ignore=ignore, seed=seed, **more)  # type: ignore[arg-type]

    for sparsity in steps:  # refuse before anything is changed
        for name in ("magnitude", "ser") if adaptive else (method,):
            config(sparsity, name).resolve(True)

    def score() -> float | None:
        return None if held_out is None else evaluate(model, held_out, show_progress=show_progress).top1

    reference, current = score(), "magnitude" if adaptive else method
    cycles: list[Cycle] = []
    for sparsity in steps:
        asked = config(sparsity, current)
        images = calibration if asked.resolve(True).needs_calibration else None
        plan = prune_(model, asked, calibration=images, show_progress=show_progress)
        before = score()
        report = finetune_(
            model, plan, train_loader, held_out=held_out, teacher=teacher, config=finetune, show_progress=show_progress
        )
        accuracy = score()
        cycles.append(Cycle(sparsity, plan.config.method, before, accuracy, report.best_epoch, report.stopped))
        if adaptive and accuracy is not None and reference is not None and reference - accuracy > drop + ROUNDING:
            current = "ser"
    return Gradual(tuple(cycles), plan, reference, drop if adaptive else None)


def _steps(sparsities: Sequence[float]) -> tuple[float, ...]:
    steps = tuple(sparsities)
    if not steps or any(after <= before for before, after in pairwise(steps)):
        raise ValueError(f"sparsities: expected one or more rising fractions in [0, 1), got {list(steps)}")
    return steps


def _check_drop(drop: float, adaptive: bool, held_out: Any) -> None:
    if isinstance(drop, bool) or not isinstance(drop, int | float):
        raise TypeError(f"drop: expected a number, got {type(drop).__name__}")
    if not 0 <= drop < 1:
        raise ValueError(f"drop: expected a fraction in [0, 1), got {drop}")
    if adaptive and held_out is None:
        raise ValueError(
            f"method {DROP_THRESHOLD!r} needs held_out=, labelled images that are neither trained nor reported on"
        )
