"""What stays as it is since the model needs it so: found by trying, before anything is timed."""

import copy
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from rmtkern.examples import Example
from rmtkern.layouts import LAYOUTS
from rmtkern.packing.attention import AttentionCall, watch_attention
from rmtkern.packing.layers import Layer
from rmtkern.packing.lent import LendingLinear
from rmtkern.packing.multihead import Split, linears_of
from rmtkern.packing.outputs import deviation_of, outputs_on, tolerance_of
from rmtkern.packing.swaps import Slots
from rmtkern.packing.watch import watch
from rmtkern.places import place_

__all__ = ["leave_lenders", "leave_referenced", "leave_whole", "split_multiheads"]


def split_multiheads(
    model: nn.Module, split: Split, examples: Sequence[Example]
) -> tuple[list[list[Tensor]], dict[str, list[AttentionCall]]]:
    """Take the nn.MultiheadAttentions apart, if that changes no output; else leave all of them whole.

    Args:
        model: changed in place.
        split: which can be taken apart.
        examples: what to call the model with.

    Returns:
        The outputs before, and the calls of attention in each module by name; both empty if none can be taken apart.
    """
    if not split.apart:
        return [], {}
    with watch_attention(model) as calls:
        expected = outputs_on(model, examples)
    calls = {name: found for name, found in calls.items() if name in split.whole}
    place_(model, dict(split.apart))
    try:
        same = deviation_of(outputs_on(model, examples), expected, tolerance_of(model)) is None
    except (ValueError, TypeError):
        same = False
    if not same:
        reason = "the model needs nn.MultiheadAttention itself: with the linears apart it fails or differs"
        for name in tuple(split.apart):
            place_(model, split.leave(name, reason))
    return expected, calls


def leave_lenders(
    model: nn.Module, layers: Sequence[Layer], examples: Sequence[Example], expected: list[list[Tensor]]
) -> list[list[Tensor]]:
    """Leave the linears that lend their weights as they are, if what stands for these changes the model's outputs.

    Returns:
        What the unchanged model computes; `expected` if no linear lends its weight.
    """
    lending = {layer.name: layer for layer in layers if layer.seen.lent and layer.reason is None}
    if not lending:
        return expected
    expected = outputs_on(model, examples)  # while it was watched, the weights were of a subclass of Tensor
    trial: Slots = {
        name: LendingLinear(
            LAYOUTS["dense"].pack(layer.module.weight.detach()),
            None if layer.module.bias is None else layer.module.bias.detach(),
        )
        for name, layer in lending.items()
    }
    tolerance = tolerance_of(model, *(layer.module for layer in lending.values()))

    def fit(names: Iterable[str]) -> bool:
        place_(model, {name: trial[name] for name in names})
        try:
            return deviation_of(outputs_on(model, examples), expected, tolerance) is None
        except (ValueError, TypeError, RuntimeError):  # the last for outputs of another shape
            return False
        finally:
            place_(model, {name: layer.module for name, layer in lending.items()})

    good = list(lending)
    if not fit(good):
        good = [name for name in lending if fit([name])]
        good = good if fit(good) else []
    reason = "other code reads its .weight besides its own forward and fails or differs without a tensor there"
    for name in lending.keys() - set(good):
        lending[name].reason = reason
    return expected


def leave_referenced(model: nn.Module, layers: Sequence[Layer], examples: Sequence[Example]) -> None:
    """Leave the linears that the model reaches otherwise than by their names, as through a list: a swap misses them.

    They are watched while copies, which share their parameters, stand in their places.

    Args:
        model: as it was afterwards.
        layers: those that are left get the reason.
        examples: what to call the model with.
    """
    movable = {layer.name: layer for layer in layers if layer.reason is None}
    linears = {name: layer.module for name, layer in movable.items()}
    place_(model, {name: copy.copy(linear) for name, linear in linears.items()})
    try:
        with watch(model, linears) as watched:
            outputs_on(model, examples)
    finally:
        place_(model, dict(linears))
    for name, seen in watched.items():
        if seen.tokens or seen.lent:
            movable[name].reason = "the model keeps it in another place than its name, where a swap would not be seen"


def leave_whole(model: nn.Module, split: Split, layers: Sequence[Layer], unlike: Mapping[str, str]) -> None:
    """Put nn.MultiheadAttentions back whole of which not both linears can be packed.

    Args:
        model: changed in place.
        split: those that are apart; loses the ones that are put back.
        layers: their linears get the reason.
        unlike: name -> why the calls of a module cannot be computed apart.
    """
    by_name = {layer.name: layer for layer in layers}
    for name in tuple(split.apart):
        mine = [by_name[child] for child in linears_of(name)]
        reason = unlike.get(name) or next((layer.reason for layer in mine if layer.reason is not None), None)
        if reason is not None:
            for layer in mine:
                layer.reason = reason
            place_(model, split.leave(name, reason))
