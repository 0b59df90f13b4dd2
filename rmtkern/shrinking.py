"""shrink_: hidden features and attention heads that matter least are removed; a smaller dense model is left.

It joins blocks (what can be cut), calibration and pruning.units (what goes); it knows no model and no storage.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.blocks import Block, cut_all_, find_blocks
from rmtkern.models import PrunableWeight, check_values, prunable_weights
from rmtkern.progress import progress
from rmtkern.pruning.calibrate import evaluating, forward_passes, second_moment, weights_in_order
from rmtkern.pruning.repair import damped
from rmtkern.pruning.stages import Call, Stage, find_stages
from rmtkern.pruning.units import loss_share, norm_units, remove_units
from rmtkern.pruning.visit import visit_stages
from rmtkern.ranks import Ranks
from rmtkern.shrink_plan import BlockPlan, ShrinkPlan
from rmtkern.token_merging import merging_of

__all__ = ["shrink_"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of two outputs relative to their largest magnitude that is rounding; of other dtypes 0.1."""

Choice = tuple[Tensor, float | None]  # units that go, share of the output that is lost


def shrink_(
    model: nn.Module,
    mlp: float = 0.0,
    heads: float = 0.0,
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    ignore: str | Iterable[str] = (),
    multiple: int = 16,
    show_progress: bool | None = None,
) -> ShrinkPlan:
    """Remove hidden features of MLPs and heads of attention, in place: what is left is a smaller dense model.

    With images, block by block on the shrunk prefix: what goes loses least of the block's output when the weights and
    the bias that take the others are refit by least squares, and they are. Without, the smallest norms go and nothing
    is refit. A block is cut only if trying a copy shows that it computes the same as with those units set to
    zero. Cut weights are new parameters: make optimizers afterwards. An nn.MultiheadAttention becomes a
    `rmtkern.fewer_heads.FewerHeads`. If anything fails, the model is as it was.

    Args:
        model: any module, not packed; on one device.
        mlp: share of the hidden features of each MLP that goes, [0, 1).
        heads: share of the heads of each attention that goes, [0, 1); one head always stays.
        calibration: images, as `prune_` takes them.
        ignore: roles, groups or globs over weights, as `prune_` takes them; a block with such a weight stays whole.
        multiple: hidden features that stay are rounded up to such a multiple, >= 1, so that kernels and patterns fit.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        ShrinkPlan: what went from each block, and which blocks stayed whole and why.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a share out of range, nothing to remove, NaN or Inf weights or inputs, weights on the meta device,
            no images, batches that the model treats differently, heads of a model that merges tokens, or a smaller
            model that computes something else.
        PackedModelError: the model is packed.
    """
    for name, share in (("mlp", mlp), ("heads", heads)):
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"{name}: expected a number, got {type(share).__name__}")
        if not 0 <= share < 1:
            raise ValueError(f"{name}: expected a share in [0, 1), got {share}")
    if type(multiple) is not int or multiple < 1:
        raise ValueError(f"multiple: expected an integer of at least 1, got {multiple!r}")
    if mlp == heads == 0:
        raise ValueError("shrink_: mlp and heads are both 0, so nothing would go; give a share of one of them")
    if heads and merging_of(model) is not None:
        raise ValueError(
            "heads: the model merges tokens by the keys of all of its heads; call rmtkern.unmerge_tokens_(model), "
            "remove heads, then merge tokens again"
        )
    kept = {weight.name for weight in prunable_weights(model, "all", ignore)}
    found, left = find_blocks(model, [kind for kind, share in (("mlp", mlp), ("heads", heads)) if share])  # type: ignore[misc]
    blocks = [block for block in found if kept.issuperset((*block.producers, block.consumer))]
    left |= {f"{block.name} ({block.kind})": "ignore= names a weight of it" for block in found if block not in blocks}
    weights = {weight.name: weight for weight in prunable_weights(model, "all")}
    check_values(weights[name] for block in blocks for name in (*block.producers, block.consumer))
    counts = {block.consumer: _count(block, mlp if block.kind == "mlp" else heads, multiple) for block in blocks}
    cutting = [block for block in blocks if counts[block.consumer]]
    if not blocks and not left:
        raise ValueError(
            f"shrink_: found no MLP or attention in {type(model).__name__} that parts can be cut out of; prune_ takes"
            " single weights of any linear"
        )
    if not cutting:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:2])
        raise ValueError(
            f"shrink_: nothing to remove from {len(blocks)} blocks; ask for more (hidden features stay in multiples of "
            f"{multiple}, one head stays)" + (f", or see why {len(left)} blocks stay whole: {reasons}" if left else "")
        )
    before = sum(parameter.numel() for parameter in model.parameters())
    images = 0
    if calibration is None:
        chosen = {block.consumer: _by_norm(block, weights, counts[block.consumer]) for block in cutting}
        cut_all_(model, [(block, _stay(block, chosen[block.consumer][0])) for block in cutting])
    else:
        with _unless_well(model, cutting), torch.no_grad(), evaluating(model):
            chosen, images, check = _calibrated(model, cutting, weights, counts, calibration, show_progress)
            masked = _first(check())
            undo = cut_all_(model, [(block, _stay(block, chosen[block.consumer][0])) for block in cutting])
            try:
                _compare(masked, _first(check()))
            except BaseException:
                undo()
                raise
    nothing = (torch.tensor([], dtype=torch.int64), None)
    plans = []
    for block in blocks:
        gone, loss = chosen.get(block.consumer, nothing)
        plans.append(BlockPlan(block.name, block.kind, block.units, tuple(gone.tolist()), loss))
    after = sum(parameter.numel() for parameter in model.parameters())
    return ShrinkPlan(mlp, heads, tuple(plans), left, (before, after), images)


