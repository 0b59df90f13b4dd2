"""All batches of a calibration brought through a model stage by stage, so that the weights of each may change first.

It chooses between the two ways to do that, and must not know what is done with the stages.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from rmtkern.pruning.chain import find_chain, visit_chain
from rmtkern.pruning.stages import Call, Stage
from rmtkern.pruning.waiting import visit_waiting

__all__ = ["visit_stages"]


def visit_stages(
    stages: Sequence[Stage],
    runs: Iterable[Callable[[], Any]],
    visit: Callable[[Stage, list[Call]], Sequence[Any] | None],
    leave: Callable[[Stage], None] = lambda stage: None,
) -> None:
    """Run all batches stage by stage; before they pass a stage, `visit` may use it and change its weights.

    Where each stage takes what the one before returns, as the blocks of most ViTs do (chain.find_chain), one call for
    each batch is all that is held. Otherwise every batch waits in its pass (waiting.visit_waiting). The first batch
    runs through the model once more than the others, which shows which it is.

    Args:
        stages: from `find_stages`; their modules run in one order, the same for every batch.
        runs: one forward pass of the model for each batch, at least one.
        visit: gets the stage and one call for each batch; it may run `stage.module(*call.args, **call.kwargs)`. It may
            return what that gives for the first of the calls, if nothing changed since; then it is not computed again.
        leave: gets each stage when no batch will run it again, so that its weights may change once more.

    Raises:
        ValueError: a stage that no batch reaches, or batches that reach different ones.
        Exception: whatever the model, `visit` or `leave` raises. No thread and no hook is left behind.
    """
    rest = iter(runs)
    first = next(rest)
    with torch.no_grad():
        found = find_chain(stages, first)
        if found is not None:
            visit_chain(found, chain([first], rest), visit, leave)
            return
    visited = visit_waiting(stages, chain([first], rest), visit, leave)
    left = [weight.name for stage in stages if stage not in visited for weight in stage.weights]
    if left:
        raise ValueError(
            f"calibration: no image reached {left[0]}; add it to ignore=, or use a method without calibration"
        )
