"""prune_to_speed_: the lowest sparsity whose packed model reaches a speed-up over dense that is measured here.

It joins prune_ and pack_ and times nothing itself; what is fastest it does not know either. sweep.py packs through it.
"""

import copy
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.api import prune_
from rmtkern.packing import pack_
from rmtkern.packing.decisions import Decisions
from rmtkern.packing.report import EndToEnd
from rmtkern.packing.timing import Timer
from rmtkern.pruning.pattern import SPIKES
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.tables import Table, Tabulated

__all__ = ["SpeedReport", "SpeedTrial", "packed_copy", "prune_to_speed_"]


@dataclass(frozen=True)
class SpeedTrial:
    """One sparsity whose packed model was timed.

    Args:
        sparsity: asked of the selected weights, [0, 1).
        speedup: of the packed model over the strongest dense one; the least of all examples.
        method: that pruned it: a stand-in of equal counts while searching, at last the one that was asked for.
    """

    sparsity: float
    speedup: float
    method: str


@dataclass(frozen=True)
class SpeedReport(Tabulated):
    """What was asked, tried and done; prints as a table.

    Args:
        speedup: asked.
        plan: of the model as it is now.
        trials: in the order in which they were made; the last one is the model as it is now.
    """

    speedup: float
    plan: PrunePlan
    trials: tuple[SpeedTrial, ...]

    def table(self) -> Table:
        """One row per trial."""
        rows = [(trial.sparsity, trial.speedup, trial.method) for trial in self.trials]
        last = self.trials[-1]
        notes = [f"asked: {self.speedup:g}x; packed, the model pruned to {last.sparsity:g} ran {last.speedup:.2f}x"]
        return Table(("sparsity", "speed-up", "method"), rows, notes)


def packed_copy(model: nn.Module, example: Any, **options: Any) -> tuple[nn.Module, tuple[EndToEnd, ...]]:
    """A packed copy of a model, and its times against the strongest dense one, one entry for each example.

    Args:
        model: as `pack_` takes it; not changed.
        example: as `pack_` takes it.
        options: as `pack_` takes them.

    Raises:
        ValueError: the model could not be timed as a whole; also as pack_ raises it, as TypeError and PackedModelError.
    """
    packed = copy.deepcopy(model)
    report = pack_(packed, example, **options)
    if not report.end_to_end:
        raise ValueError("the packed model could not be timed as a whole, so no speed-up is known; see pack_")
    return packed, report.end_to_end


def prune_to_speed_(
    model: nn.Module,
    speedup: float,
    example: Any,
    config: PruneConfig | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    highest: float = 0.95,
    tolerance: float = 0.02,
    decisions: Decisions | Path | str | None = None,
    timer: Timer | None = None,
    show_progress: bool | None = None,
) -> SpeedReport:
    """Prune a model as little as a measured speed-up of the packed model over the strongest dense one allows, in place.

    By bisection on the sparsity; each trial prunes a copy, packs it and times it whole against dense, as `pack_` does.
    How fast a layer is depends on its zeros and not on its values, so a calibrated method is only run at the end, and
    magnitudes with the same budget stand in before; if what it made is too slow, the sparsity goes up by `tolerance`.
    Times of layers are kept from trial to trial. The model is pruned, not packed; call `pack_` on it (it measures anew,
    so the speed-up then differs by the noise of timing). If anything fails, the model is as it was.

    Args:
        model: in eval mode, on the CPU; prune_ and pack_ must take it.
        speedup: over the strongest dense form, > 0; with several examples, on each of them.
        example: as `pack_` takes it.
        config: method, pattern, targets and so on; its sparsity is not used. Default: PruneConfig().
        calibration: images, as `prune_` takes them.
        dtype: as `pack_` takes it; both sides run in it.
        highest: largest sparsity that is tried, (0, 1).
        tolerance: width in sparsity at which the search stops, (0, 1).
        decisions: as `pack_` takes them; default, none but those of the trials.
        timer: as `pack_` takes it.
        show_progress: show bars; default, only on a terminal.

    Returns:
        SpeedReport with the plan.

    Raises:
        TypeError: an argument of the wrong type, or calibration that can be read once only.
        ValueError: a value out of range, an n:m pattern (it has one sparsity only), several patterns, a model that
            could not be timed, or a speed-up that no sparsity up to `highest` reaches: the message says what was
            reached. Also as prune_ and pack_ raise it.
        PackedModelError: the model is packed.
    """
    config = config or PruneConfig()
    _check(speedup, config, calibration, highest, tolerance)
    resolved = stand_in = config.resolve(calibration is not None)
    if resolved.needs_calibration:
        stand_in = replace(resolved, method="magnitude", score="magnitude", repair="none")
    trials: list[SpeedTrial] = []

    def attempt(asked: PruneConfig, known: Any) -> tuple[nn.Module, PrunePlan, bool]:
        pruned = copy.deepcopy(model)
        images = calibration if asked.needs_calibration else None
        plan = prune_(pruned, asked, calibration=images, show_progress=show_progress)
        options = {"dtype": dtype, "decisions": known, "timer": timer, "show_progress": show_progress}
        _, end_to_end = packed_copy(pruned, example, **options)
        reached = min(times.speedup for times in end_to_end)
        trials.append(SpeedTrial(asked.sparsity, reached, plan.config.method))
        return pruned, plan, reached >= speedup

    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "decisions.json" if decisions is None else decisions
        low, high = 0.0, highest
        reachable = attempt(replace(stand_in, sparsity=high), known)[2]
        while reachable and high - low > tolerance:
            middle = (low + high) / 2
            enough = attempt(replace(stand_in, sparsity=middle), known)[2]
            low, high = (low, middle) if enough else (middle, high)
        while reachable and high <= highest:
            pruned, plan, enough = attempt(replace(resolved, sparsity=high), known)
            if enough:
                model.load_state_dict(pruned.state_dict())
                return SpeedReport(speedup, plan, tuple(trials))
            high += tolerance
    raise ValueError(
        f"no sparsity up to {highest:g} makes the packed model {speedup:g}x as fast as the strongest dense form here: "
        + ", ".join(f"{trial.speedup:.2f}x at {trial.sparsity:.3g}" for trial in trials)
        + "; ask for less, or take another pattern or dtype (rmtkern.advise measures them)"
    )


def _check(speedup: float, config: PruneConfig, calibration: Any, highest: float, tolerance: float) -> None:
    for name, value in (("speedup", speedup), ("highest", highest), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < speedup < float("inf"):
        raise ValueError(f"speedup: expected a finite number above 0, got {speedup}")
    for name, value in (("highest", highest), ("tolerance", tolerance)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a fraction in (0, 1), got {value}")
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")
    if config.mixed:
        raise ValueError(
            f"pattern: prune_to_speed_ takes one, got {', '.join(config.patterns)}; prune_(pattern=[...], timings=, "
            "linear_speedup=) chooses among several"
        )
    if config.pattern == SPIKES:
        raise ValueError(
            f"pattern {SPIKES!r}: the search times stand-ins, which have no factors; take another pattern, or "
            "prune_ to sparsities of your choice and pack_"
        )
    if config.one_sparsity:
        raise ValueError(
            f"pattern {config.pattern!r} has one sparsity only, so there is nothing to find; take 'unstructured' or "
            "mini-blocks such as '4x1'"
        )
    if isinstance(calibration, Iterator):
        raise TypeError(
            f"calibration: got {type(calibration).__name__}, which can be read once only; pass a list, a DataLoader or "
            "tensors"
        )
