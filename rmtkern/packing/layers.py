"""The choice per layer: which linears there are, in which forms each was timed, and which is chosen.

Layers of equal shape and similar sparsity share a measurement. It knows no whole model; guard.py judges that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.activations import apply_activation
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.spectral import SpectralWeight
from rmtkern.nn import PackedLinear
from rmtkern.ops import linear
from rmtkern.packing.decisions import DecisionLog
from rmtkern.packing.device import Device
from rmtkern.packing.events import how
from rmtkern.packing.gated import part
from rmtkern.packing.lent import LendingLinear
from rmtkern.packing.multihead import Split, in_projection
from rmtkern.packing.timing import Timer
from rmtkern.packing.watch import Seen, reason_to_leave
from rmtkern.spectral_linear import SpectralLinear
from rmtkern.testing import accuracy_excess, excess_over

__all__ = [
    "LIBRARY",
    "PLAIN",
    "SPARSITY_STEP",
    "Group",
    "Layer",
    "best_form",
    "choose_forms",
    "find_layers",
    "group_layers",
    "measure_group",
    "pack_layer",
]

PLAIN = "dense/torch"
"""The candidate that leaves the nn.Linear alone."""
LIBRARY = (PLAIN, "dense/onednn", "dense/onednn_prepacked")
"""Candidates that PyTorch computes, which is the yardstick of accuracy."""
SPARSITY_STEP = 0.05
"""Layers of one shape whose sparsities fall into one step share a measurement, taken on the least sparse of them."""


@dataclass
class Layer:
    """One nn.Linear on its way through pack_; filled step by step.

    Args:
        name: module name, or "<name>.in_proj" for what an nn.MultiheadAttention computes with its in_proj_weight.
        module: the linear as it came.
        reason: why it stays as it is, or None.
        sparsity: fraction of zeros of its weight, [0, 1].
        seen: what the forward passes on the examples did with it.
        calls: how many calls of it there were after each example.
        choice: token count -> label of the form that runs.
        dense: the same, of dense forms only.
        parts: where the linear stands for a SpectralLinear, its B, A and S.
        group: the layers that it shares a measurement with; None before that, and where it stays.
        note: what happened to its choice, for the report.
    """

    name: str
    module: nn.Linear
    reason: str | None = None
    sparsity: float = 0.0
    seen: Seen = field(default_factory=Seen)
    calls: list[int] = field(default_factory=list)
    choice: dict[int, str] = field(default_factory=dict)
    dense: dict[int, str] = field(default_factory=dict)
    parts: tuple[Tensor, Tensor, Tensor] | None = None
    group: "Group | None" = None
    note: str | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The different token counts that the examples gave it, ascending."""
        return tuple(sorted(set(self.seen.tokens)))

    def tokens_of(self, examples: Iterable[int]) -> set[int]:
        """The token counts of some examples."""
        starts = [0, *self.calls]
        return {tokens for index in examples for tokens in self.seen.tokens[starts[index] : self.calls[index]]}

    def form(self, layout: str, params: dict[str, int]) -> PackedWeight:
        """Its weight in a layout; in "spectral" its own parts, which an SVD of their sum would not find again."""
        weight = self.module.weight.detach()
        if self.parts is not None and layout == SpectralWeight.layout:
            return SpectralWeight.from_parts(*(part.to(weight.dtype) for part in self.parts))
        return LAYOUTS[layout].pack(weight, **params)

    def excess(self, form: PackedWeight, y: Tensor, x: Tensor) -> float:
        """The error of y [T, N] over what the accuracy rule allows; of parts over twice that of PyTorch's products."""
        module, activation = self.module, self.seen.activation
        bias = None if module.bias is None else module.bias.detach()
        if self.parts is None or form.layout != SpectralWeight.layout:
            return accuracy_excess(y, x, module.weight.detach(), bias, activation)

        def product(dtype: torch.dtype) -> Tensor:
            b, a, s = (part.to(x.dtype).to(dtype) for part in self.parts or ())
            whole = F.linear(x.to(dtype), s, None if bias is None else bias.to(dtype))
            return apply_activation(whole + F.linear(F.linear(x.to(dtype), a), b), activation)

        with torch.no_grad():
            return excess_over(y, product(x.dtype), product(torch.float64))

    @property
    def sparsity_step(self) -> int:
        """Which step of SPARSITY_STEP its sparsity falls into, from 0."""
        return int(self.sparsity / SPARSITY_STEP + 1e-9)


