"""advise: which dtype and pattern would make a model how much faster on this machine, before anything is pruned.

It measures every distinct linear of the model in every pattern and adds the times up; what a pattern costs in accuracy
it cannot know. It changes nothing of the model.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from rmtkern.packing.dtype import DTYPES, cast_
from rmtkern.packing.timing import Timer, interleaved_ms
from rmtkern.pattern_timing import PATTERNS, check_input, find_kinds, wanted_shares
from rmtkern.progress import progress
from rmtkern.tables import Table, Tabulated

__all__ = ["Advice", "AdviceRow", "advise"]


@dataclass(frozen=True, slots=True)
class AdviceRow:
    """One dtype and pattern.

    Args:
        dtype: "float32" or "bfloat16".
        pattern: as `prune_` takes it.
        sparsity: of every linear that the pattern divides.
        ms: the whole model: measured linears in their fastest form, and the measured rest.
        speedup: the model with every linear in its fastest dense form, in the same dtype, over `ms`.
        speedup_now: the model as it came over `ms`.
        layers: how many linears a sparse form would run.
    """

    dtype: str
    pattern: str
    sparsity: float
    ms: float
    speedup: float
    speedup_now: float
    layers: int


@dataclass(frozen=True, slots=True)
class Advice(Tabulated):
    """What `advise` found; prints as a table, the fastest last.

    Args:
        rows: one for each dtype, pattern and sparsity.
        original_ms: the model as it came [ms].
        threads: of torch during the measurement.
        notes: what could not be tried, in words.
    """

    rows: tuple[AdviceRow, ...]
    original_ms: float
    threads: int
    notes: tuple[str, ...] = ()

    def best(self, sparsity: float, dtype: str | None = None) -> AdviceRow | None:
        """The fastest row of a sparsity, and of a dtype if given; None if there is none."""
        fitting = [row for row in self.rows if row.sparsity == sparsity and dtype in (None, row.dtype)]
        return min(fitting, key=lambda row: row.ms, default=None)

    def table(self) -> Table:
        """One row per dtype, pattern and sparsity."""
        columns = ("dtype", "pattern", "sparsity", "ms", "x dense of this dtype", "x as it is", "layers")
        lines = [
            f"as it is: {self.original_ms:.4g} ms on {self.threads} thread(s). Sums of measured linears and the"
            " measured rest of the model, with PyTorch's attention; pack_ measures the whole.",
            "Patterns cost accuracy in about this order, least first: " + ", ".join(PATTERNS),
            *self.notes,
        ]
        for sparsity in sorted({row.sparsity for row in self.rows}):
            best = self.best(sparsity)
            if best is not None and best.layers:
                lines.append(
                    f"fastest at {sparsity:.0%}: {best.dtype} {best.pattern}, {best.speedup_now:.2f}x as it is"
                )
        return Table(columns, [tuple(asdict(row).values()) for row in self.rows], lines)

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return json.dumps(asdict(self), indent=1)


def advise(
    model: nn.Module,
    example: Tensor,
    *,
    patterns: Sequence[str] = PATTERNS,
    sparsities: Sequence[float] = (0.5, 0.7, 0.9),
    dtypes: Sequence[torch.dtype] = DTYPES,
    budget_ms: float = 600.0,
    timer: Timer | None = None,
    show_progress: bool | None = None,
) -> Advice:
    """Measure how much faster each dtype and pattern would make a model here.

    Every distinct linear is pruned to each pattern by magnitude and timed in every layout that takes it, on the token
    counts of the example, beside its dense forms, in one interleaved run. The rest of the model is what is left of its
    measured time.

    Args:
        model: float32, in eval mode, on the CPU; not changed.
        example: what the model is called with.
        patterns: as `prune_` takes them; n:m has one sparsity of its own.
        sparsities: for the patterns without one, [0, 1).
        dtypes: of torch.float32 and torch.bfloat16.
        budget_ms: time spent on each distinct linear and dtype [ms].
        timer: (name -> call, budget_ms) -> (name -> ms); default `interleaved_ms`.
        show_progress: show a bar; default, only on a terminal.

    Returns:
        What was found.

    Raises:
        TypeError: `model` is not a module or `example` no tensor.
        ValueError: an unknown pattern or dtype, a sparsity out of range, a model that is not float32, not on the CPU or
            without a linear that could be packed, or an example that it cannot run.
    """
    check_input(model, example, patterns, sparsities, dtypes)
    time_calls = timer or interleaved_ms
    wanted = wanted_shares(patterns, sparsities)
    rows: list[AdviceRow] = []
    notes: list[str] = []
    original_ms = _model_ms(model, example, budget_ms, time_calls)
    for dtype in dtypes:
        whole = copy.deepcopy(model)
        if dtype != torch.float32:
            cast_(whole, dtype)
        kinds = find_kinds(whole, example)
        for kind in progress(kinds, f"timing {str(dtype).removeprefix('torch.')}", show=show_progress):
            kind.measure(wanted, budget_ms, time_calls, notes)
        total_ms = _model_ms(whole, example, budget_ms, time_calls) if dtype != torch.float32 else original_ms
        rest_ms = max(0.0, total_ms - sum(kind.count * kind.plain_ms for kind in kinds))
        dense_ms = rest_ms + sum(kind.count * kind.dense_ms for kind in kinds)
        for key in wanted:
            faster = [kind for kind in kinds if kind.sparse_ms.get(key, kind.dense_ms) < kind.dense_ms]
            ms = dense_ms - sum(kind.count * (kind.dense_ms - kind.sparse_ms[key]) for kind in faster)
            name = str(dtype).removeprefix("torch.")
            layers = sum(kind.count for kind in faster)
            rows.append(AdviceRow(name, *key, ms, dense_ms / ms, original_ms / ms, layers))
    return Advice(tuple(rows), original_ms, torch.get_num_threads(), tuple(dict.fromkeys(notes)))


def _model_ms(model: nn.Module, example: Tensor, budget_ms: float, time_calls: Timer) -> float:
    with torch.no_grad():
        return dict(time_calls({"original": lambda: model(example)}, budget_ms))["original"]