def _count(block: Block, share: float, multiple: int) -> int:
    """How many units of a block go."""
    stay = block.units - round(share * block.units)
    if block.kind == "mlp":
        stay = -(-stay // multiple) * multiple
    return max(0, block.units - max(1, stay))


def _by_norm(block: Block, weights: Mapping[str, PrunableWeight], count: int) -> Choice:
    """By norms; of the weights that make heads only the values' are seen, as softmax has no use for scale."""
    every = torch.arange(block.units)
    rows = []
    for name in block.producers:
        matrix = weights[name].as_matrix()
        ordered = matrix[block.rows(every, len(matrix)).to(matrix.device)]
        parts = [ordered] if block.by_unit else list(ordered.chunk(len(matrix) // (block.units * block.size)))
        if block.kind == "heads" and weights[name].role in ("q", "k"):
            continue
        parts = parts[-1:] if weights[name].role == "qkv" else parts
        rows += [part.reshape(block.units, -1) for part in parts]
    return norm_units(weights[block.consumer].as_matrix(), rows, block.size, count), None


def _calibrated(
    model: nn.Module,
    blocks: Sequence[Block],
    weights: Mapping[str, PrunableWeight],
    counts: Mapping[str, int],
    calibration: Tensor | Iterable[Any],
    show_progress: bool | None,
) -> tuple[dict[str, Choice], int, Callable[[], Any]]:
    """Choose and refit block by block; consumers then hold zeros for what goes. With the images seen and one batch."""
    by_consumer = {block.consumer: block for block in blocks}
    stages = find_stages(model, [weight for name, weight in weights.items() if name in by_consumer])
    steps = iter(progress(range(len(blocks)), "shrink block by block", show=show_progress))
    chosen: dict[str, Choice] = {}
    seen, ranks = 0, Ranks.current()
    batches: list[Callable[[], Any]] = []

    def runs() -> Iterator[Any]:
        nonlocal seen
        for run, count in forward_passes(model, calibration, ranks=ranks):
            seen += count
            batches[:] = batches or [run]
            yield run

    def visit(stage: Stage, calls: list[Call]) -> None:
        for weight, uses in weights_in_order(stage, calls[0]):
            block, bias = by_consumer[weight.name], _bias(model, by_consumer[weight.name])
            moments = second_moment(stage, weight, uses, calls, constant=bias is not None)
            chosen[weight.name] = _choose(block, weight, bias, moments.mean(0), counts[weight.name])
            next(steps, None)

    visit_stages(stages, runs(), visit)
    next(steps, None)
    return chosen, int(ranks.total([seen])[0]), batches[0]


def _bias(model: nn.Module, block: Block) -> nn.Parameter | None:
    return model.get_submodule(block.consumer.rpartition(".")[0]).bias  # type: ignore[return-value]


def _choose(block: Block, weight: PrunableWeight, bias: Tensor | None, moment: Tensor, count: int) -> Choice:
    """Choose the units of one block, and write the refit consumer."""
    matrix = weight.as_matrix()
    whole = matrix if bias is None else torch.cat([matrix, bias.detach()[:, None]], 1)
    inputs = damped(moment)
    dead = moment.diagonal() <= 0  # an input that is always zero costs nothing, whatever its weights are
    gone, repaired = remove_units(whole.masked_fill(dead, 0), inputs, block.units, count, block.size)
    value = torch.where(dead, whole, repaired.to(whole.dtype))
    value[:, block.columns(gone).to(value.device)] = 0
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{weight.name}: the repair overflows {whole.dtype}; shrink a float32 model")
    weight.parameter.copy_(value[:, : matrix.shape[1]])
    if bias is not None:
        bias.copy_(value[:, -1])
    return gone, loss_share(whole, value, moment)


@contextmanager
def _unless_well(model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """Give the consumers their values back if the block fails."""
    owners = [model.get_submodule(block.consumer.rpartition(".")[0]) for block in blocks]
    before = [(parameter, parameter.detach().clone()) for owner in owners for parameter in owner.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


def _stay(block: Block, gone: Tensor) -> Tensor:
    """The units that stay."""
    stays = torch.ones(block.units, dtype=torch.bool)
    stays[gone.cpu()] = False
    return stays.nonzero().flatten()


def _first(output: Any) -> Tensor | None:
    """The first tensor of what a model returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    parts = map(_first, output) if isinstance(output, tuple | list) else ()
    return next((part for part in parts if part is not None), None)


def _compare(masked: Tensor | None, smaller: Tensor | None) -> None:
    """Refuse a smaller model whose output is not that of the masked one."""
    if masked is None or smaller is None or masked.shape != smaller.shape:
        raise ValueError("shrink_: the smaller model returns something else; pass ignore= for blocks that others read")
    largest = float(masked.abs().max()) if masked.numel() else 0.0
    error = float((smaller - masked).abs().max()) if masked.numel() else 0.0
    if not error <= TOLERANCE.get(masked.dtype, 0.1) * largest:
        raise ValueError(
            f"shrink_: the smaller model's output differs by {error:.3g} of {largest:.3g} from that with the units set "
            "to zero; something else reads what was cut, so name it in ignore="
        )
