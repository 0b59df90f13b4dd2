"""The channels that all blocks of a model read and add to may change places too, everywhere at once.

Which weights and vectors hold them is told by roles and sizes and then tried; that a LayerNorm stands in between does
not matter, as it treats all channels alike.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.models import PrunableWeight, prunable_weights
from rmtkern.progress import progress
from rmtkern.pruning.calibrate import evaluating, forward_passes, tensors_of
from rmtkern.pruning.mixing import losses_of
from rmtkern.pruning.pattern import parse_pattern, unit_of
from rmtkern.pruning.permute import bias_of, few, group_channels, log_costs, random_copy, same_outputs
from rmtkern.pruning.sensitivity import Sensitivity
from rmtkern.pruning.spread import spread_columns
from rmtkern.ranks import Ranks

__all__ = ["Stream", "find_stream", "permute_stream_"]

_log = logging.getLogger(__name__)

_READERS = ("qkv", "q", "k", "v", "mlp_in", "mlp_gate", "head", "linear")
_WRITERS = ("attn_out", "mlp_out", "embed")
_FEATURES = 1 << 24
"""Entries that are compared to find what is alike; of larger models evenly spaced ones."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream of a model: where its channels stand.

    Args:
        width: how many channels.
        readers: weights that take them in, as their columns.
        writers: weights that put them out, as their rows.
        vectors: names of parameters and buffers that hold them along their last axis: biases of the writers, norms,
            scales, class and register tokens, embeddings of positions.
    """

    width: int
    readers: tuple[PrunableWeight, ...]
    writers: tuple[PrunableWeight, ...]
    vectors: tuple[str, ...]

    def move_(self, order: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Put channel order[i] in place i.

        Args:
            order: int64 [width].
            tensors: parameters and buffers of the model that the weights belong to, by name.
        """
        for weight in self.readers:
            weight.parameter.copy_(weight.to_parameter(weight.as_matrix()[:, order]))
        for weight in self.writers:
            weight.parameter.copy_(weight.to_parameter(weight.as_matrix()[order]))
        for name in self.vectors:
            tensors[name].copy_(tensors[name][..., order])


def permute_stream_(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    costs: Mapping[str, Sensitivity],
    pattern: str,
    sparsity: float,
    images: Tensor | Iterable[Any],
    show_progress: bool | None = None,
) -> dict[str, Sensitivity]:
    """Let the channels of a model's residual stream change places so that a pattern loses less; it computes the same.

    Mini-blocks along the inputs of what reads the stream, or along the outputs of what writes it, get weights that cost
    alike; groups of n:m dear and cheap inputs each. If that does not lower the summed loss, or the model has no stream
    that may be moved, nothing changes.

    Args:
        model: changed in place.
        weights: of the model, to be pruned.
        costs: of the weights.
        pattern: as pattern.parse_pattern takes it; "unstructured" leaves all as it is.
        sparsity: of every weight, at which the loss is looked at.
        images: as for calibrate.calibrate; the first few are used to try.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        The costs of the weights as they are now.

    Raises:
        Exception: whatever the model raises.
    """
    _, params = parse_pattern(pattern)
    stream = find_stream(model, images, show_progress) if params else None
    if stream is None:
        return dict(costs)
    with torch.no_grad():
        order = _order(stream, costs, params)
        moved = dict(costs)
        before = _loss(weights, costs, pattern, sparsity)
        tensors = _tensors(model)
        stream.move_(order, tensors)
        for weight in stream.readers:
            if weight.name in moved:
                moved[weight.name] = replace(moved[weight.name], columns=moved[weight.name].columns[:, order])
        for weight in stream.writers:
            if weight.name in moved:
                moved[weight.name] = replace(moved[weight.name], rows=moved[weight.name].rows[order])
        if _loss(weights, moved, pattern, sparsity) < before:
            return moved
        stream.move_(order.argsort(), tensors)
    return dict(costs)


def _loss(weights: Sequence[PrunableWeight], costs: Mapping[str, Sensitivity], pattern: str, sparsity: float) -> float:
    """What the weights lose together if that share of the units of each goes."""
    total = 0.0
    for weight in weights:
        losses = losses_of(costs[weight.name].of(weight.as_matrix()), pattern)
        total += float(losses[0] if len(losses) == 1 else losses[round(sparsity * (len(losses) - 1))])
    return total


