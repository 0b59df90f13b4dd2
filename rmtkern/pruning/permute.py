"""Channels that may change places while a model computes the same, so that a pattern finds weights that go together.

Which ones may is found by trying: outputs of one weight and inputs of the next are shuffled and the block is run.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.models import PrunableWeight
from rmtkern.progress import progress
from rmtkern.pruning.calibrate import evaluating, forward_passes, tensors_of, weights_in_order
from rmtkern.pruning.pattern import parse_pattern, unit_of
from rmtkern.pruning.sensitivity import Sensitivity
from rmtkern.pruning.spread import spread_columns
from rmtkern.pruning.stages import Call, Stage, find_stages
from rmtkern.pruning.visit import visit_stages
from rmtkern.ranks import Ranks

__all__ = [
    "Site", "bias_of", "few", "find_sites", "group_channels", "group_rows", "log_costs", "permute_", "random_copy",
    "same_outputs",
]  # fmt: skip

_TRY = 2
_TOLERANCE = 1e-9
_SWAPS = 3
_HEADS = (256, 128, 96, 80, 72, 64, 48, 40, 32, 24, 16, 8)


@dataclass(frozen=True, eq=False)
class Site:
    """Channels that some weights put out and one takes in, in blocks (heads) inside which they may change places.

    Args:
        producers: pairs (weight, first row of the channels in it).
        consumer: takes the channels in as its columns; None where two producers are multiplied (queries and keys).
        channels: how many.
        block: channels of a block; divides `channels`.
    """

    producers: tuple[tuple[PrunableWeight, int], ...]
    consumer: PrunableWeight | None
    channels: int
    block: int

    def move_(self, order: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put channel order[i] in place i, biases included."""
        for weight, first in self.producers:
            rows = slice(first, first + self.channels)
            matrix = weight.as_matrix().clone()
            matrix[rows] = matrix[rows][order]
            weight.parameter.copy_(weight.to_parameter(matrix))
            bias = bias_of(weight, parameters)
            if bias is not None:
                bias[rows] = bias[rows][order]
        if self.consumer is not None:
            matrix = self.consumer.as_matrix()[:, order]
            self.consumer.parameter.copy_(self.consumer.to_parameter(matrix))


