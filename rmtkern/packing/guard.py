"""The guard: times the whole model, and puts choices back until it is not slower than any dense form of it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rmtkern.examples import Example
from rmtkern.packing.events import how
from rmtkern.packing.layers import PLAIN, Layer, pack_layer
from rmtkern.packing.report import EndToEnd
from rmtkern.packing.swaps import Slots, Swaps
from rmtkern.packing.timing import Timer
from rmtkern.progress import progress

__all__ = ["GUARD_NOISE", "guard"]

GUARD_NOISE = 0.01
"""How much slower than the faster dense model the packed model may time before the guard calls it slower."""
LOOKS = 3
"""How often a packed model that times near the edge of that is timed; the mean decides."""
LONG = 0.25
"""Seconds of a run that moves more than caches hold, so that what ran before does not matter, and that costs much."""


class _State:
    """One state of the model on one example, as a timer calls it.

    Args:
        swaps: the states.
        slots: which of them.
        example: what to call the model with.
        kernels: whether with the kernels of the packed state.
    """

    def __init__(self, swaps: Swaps, slots: Slots, example: Example, *, kernels: bool = False) -> None:
        self.swaps, self.slots, self.example, self.kernels = swaps, slots, example, kernels
        self.seconds = 0.0

    def prepare(self) -> None:
        """Let it stand, and its weights be where they are in a model that runs again and again."""
        self.swaps.place(self.slots, kernels=self.kernels)
        if self.seconds < LONG:
            self()

    def __call__(self) -> object:
        start = time.perf_counter()
        outputs = self.swaps.run(self.slots, self.example, kernels=self.kernels)
        self.seconds = time.perf_counter() - start
        return outputs


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
    pay for a sparse layer that loses. Each state runs once untimed before it is timed, and where the packed model is
    not clearly faster than all others it is timed again, so that neither the order of the states nor one lucky time
    decides. Choices only ever go back: dense forms to the linears as they came, where these lose less on their worst
    example (what a module costs beside its kernel shows in the whole model only); sparse ones to dense, at the token
    counts of the examples that are slow; and at the end, if that is still slower, all to the original model.

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

    def look() -> list[EndToEnd]:
        found = []
        for index, example in enumerate(progress(examples, "timing the whole model", show=show_progress)):
            states = {"original": _State(swaps, swaps.original, example)}
            if swaps.dense != swaps.original:
                states["dense"] = _State(swaps, swaps.dense, example)
            if swaps.sites or swaps.packed not in (swaps.original, swaps.dense):
                states["packed"] = _State(swaps, swaps.packed, example)
            if swaps.sites and swaps.packed != swaps.dense:
                states["kernels"] = _State(swaps, swaps.dense, example, kernels=True)
            ms = timer(states, budget_ms)
            ways[index] = how(timer)
            dense = ms.get("dense", ms["original"])
            equal = ms["original"] if swaps.packed == swaps.original else dense
            found.append(EndToEnd(index, ms["original"], dense, ms.get("packed", equal), ms.get("kernels")))
        return found

    def measure(twice: bool = False) -> list[EndToEnd]:
        """The means of LOOKS looks near the edge of the noise, else of one; `twice`: of two if packed is behind."""
        looks = [look()]
        while len(looks) < LOOKS:
            times = _means(looks)
            lag, long = max(_lag(t, kernels=True) for t in times), any(t.packed_ms > 1000 * LONG for t in times)
            again = twice and len(looks) == 1 and lag > GUARD_NOISE
            if (long or abs(lag) > 2 * GUARD_NOISE) and not again:
                break
            looks.append(look())
        return _means(looks)

    def behind(times: Sequence[EndToEnd], *, kernels: bool = False) -> list[int]:
        """The examples on which packed is slower than dense; `kernels`: or than dense with the same kernels."""
        return [t.example for t in times if _lag(t, kernels=kernels) > GUARD_NOISE]

    def after_plain(times: list[EndToEnd]) -> list[EndToEnd]:
        """The times once dense forms that lose in the whole model have given way."""
        if swaps.dense == swaps.original or not _dense_loses(times):
            return times
        _put_plain(swaps, layers)
        notes.append("end to end the linears as they came were faster than in the dense forms that are faster alone")
        return measure()

    notes: list[str] = []
    ways: dict[int, str] = {}
    times = after_plain(measure(twice=True))  # twice before a choice is undone for noise
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
        times = measure(twice=True)  # before a choice is undone for noise
    times = after_plain(times)
    if behind(times) and _dense_loses(times, 0.0):
        for layer in layers:
            layer.choice = dict.fromkeys(layer.tokens, PLAIN)
        for kernel in tuple(swaps.sites):
            swaps.drop_site(kernel)
        swaps.drop_pairs()
        swaps.packed = dict(swaps.original)  # a new state, so it is placed before it runs
        notes.append("end to end the swapped linears were slower than the original model: all were put back")
        times = [replace(t, packed_ms=t.original_ms, kernels_ms=None) for t in times]
    return times, [*notes, *(f"example {index} was timed {way}" for index, way in ways.items() if way)]


def _lag(times: EndToEnd, *, kernels: bool) -> float:
    """By what fraction packed is slower than the fastest dense state; `kernels`: that with the same kernels too."""
    rivals = [times.original_ms, times.dense_ms]
    if kernels and times.kernels_ms is not None:
        rivals.append(times.kernels_ms)
    return times.packed_ms / min(rivals) - 1


def _dense_loses(times: Sequence[EndToEnd], least: float = GUARD_NOISE) -> bool:
    """Whether the dense state loses more on its worst example than the original model does, and more than `least`."""
    dense = max(t.dense_ms / t.original_ms for t in times)
    return dense > max(1 + least, *(t.original_ms / t.dense_ms for t in times))


def _means(looks: Sequence[Sequence[EndToEnd]]) -> list[EndToEnd]:
    """The times of each example over several looks at the same states."""
    return [
        EndToEnd(
            same[0].example,
            fmean(t.original_ms for t in same),
            fmean(t.dense_ms for t in same),
            fmean(t.packed_ms for t in same),
            None if same[0].kernels_ms is None else fmean(t.kernels_ms for t in same if t.kernels_ms is not None),
        )
        for same in zip(*looks, strict=True)
    ]


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


def _put_plain(swaps: Swaps, layers: Sequence[Layer]) -> None:
    """The linears as they came in place of their dense forms, in the dense state and where the packed one has these."""
    for group in {id(layer.group): layer.group for layer in layers if set(layer.dense.values()) != {PLAIN}}.values():
        if group is not None:
            group.notes.append("dense forms that are faster alone made the model slower end to end")
    for layer in layers:
        choice = {t: PLAIN if label == layer.dense[t] else label for t, label in layer.choice.items()}
        layer.dense = dict.fromkeys(layer.dense, PLAIN)
        swaps.put(swaps.dense, layer, None)
        if choice != layer.choice and layer.name not in swaps.paired:
            layer.choice = choice
            swaps.put(swaps.packed, layer, pack_layer(layer, choice))
    swaps.now = None


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