def _order(stream: Stream, costs: Mapping[str, Sensitivity], params: dict[str, int]) -> Tensor:
    """Where the channels go, by the costs of those weights that have some."""
    readers = [weight for weight in stream.readers if weight.name in costs]
    writers = [weight for weight in stream.writers if weight.name in costs]
    device = (stream.readers + stream.writers)[0].parameter.device
    size = stream.width * (sum(one.shape[0] for one in readers) + sum(one.shape[1] for one in writers))
    step = -(-size // _FEATURES)

    def taken() -> Iterator[Tensor]:
        for weight in readers:
            yield costs[weight.name].of(weight.as_matrix())[::step]

    def made() -> Iterator[Tensor]:
        for weight in writers:
            yield costs[weight.name].of(weight.as_matrix())[:, ::step]

    unit, nothing = unit_of(params), torch.zeros(stream.width, 0, device=device)
    if "m" in params and unit == (1, 1):
        return spread_columns(torch.cat([*taken(), nothing.t()]), params["n"], params["m"])
    rows = torch.cat([nothing, *(log_costs(one) for one in made())], 1)
    columns = torch.cat([nothing, *(log_costs(one.t()) for one in taken())], 1)
    return group_channels(rows, columns, unit)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in chain(model.named_parameters(), model.named_buffers())}


def find_stream(model: nn.Module, images: Tensor | Iterable[Any], show_progress: bool | None = None) -> Stream | None:
    """The residual stream of a model, if moving its channels changed nothing of a random copy in float64.

    What holds the channels is guessed by the roles of the weights and the size of everything else; if that fails,
    without one of the modules at a time (in every block alike) that own vectors of this size, or heads.

    Args:
        model: not changed.
        images: as for calibrate.calibrate; the first few are used.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        The stream; None if blocks differ in width or no guess holds, as for a model that returns the stream itself, or
        if such a copy does not run (with a warning).
    """
    guess = _guess(model)
    try:
        return None if guess is None else _tried(guess, model, images, show_progress)
    except Exception as error:
        _log.warning("the residual stream stays as it is: a float64 copy of the model does not run: %s", error)
        return None


def _tried(
    guess: Stream, model: nn.Module, images: Tensor | Iterable[Any], show_progress: bool | None
) -> Stream | None:
    """The guess, or the first part of it, that a random copy allows."""
    generator = torch.Generator().manual_seed(0)
    trial = random_copy(model, generator)
    tensors = _tensors(trial)
    twins = {weight.name: weight for weight in prunable_weights(trial, "all")}
    shuffle = torch.randperm(guess.width, generator=generator)
    with torch.no_grad(), evaluating(trial):
        run, _ = next(forward_passes(trial, few(images)))
        expected = tensors_of(run())

        def allows(stream: Stream) -> bool:
            twin = replace(
                stream,
                readers=tuple(twins[weight.name] for weight in stream.readers),
                writers=tuple(twins[weight.name] for weight in stream.writers),
            )
            there = shuffle.to(next(iter(tensors.values())).device)
            twin.move_(there, tensors)
            found = tensors_of(run())
            twin.move_(there.argsort(), tensors)
            return Ranks.current().all(same_outputs(found, expected))

        unsure = [weight.name for weight in guess.readers if weight.role in _READERS[-2:]]
        owners = list(dict.fromkeys(_owner(name) for name in (*guess.vectors, *unsure)))
        tries = [guess, *(_without(guess, owner) for owner in owners)]
        return next((one for one in progress(tries, "find the stream", show=show_progress) if allows(one)), None)


def _guess(model: nn.Module) -> Stream | None:
    """What holds the stream by roles and sizes; None if blocks differ in width."""
    weights = prunable_weights(model, "all")
    widths = Counter(weight.shape[1] for weight in weights if weight.role in _READERS[:-2] and weight.kind != "conv")
    if len(widths) != 1:
        return None
    (width,) = widths
    readers = [one for one in weights if one.role in _READERS and one.kind != "conv" and one.shape[1] == width]
    writers = [one for one in weights if one.role in _WRITERS and one.groups == 1 and one.shape[0] == width]
    if not readers or not writers:
        return None
    parameters = dict(model.named_parameters())
    biases = {id(bias): weight for weight in weights if (bias := bias_of(weight, parameters)) is not None}
    own = {id(weight.parameter) for weight in weights}
    written = {weight.name for weight in writers}
    vectors = [
        name
        for name, value in chain(parameters.items(), model.named_buffers())
        if value.ndim and value.shape[-1] == width and id(value) not in own
        and (id(value) not in biases or biases[id(value)].name in written)
    ]  # fmt: skip
    return Stream(width, tuple(readers), tuple(writers), tuple(vectors))


def _owner(name: str) -> str:
    """The module that holds a vector, the same in every block."""
    return re.sub(r"\d+", "#", name.rpartition(".")[0] or name)


def _without(stream: Stream, owner: str) -> Stream:
    readers = tuple(weight for weight in stream.readers if _owner(weight.name) != owner)
    return replace(stream, readers=readers, vectors=tuple(name for name in stream.vectors if _owner(name) != owner))