def bias_of(weight: PrunableWeight, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter | None:
    """The bias that goes with a weight, told by its name and shape, or None."""
    head, found, tail = weight.name.rpartition("weight")
    bias = parameters.get(f"{head}bias{tail}") if found else None
    return bias if bias is not None and bias.shape == weight.shape[:1] else None


def permute_(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    costs: Mapping[str, Sensitivity],
    pattern: str,
    images: Tensor | Iterable[Any],
    show_progress: bool | None = None,
) -> dict[str, Sensitivity]:
    """Let channels inside blocks of a model change places so that a pattern loses less; it computes the same.

    Mini-blocks, and outputs that share an n:m pattern, get weights that cost alike; groups of n:m get dear and cheap
    inputs each. What moves are hidden units of an MLP, value channels within a head, and for mini-blocks query with key
    channels within a head, wherever the model is found to allow it. Where it does not, nothing changes.

    Args:
        model: changed in place, biases of the weights included.
        weights: of the model, to be pruned.
        costs: of the weights.
        pattern: as pattern.parse_pattern takes it; "unstructured" leaves all as it is.
        images: as for calibrate.calibrate; the first few are used to try.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        The costs of the weights as they are now.

    Raises:
        Exception: whatever the model raises.
    """
    found = dict(costs)
    _, params = parse_pattern(pattern)
    unit = unit_of(params)
    spread = "m" in params and unit == (1, 1)
    if spread:
        unit = (1, params["m"])
    if unit == (1, 1):
        return found
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        sites = find_sites(model, weights, unit, images)
        for site in progress(sites, "permute", show=show_progress):
            if spread and site.consumer is not None:
                order = _spread(site.consumer, site.block, found[site.consumer.name], params)
            else:
                order = _order(site, found, unit)
            site.move_(order, parameters)
            for weight, first in site.producers:
                rows = found[weight.name].rows.clone()
                rows[first : first + site.channels] = rows[first : first + site.channels][order]
                found[weight.name] = replace(found[weight.name], rows=rows)
            if site.consumer is not None:
                name = site.consumer.name
                found[name] = replace(found[name], columns=found[name].columns[:, order])
    return found


def find_sites(
    model: nn.Module, weights: Sequence[PrunableWeight], unit: tuple[int, int], images: Tensor | Iterable[Any]
) -> list[Site]:
    """The sites of a model at which a unit gains: shuffling them changed nothing of a random copy in float64.

    Args:
        model: not changed; runs block by block on the first few images.
        weights: of the model.
        unit: (outputs, inputs) of a mini-block; (1, m) for n:m.
        images: as for calibrate.calibrate.
    """
    found: list[Site] = []

    def visit(stage: Stage, calls: list[Call]) -> None:
        if len(stage.weights) > 1:
            order = [weight for weight, uses in weights_in_order(stage, calls[0]) if uses == 1 and not weight.tied]
            found.extend(_sites_of(stage, calls[0], order, unit))

    run, _ = next(forward_passes(model, few(images)))
    with torch.no_grad(), evaluating(model):
        visit_stages(find_stages(model, weights), [run], visit)
    return found


def _sites_of(stage: Stage, call: Call, order: Sequence[PrunableWeight], unit: tuple[int, int]) -> list[Site]:
    """The sites of one block, tried on a copy with random parameters."""
    generator = torch.Generator().manual_seed(0)
    trial = random_copy(stage.module, generator)
    parameters = dict(trial.named_parameters())
    prefix = f"{stage.name}." if stage.name else ""
    names = {weight.name: weight.name.removeprefix(prefix) for weight in order}
    copied = {weight.name: replace(weight, name=names[weight.name], parameter=parameters[names[weight.name]])
              for weight in order}  # fmt: skip
    args, kwargs = _double(call.args), _double(call.kwargs)
    expected = tensors_of(trial(*args, **kwargs))

    def allows(site: Site) -> bool:
        parts = [torch.randperm(site.block, generator=generator) + at for at in range(0, site.channels, site.block)]
        shuffle = torch.cat(parts).to(site.producers[0][0].parameter.device)
        consumer = None if site.consumer is None else copied[site.consumer.name]
        twin = replace(site, producers=tuple((copied[w.name], first) for w, first in site.producers), consumer=consumer)
        twin.move_(shuffle, parameters)
        outputs = tensors_of(trial(*args, **kwargs))
        twin.move_(shuffle.argsort(), parameters)
        return Ranks.current().all(same_outputs(outputs, expected))

    found: list[Site] = []
    taken: set[tuple[str, int]] = set()
    for sites in _candidates(order, unit):
        ends = {(weight.name, first) for weight, first in sites[0].producers}
        if not ends & taken and allows(sites[-1]):  # what larger blocks allow, smaller ones do
            found.append(next((site for site in sites[:-1] if allows(site)), sites[-1]))
            taken |= ends
    return found


def random_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy without hooks whose parameters are random: none is 0 or 1 and hides a broken shuffle.

    Args:
        module: any; not changed. Buffers are copied.
        generator: on the CPU.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        bound = (3 / max(parameter.shape[-1] if parameter.ndim > 1 else 1, 1)) ** 0.5
        values = (torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        memo[id(parameter)] = nn.Parameter(values.to(parameter.device))
    found = copy.deepcopy(module, memo).double()
    for part in found.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return found.requires_grad_(False)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        wide = value.double() if value.is_floating_point() else value
        vars(wide).update(vars(value))  # what a module gave its output along, such as the sizes of merged tokens
        return wide
    if isinstance(value, dict):
        return {key: _double(part) for key, part in value.items()}
    return type(value)(map(_double, value)) if type(value) in (tuple, list) else value


def same_outputs(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether float64 outputs are the same but for the order of sums: each to 1e-9 of its largest value."""
    return len(found) == len(expected) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=_TOLERANCE * float(other.abs().max()))
        for one, other in zip(found, expected, strict=True)
    )


def _candidates(order: Sequence[PrunableWeight], unit: tuple[int, int]) -> Iterator[list[Site]]:
    """Every site that shapes and the order of use allow, each with all block sizes, the largest first.

    Outputs of one weight, or of a gate and its partner, that a later one takes in; values in the last third of a fused
    weight; and query with key channels in the first two thirds, or in two weights of one shape.
    """
    plain = [weight for weight in order if weight.kind != "conv"]
    for at, weight in enumerate(plain):
        rows, columns = weight.shape
        near = plain[at + 1 : at + 4]
        for later in near:
            channels = later.shape[1]
            if channels not in (rows, rows / 3):
                continue
            blocks = _blocks(channels, unit)
            if blocks:
                yield [Site(((weight, rows - channels),), later, channels, block) for block in blocks]
            if channels == rows:
                pairs = [Site(((weight, 0), (other, 0)), later, rows, rows)
                         for other in near if other is not later and other.shape == weight.shape]  # fmt: skip
                yield from ([pair] for pair in pairs if rows % max(unit) == 0)
        blocks = _blocks(columns, unit)
        if unit[0] > 1 and blocks:
            if rows == 3 * columns:
                yield [Site(((weight, 0), (weight, columns)), None, columns, block) for block in blocks]
            for other in near:
                if rows == columns and other.shape == weight.shape:
                    yield [Site(((weight, 0), (other, 0)), None, rows, block) for block in blocks]


def _blocks(channels: int, unit: tuple[int, int]) -> list[int]:
    """Sizes that a head may have, the largest first: all channels, or one of the usual sizes."""
    sizes = (channels, *(size for size in _HEADS if size < channels))
    return [size for size in sizes if size % max(unit) == 0 and channels % size == 0]


def few(images: Tensor | Iterable[Any]) -> Any:
    """The first two images, or the first batch if that is a mapping, as calibrate.calibrate takes them."""
    if isinstance(images, tuple) and images and isinstance(images[0], Tensor):
        images = images[0]
    if isinstance(images, Tensor):
        return images[:_TRY]
    batch = next(iter(images))
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return first[:_TRY] if isinstance(first, Tensor) else [batch]


def _order(site: Site, costs: Mapping[str, Sensitivity], unit: tuple[int, int]) -> Tensor:
    """Where the channels go, block by block."""
    made = [costs[weight.name].of(weight.as_matrix())[first : first + site.channels]
            for weight, first in site.producers]  # fmt: skip
    rows = torch.cat([log_costs(one) for one in made], 1)
    columns = rows[:, :0]
    if site.consumer is not None:
        columns = log_costs(costs[site.consumer.name].of(site.consumer.as_matrix())).t()
    orders = []
    for first in range(0, site.channels, site.block):
        part = slice(first, first + site.block)
        taken = None if site.consumer is None else columns[part]
        orders.append(group_channels(rows[part], taken, unit) + first)
    return torch.cat(orders)


def group_channels(made: Tensor, taken: Tensor | None, unit: tuple[int, int]) -> Tensor:
    """An order of channels in which the mini-blocks along them hold what is alike: pairs (of c), then groups of r.

    Args:
        made: [C, F] features of the channels as rows of the weights that put them out.
        taken: [C, F] the same as columns of the weights that take them in; None where none does.
        unit: (r, c), outputs and inputs of a mini-block.

    Returns:
        int64 [C]: channel order[i] goes to place i.
    """
    r, c = unit
    order = torch.arange(len(made), device=made.device)
    if taken is not None and c > 1:
        order = group_rows(taken if r == 1 else torch.cat([made, taken], 1), c)
    step = c if taken is not None and r % c == 0 else 1
    if r > step:
        summed = made[order].reshape(len(made) // step, step, -1).sum(1)
        order = order.reshape(-1, step)[group_rows(summed, r // step)].flatten()
    return order


def _spread(consumer: PrunableWeight, block: int, cost: Sensitivity, params: Mapping[str, int]) -> Tensor:
    """Where the channels go, block by block, so that the n:m groups of a weight that takes them in lose little."""
    parts = cost.of(consumer.as_matrix()).split(block, 1)
    orders = [spread_columns(part, params["n"], params["m"]) + at * block for at, part in enumerate(parts)]
    return torch.cat(orders)


def log_costs(cost: Tensor) -> Tensor:
    """What is alike in two channels: by how much, as a logarithm, their entries cost more than the median.

    Args:
        cost: [C, F], >= 0.

    Returns:
        [C, F] in [-3, 3].
    """
    median = cost.flatten().median().clamp(min=torch.finfo(cost.dtype).tiny)
    return (cost / median).clamp(1e-3, 20).log().clamp(-3, 3)


def group_rows(features: Tensor, size: int) -> Tensor:
    """An order of rows [N, F] in which each `size` neighbours have large inner products with each other; int64 [N].

    Greedily, from the longest row on, then by swaps of two rows between groups while that helps.

    Args:
        features: [N, F], N divisible by `size`.
        size: rows in a group, >= 2.
    """
    likeness = features @ features.t()
    count = len(features)
    left = torch.ones(count, dtype=torch.bool, device=features.device)
    order: list[int] = []
    for first in features.norm(dim=1).argsort(descending=True, stable=True).tolist():
        if not left[first]:
            continue
        left[first] = False
        order.append(first)
        near = likeness[first].clone()
        for _ in range(size - 1):
            best = int(near.masked_fill(~left, -torch.inf).argmax())
            left[best] = False
            order.append(best)
            near += likeness[best]
    places = torch.tensor(order, device=features.device)
    for _ in range(_SWAPS):
        if not _swap_(places, likeness, size):
            break
    return places


def _swap_(order: Tensor, likeness: Tensor, size: int) -> bool:
    """One round of swaps, each group in one at most, the best first; whether there was any."""
    count = len(order)
    group = torch.empty_like(order)
    group[order] = torch.arange(count, device=order.device) // size
    place = order.argsort()
    member = nn.functional.one_hot(group, count // size).to(likeness.dtype)
    towards = (likeness @ member)[:, group]  # of i to the group of j
    own = towards.diagonal() - likeness.diagonal()
    gain = towards + towards.t() - 2 * likeness - own[:, None] - own
    gain.masked_fill_(group[:, None] == group, 0.0)
    best = gain.triu(1).flatten().topk(min(2 * count, count * count))
    least = 1e-6 * float(likeness.diagonal().max())
    used: set[int] = set()
    for value, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if value <= least:
            break
        i, j = divmod(at, count)
        groups = {int(group[i]), int(group[j])}
        if not groups & used:
            used |= groups
            a, b = int(place[i]), int(place[j])
            order[a], order[b] = j, i
    return bool(used)
