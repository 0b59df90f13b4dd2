"""The choice per gate-up pair: both linears in one kernel, or each in the form that was chosen for it alone.

gated.py finds the pairs and says how a module runs one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.pairs import interleave
from rmtkern.nn import PackedLinear
from rmtkern.packing.device import Device
from rmtkern.packing.events import how
from rmtkern.packing.gated import GatedPair
from rmtkern.packing.layers import LIBRARY, Layer
from rmtkern.packing.report import GatedReport
from rmtkern.packing.swaps import Swaps
from rmtkern.packing.timing import Timer
from rmtkern.progress import progress
from rmtkern.testing import accuracy_excess

__all__ = ["measure_pairs"]


@dataclass
class _PairGroup:
    """Pairs that share a measurement: what Group says of layers, and equal forms of the separate linears."""

    pairs: list[GatedPair]
    linears: list[list[Layer]]  # of each pair
    ms: dict[int, dict[str, float]] = field(default_factory=dict)
    recipes: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def best(self) -> tuple[str, float]:
        """The form of the pair whose worst token count is best, and its time there over the separate linears'."""
        worst = {label: max(ms[label] / ms["separate"] for ms in self.ms.values()) for label in self.recipes}
        label = min(worst, key=lambda name: worst[name]) if worst else ""
        return label, worst.get(label, float("inf"))


def measure_pairs(
    pairs: Sequence[GatedPair],
    layers: Mapping[str, Layer],
    swaps: Swaps,
    layouts: Sequence[str],
    device: Device,
    margin: float,
    budget_ms: float,
    timer: Timer,
    show_progress: bool | None,
) -> list[GatedReport]:
    """Time each pair in one kernel against its linears in the forms chosen for them, and swap it where it is faster.

    Args:
        pairs: as `find_pairs` gives them, both linears of each on the same token counts.
        layers: name -> the layers, with their choices.
        swaps: its packed state changes.
        layouts: names of the sparse layouts to try; the dense forms are always tried.
        device: where the model lies.
        margin: by what fraction of time one kernel must be faster at every token count.
        budget_ms: time spent on each token count [ms].
        timer: times the candidates.
        show_progress: show a bar; None, only on a terminal.

    Returns:
        One report for each pair, in order.
    """
    groups: dict[tuple[object, ...], _PairGroup] = {}
    for pair in pairs:
        mine = [layers[path] for path in pair.paths]
        key = (pair.activation, pair.stacked, *((id(layer.group), *layer.choice.items()) for layer in mine))
        group = groups.setdefault(key, _PairGroup([], []))
        group.pairs.append(pair)
        group.linears.append(mine)
    reports = {}
    for group in progress(list(groups.values()), "timing gate and up", show=show_progress):
        _measure_pair(group, swaps, layouts, device, budget_ms, timer)
        label, worst = group.best()
        for pair, mine in zip(group.pairs, group.linears, strict=True):
            reason = f"{label} is {1 / worst:.2f}x the separate linears" if label else "no form of the pair fits"
            used = bool(label) and worst <= 1 - margin
            if label and not used:
                reason += f", short of the margin ({100 * margin:g} % less time)"
            if used:
                gate, up, *_ = pair.weight([layer.module for layer in mine])
                layout, params = group.recipes[label]
                form = LAYOUTS[layout].pack(interleave(gate, up), **params)
                excess = 0.0 if label in LIBRARY else _pair_excess(pair, form, mine)
                if excess > 1:
                    used, reason = False, f"{label} misses the accuracy rule by a factor {excess:.2g}"
                else:
                    swaps.put_pair(pair, pair.module(form, [layer.module for layer in mine]))
            reason = "; ".join([reason, *dict.fromkeys(group.notes)])
            reports[pair.name] = GatedReport(
                pair.name, pair.paths, pair.activation, group.ms, label if used else None, reason
            )
    return [reports[pair.name] for pair in pairs]


def _measure_pair(
    group: _PairGroup, swaps: Swaps, layouts: Sequence[str], device: Device, budget_ms: float, timer: Timer
) -> None:
    """Fill a group's times from its first pair."""
    pair, layers = group.pairs[0], group.linears[0]
    gate, up, *_ = pair.weight([layer.module for layer in layers])
    both = interleave(gate, up)
    separate = [swaps.packed[path] for path in pair.paths]
    absorbed = isinstance(separate[0], PackedLinear) and separate[0].activation is not None
    activation = None if absorbed else pair.activation
    forms: dict[str, PackedWeight] = {}
    for layout, params in device.recipes(both, layouts).values():
        if layout == "dense":
            params = {**params, "tokens": int(median(layers[0].tokens))}
        form = LAYOUTS[layout].pack(both, **params)
        if layout != "dense" and form.nbytes >= both.nbytes:
            continue
        try:
            excess = 0.0 if form.label in LIBRARY else _pair_excess(pair, form, layers)
        except KernelUnavailable as error:
            group.notes.append(str(error))
            continue
        if excess > 1:
            group.notes.append(f"{form.label} misses the accuracy rule by a factor {excess:.2g}")
            continue
        forms[form.label] = form
        group.recipes[form.label] = (layout, params)
    generator = torch.Generator().manual_seed(0)
    for tokens in layers[0].tokens:
        x = torch.randn(tokens, gate.shape[1], generator=generator).to(gate)
        calls: dict[str, Callable[[], object]] = {
            "separate": lambda x=x: pair.combine([module(x) for module in separate], activation)  # type: ignore[misc]
        }
        for label, form in forms.items():
            calls[label] = partial(pair.module(form, [layer.module for layer in layers]), x)
        with torch.no_grad():
            group.ms[tokens] = dict(timer(calls, budget_ms))
        group.notes += [f"timed {way}"] if (way := how(timer)) else []


def _pair_excess(pair: GatedPair, form: PackedWeight, layers: Sequence[Layer]) -> float:
    """By what factor a form of the pair misses the accuracy rule."""
    gate, up, bg, bu = pair.weight([layer.module for layer in layers])
    x = torch.randn(32, gate.shape[1], generator=torch.Generator().manual_seed(1)).to(gate)
    y = pair.module(form, [layer.module for layer in layers])(x).detach()
    return accuracy_excess(y, x, gate, bg, pair.activation, up=(up, bu))
