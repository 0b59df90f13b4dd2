"""What fine-tuning did, epoch by epoch: Epoch, FinetuneReport. Pure data, JSON, and a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from rmtkern.pruning.plan import Count
from rmtkern.tables import Table, Tabulated
from rmtkern.training.config import FinetuneConfig

__all__ = ["Epoch", "FinetuneReport"]


@dataclass(frozen=True)
class Epoch:
    """One row of the report.

    Args:
        epoch: from 1; 0 is the model before training.
        loss: mean training loss without the regulariser [nats]; None for epoch 0.
        penalty: the regulariser's value times its strength after the epoch; None without one.
        held_out_loss: the same loss on held-out data; None without any.
        held_out_accuracy: top-1 on held-out data, [0, 1]; None without held-out labels.
        lr: learning rate of the last step; None for epoch 0.
        seconds: wall time with evaluation, >= 0.
        cut: singular values that were set to 0 after the epoch; None where none were to be.
    """

    epoch: int
    loss: float | None
    penalty: float | None
    held_out_loss: float | None
    held_out_accuracy: float | None
    lr: float | None
    seconds: float
    cut: int | None = None


@dataclass(frozen=True)
class FinetuneReport(Tabulated):
    """What `finetune_` did.

    Args:
        config: the request.
        epochs: one row for each finished epoch, and row 0 for the model before.
        best_epoch: whose state the model has now; 0: as it was before training.
        steps: optimizer steps taken, over all sessions of a resumed run.
        held: pruned weights that stayed 0, among the weights of their layers.
        stopped: why the run ended early, such as a NaN loss and where; None: it ran to its end.
    """

    config: FinetuneConfig
    epochs: tuple[Epoch, ...]
    best_epoch: int
    steps: int
    held: Count
    stopped: str | None = None

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(row.seconds for row in self.epochs)

    def table(self) -> Table:
        """One row per epoch; the epoch that was kept and what stopped the run as notes."""
        rows = [
            (row.epoch, row.loss, row.penalty, row.held_out_loss,
             None if row.held_out_accuracy is None else round(100 * row.held_out_accuracy, 2), row.lr,
             round(row.seconds, 1)) for row in self.epochs
        ]  # fmt: skip
        notes = [
            f"kept: epoch {self.best_epoch}" + (" (the model as it was)" if self.best_epoch == 0 else ""),
            f"held at 0: {100 * self.held.sparsity:.2f} % ({self.held.zeros:,} of {self.held.total:,} weights)",
            *(f"after epoch {row.epoch}: cut {row.cut} singular values" for row in self.epochs if row.cut is not None),
            *([f"stopped: {self.stopped}"] if self.stopped else []),
        ]
        return Table(("epoch", "loss", "penalty", "held-out loss", "held-out top-1 %", "lr", "seconds"), rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary."""
        return asdict(self)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            config=FinetuneConfig(**data["config"]),
            epochs=tuple(Epoch(**row) for row in data["epochs"]),
            best_epoch=data["best_epoch"],
            steps=data["steps"],
            held=Count(**data["held"]),
            stopped=data["stopped"],
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not the JSON of a report; names what is missing.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of a FinetuneReport ({error!r}); expected what to_json wrote") from error