@dataclass
class Group:
    """Layers that share a measurement: equal shape, dtype, token counts and epilogue, similar sparsity.

    Args:
        layers: at least one.
        recipes: label of a form -> its layout and the parameters of that layout's `pack`.
        ms: token count -> label -> time [ms], of the forms that are as accurate as they must be.
        notes: what happened while it was measured, for the report.
    """

    layers: list[Layer]
    recipes: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)
    ms: dict[int, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> Layer:
        """The layer that is measured: the least sparse."""
        return min(self.layers, key=lambda layer: layer.sparsity)

    def speedup(self, choice: Mapping[int, str]) -> float:
        """Strongest dense over the choice, the smallest of all token counts."""
        return min(best_form(self.ms[t], dense=True)[1] / self.ms[t][label] for t, label in choice.items())


def find_layers(
    model: nn.Module, split: Split, device: Device, divided: Mapping[str, SpectralLinear] | None = None
) -> list[Layer]:
    """Every nn.Linear of a model, with the reason why it stays as it is, where its kind or its parameters say so.

    Args:
        model: with the nn.MultiheadAttentions of `split` taken apart.
        split: which these are, and why others were left whole.
        device: where the model lies.
        divided: the low-rank plus sparse linears for which plain ones stand in the model, by name.

    Raises:
        ValueError: a weight has NaN or Inf entries.
    """
    layers = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            layer = Layer(part(name, "in_proj"), in_projection(module), split.left[name])
        elif isinstance(module, nn.Linear):
            whole = split.left.get(name.rpartition(".")[0]) if name.endswith("out_proj") else None
            layer = Layer(name, module, whole or reason_to_leave(model, name, module, device.dtypes))
        else:
            continue
        layer.reason = layer.reason or device.reason
        weight = layer.module.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight has NaN or Inf entries; repair the checkpoint before packing")
        if divided and name in divided:
            one = divided[name]
            layer.parts = (one.factor_b.detach(), one.factor_a.detach(), one.weight.detach())
            weight = one.weight.detach()  # the zeros are those of the rest
        layer.sparsity = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
        layers.append(layer)
    return layers


def group_layers(layers: Sequence[Layer], layouts: Sequence[str], device: Device) -> list[Group]:
    """Groups of layers that share a measurement, with the recipes of what to time."""
    groups: dict[tuple[object, ...], Group] = {}
    for layer in layers:
        weight = layer.module.weight.detach()
        recipes = device.recipes(weight, layouts)
        if layer.parts is not None and SpectralWeight.layout in layouts and weight.dtype in SpectralWeight.dtypes:
            rank = layer.parts[1].shape[0]
            recipes[f"{SpectralWeight.layout} parts of rank {rank}"] = (SpectralWeight.layout, {"rank": rank})
        bias = layer.module.bias is not None
        epilogue = (bias, layer.seen.activation)
        key = (weight.shape, weight.dtype, *epilogue, layer.tokens, layer.sparsity_step, tuple(recipes))
        group = groups.setdefault(key, Group([], recipes))
        group.layers.append(layer)
        layer.group = group
    return list(groups.values())


def measure_group(group: Group, budget_ms: float, timer: Timer, log: DecisionLog) -> None:
    """Pack the group's first layer in every candidate form, check each against float64 and time it.

    Token counts whose times are known for every form that passes are checked but not timed.

    Args:
        group: gets its times and notes, and keeps the recipes that were timed.
        budget_ms: time spent on each token count [ms].
        timer: times the forms.
        log: knows the times of earlier calls and gets the new ones.
    """
    module, name = group.first.module, group.first.seen.activation
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    forms: dict[str, PackedWeight] = {}
    recipes = {}
    for layout, params in group.recipes.values():
        if layout == "dense":
            params = {**params, "tokens": int(median(group.first.tokens))}
        form = group.first.form(layout, params)
        if layout != "dense" and form.nbytes >= weight.nbytes:
            group.notes.append(f"{form.label} would be larger than the dense weight")
            continue
        forms[form.label] = form
        recipes[form.label] = (layout, params)
    key = log.key(
        weight,
        bias=bias is not None,
        activation=name,
        tokens=group.first.tokens,
        sparsity_step=group.first.sparsity_step,
        candidates=tuple(forms),
    )
    known, fresh = log.known.get(key, {}), False
    generator = torch.Generator().manual_seed(0)
    for tokens in group.first.tokens:
        x = torch.randn(tokens, module.in_features, generator=generator).to(weight)
        calls: dict[str, Callable[[], object]] = {}
        for label, form in forms.items():
            if label == PLAIN:
                calls[label] = lambda x=x: apply_activation(module(x), name)  # type: ignore[misc]
                continue
            try:
                y = linear(x[:32], form, bias, activation=name)
            except KernelUnavailable as error:
                group.notes.append(str(error))
                continue
            excess = 0.0 if label in LIBRARY else group.first.excess(form, y, x[:32])
            if excess > 1:
                group.notes.append(f"{label} misses the accuracy rule by a factor {excess:.2g}")
                continue
            calls[label] = partial(PackedLinear(form, bias, name), x)  # what will run, with what a module costs
        times = known.get(tokens, {})
        if calls.keys() <= times.keys():
            group.ms[tokens] = {label: times[label] for label in calls}
            continue
        fresh = True
        with torch.no_grad():
            group.ms[tokens] = dict(timer(calls, budget_ms))
        group.notes += [f"timed {way}"] if (way := how(timer)) else []
    log.add(key, group.ms, fresh=fresh)
    if not fresh:
        group.notes.append("times reused from saved decisions")
    first = next(iter(group.ms.values()))
    kept = [label for label in first if all(label in times for times in group.ms.values())]  # in order: ties too
    group.ms = {tokens: {label: times[label] for label in kept} for tokens, times in group.ms.items()}
    group.recipes = {label: recipe for label, recipe in recipes.items() if label in kept}


def best_form(ms: Mapping[str, float], *, dense: bool) -> tuple[str, float]:
    """The fastest dense (or sparse) form among label -> ms, and its time; "" and infinity if there is none."""
    found = {label: value for label, value in ms.items() if label.startswith("dense/") == dense}
    label = min(found, key=lambda name: found[name]) if found else ""
    return label, found.get(label, float("inf"))


def choose_forms(ms: Mapping[int, Mapping[str, float]], margin: float, *, dense_only: bool = False) -> dict[int, str]:
    """Token count -> label. Sparse needs the margin; one form for all counts if none of them loses more than it."""
    choice = {}
    for tokens, times in ms.items():
        (dense, dense_ms), (sparse, sparse_ms) = best_form(times, dense=True), best_form(times, dense=False)
        choice[tokens] = sparse if not dense_only and sparse_ms <= (1 - margin) * dense_ms else dense
    if len(set(choice.values())) == 1:
        return choice

    def regret(label: str) -> float:
        return max(ms[tokens][label] / ms[tokens][best] for tokens, best in choice.items())

    single = min(set(choice.values()), key=regret)
    return dict.fromkeys(choice, single) if regret(single) <= 1 + margin else choice


def pack_layer(layer: Layer, choice: Mapping[int, str]) -> PackedLinear | None:
    """The module for this choice; None if the nn.Linear stays. An inaccurate form gives way to the dense one."""
    labels = list(dict.fromkeys(choice.values()))
    if labels == [PLAIN] or layer.group is None:
        return None
    module = layer.module
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    forms = {}
    for label in labels:
        layout, params = layer.group.recipes[label]
        forms[label] = layer.form(layout, params)
        if label not in LIBRARY:
            x = torch.randn(32, module.in_features, generator=torch.Generator().manual_seed(1)).to(weight)
            y = linear(x, forms[label], bias, activation=layer.seen.activation)
            if (excess := layer.excess(forms[label], y, x)) > 1:
                layer.note = f"{label} misses the accuracy rule by a factor {excess:.2g}"
                if label in layer.dense.values():
                    layer.dense = dict.fromkeys(layer.tokens, PLAIN)
                layer.choice = dict(layer.dense)
                return pack_layer(layer, layer.choice)
    (tokens, first), *others = choice.items()
    requires_grad = (module.weight.requires_grad, module.bias is not None and module.bias.requires_grad)
    return (LendingLinear if layer.seen.lent else PackedLinear)(
        forms[first],
        bias,
        layer.seen.activation,
        tokens=tokens,
        others={t: forms[label] for t, label in others} if len(labels) > 1 else None,
        requires_grad=requires_grad,
    )
