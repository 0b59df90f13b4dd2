"""The guard: times the whole model, and puts choices back until it is not slower than any dense form of it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rmtkern.examples import Example
from rmtkern.packing.events import how
from rmtkern.packing.layers import PLAIN, Layer, pack_layer
from rmtkern.packing.report import EndToEnd
from rmtkern.packing.swaps import Swaps
from rmtkern.packing.timing import Timer
from rmtkern.progress import progress

__all__ = ["GUARD_NOISE", "guard"]

GUARD_NOISE = 0.01
"""How much slower than the faster dense model the packed model may time before the guard calls it slower."""


def guard(
    swaps: Swaps,
    layers: Sequence[Layer],
    examples: Sequence[Example],
    budget_ms: float,
    timer: Timer,
    show_progress: bool | None,
) -> tuple[list[EndToEnd], list[str]]:
    """Time the states on every example; put slow choices back until packed is not slower than dense.

    The dense forms are timed with and without the packed model's other kernels, so that what attention gains does not
    pay for a sparse layer that loses. Choices only ever go back: from sparse to dense, at the token counts of the
    examples that are slow, and at the end, if that is still slower, to the original model where it loses less on its
    worst example than the dense one does.

    Args:
        swaps: the states; the packed one changes.
        layers: those that were measured; their choices change.
        examples: what to call the model with.
        budget_ms: time spent on each example [ms].
        timer: times the states.
        show_progress: show a bar; None, only on a terminal.

    Returns:
        The times of each example as the states are at the end, and notes for the report.
    """

    def measure() -> list[EndToEnd]:
        found = []
        for index, example in enumerate(progress(examples, "timing the whole model", show=show_progress)):
            states = {"original": partial(swaps.run, swaps.original, example)}
            if swaps.dense != swaps.original:
                states["dense"] = partial(swaps.run, swaps.dense, example)
            if swaps.sites or swaps.packed not in (swaps.original, swaps.dense):
                states["packed"] = partial(swaps.run, swaps.packed, example)
            if swaps.sites and swaps.packed != swaps.dense:
                states["kernels"] = partial(swaps.run, swaps.dense, example, kernels=True)
            ms = timer(states, budget_ms)
            ways[index] = how(timer)
            dense = ms.get("dense", ms["original"])
            equal = ms["original"] if swaps.packed == swaps.original else dense
            found.append(EndToEnd(index, ms["original"], dense, ms.get("packed", equal), ms.get("kernels")))
        return found

    def behind(times: Sequence[EndToEnd], *, kernels: bool = False) -> list[int]:
        """The examples on which packed is slower than dense; `kernels`: or than dense with the same kernels."""
        found = []
        for t in times:
            rivals = [t.original_ms, t.dense_ms]
            if kernels and t.kernels_ms is not None:
                rivals.append(t.kernels_ms)
            if t.packed_ms > (1 + GUARD_NOISE) * min(rivals):
                found.append(t.example)
        return found

    notes: list[str] = []
    ways: dict[int, str] = {}
    times = measure()
    if behind(times, kernels=True):
        times = measure()  # a second look, before a choice is undone for noise
    while slow := behind(times, kernels=True):
        if fused := [name for name in ("MLP", "normed linear") if name in swaps.sites]:
            swaps.drop_site(fused[0])  # what came last and gains least goes first
            notes.append(f"end to end the {fused[0]} kernel made the model slower: its modules run by themselves again")
        elif worst := _worst(swaps, layers, slow):
            notes.append(_put_back(swaps, *worst))
        elif swaps.pairs:
            swaps.drop_pairs()
            notes.append("end to end gate and up in one kernel made the model slower: the linears are separate again")
        elif swaps.sites and behind(times):
            kernel = list(swaps.sites)[-1]
            swaps.drop_site(kernel)
            notes.append(f"end to end the {kernel} kernel made the model slower: PyTorch's was put back")
        else:
            break
        times = measure()
    original_behind = max(t.original_ms / t.dense_ms for t in times)
    dense_behind = max(t.dense_ms / t.original_ms for t in times)
    if behind(times) and original_behind < dense_behind:
        for layer in layers:
            layer.choice = dict.fromkeys(layer.tokens, PLAIN)
        for kernel in tuple(swaps.sites):
            swaps.drop_site(kernel)
        swaps.drop_pairs()
        swaps.packed = dict(swaps.original)  # a new state, so it is placed before it runs
        notes.append("end to end the swapped linears were slower than the original model: all were put back")
        times = [replace(t, packed_ms=t.original_ms, kernels_ms=None) for t in times]
    return times, [*notes, *(f"example {index} was timed {way}" for index, way in ways.items() if way)]


def _worst(swaps: Swaps, layers: Sequence[Layer], slow: Sequence[int]) -> tuple[list[Layer], set[int]] | None:
    """The layers of the group that gains least from a form that is not dense on the slow examples, and where."""
    found: dict[int, tuple[list[Layer], set[int]]] = {}
    for layer in layers:
        sparse = {t for t in layer.tokens_of(slow) if layer.choice[t] != layer.dense[t]}
        if layer.group is not None and sparse and layer.name not in swaps.paired:
            members, tokens = found.setdefault(id(layer.group), ([], set()))
            members.append(layer)
            tokens |= sparse

    def gain(one: tuple[list[Layer], set[int]]) -> float:
        (first, *_), tokens = one
        return first.group.speedup({t: first.choice[t] for t in tokens}) if first.group is not None else 1.0

    return min(found.values(), key=gain, default=None)


def _put_back(swaps: Swaps, layers: Sequence[Layer], tokens: set[int]) -> str:
    """Run some layers of one group in their dense form at some token counts; a note for the report."""
    for layer in layers:
        layer.choice = {t: layer.dense[t] if t in tokens else label for t, label in layer.choice.items()}
        if layer.choice == layer.dense:
            swaps.copy(swaps.packed, layer, swaps.dense)
        else:
            swaps.put(swaps.packed, layer, pack_layer(layer, layer.choice))
            swaps.now = None
    at = ", ".join(map(str, sorted(tokens)))
    if layers[0].group is not None:
        layers[0].group.notes.append(f"put back to dense: the packed model was slower end to end at T={at}")
    names = ", ".join(layer.name for layer in layers)
    return f"end to end the packed model was slower than dense: {names} went back to the dense form at T={at}"
