"""pack_ and unpack_: swap a model's linears for what is measured fastest, and back.

It decides by measuring and must not know why weights are zero. What it learnt is in report.py, how it watches
a forward pass in watch.py.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.activations import apply_activation
from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.examples import Example, as_example
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.pairs import interleave
from rmtkern.nn import AbsorbedActivation, PackedGatedLinear, PackedLinear, PackedModule
from rmtkern.ops import gated_linear, linear
from rmtkern.packing.attention import AttentionCall, AttentionForward, watch_attention
from rmtkern.packing.decisions import DecisionLog, Decisions
from rmtkern.packing.device import Device, device_of
from rmtkern.packing.dtype import DTYPES, cast_, is_cast, uncast_
from rmtkern.packing.events import how
from rmtkern.packing.gated import GatedPair, find_pairs, fuse, fused, part, unfuse
from rmtkern.packing.lent import LendingLinear
from rmtkern.packing.multihead import PackedMultihead, Split, find_multiheads, in_projection, linears_of, watch_calls
from rmtkern.packing.norm import NormForward, watch_norms
from rmtkern.packing.report import EndToEnd, GatedReport, LayerReport, PackReport, SiteReport
from rmtkern.packing.sites import KernelForward, disable, enable, measure_sites
from rmtkern.packing.timing import Timer
from rmtkern.packing.watch import Seen, reason_to_leave, watch
from rmtkern.progress import progress
from rmtkern.testing import accuracy_excess

__all__ = ["is_packed", "pack_", "place_", "unpack_"]

Slots = dict[str, nn.Module]  # module name -> what stands there

PLAIN = "dense/torch"  # the candidate that leaves the nn.Linear alone
LIBRARY = (PLAIN, "dense/onednn", "dense/onednn_prepacked")  # computed by PyTorch, which is the yardstick of accuracy
OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""Largest change of the model's output, relative to its largest magnitude. Two dense fp32 libraries differ by 1e-6 to
1e-5 after 12 blocks, two bf16 ones by 1e-2 (float16 rounds to an eighth of that); a wrong activation or a lost weight
shows at 1e-2 and above. Every layer in a form of ours is held to the accuracy rule by itself before, which is what
counts in bf16."""
GUARD_NOISE = 0.01
"""How much slower than the faster dense model the packed model may time before the guard calls it slower."""
SPARSITY_STEP = 0.05
"""Layers of one shape whose sparsities fall into one step share a measurement, taken on the least sparse of them."""


@dataclass
class _Layer:
    """One nn.Linear on its way through pack_."""

    name: str
    module: nn.Linear
    reason: str | None = None  # why it stays as it is
    sparsity: float = 0.0
    seen: Seen = field(default_factory=Seen)
    calls: list[int] = field(default_factory=list)  # how many there were after each example
    choice: dict[int, str] = field(default_factory=dict)  # token count -> label
    dense: dict[int, str] = field(default_factory=dict)  # the same, dense forms only
    group: "_Group | None" = None
    note: str | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.seen.tokens)))

    def tokens_of(self, examples: Iterable[int]) -> set[int]:
        """The token counts of some examples."""
        starts = [0, *self.calls]
        return {tokens for index in examples for tokens in self.seen.tokens[starts[index] : self.calls[index]]}

    @property
    def sparsity_step(self) -> int:
        return int(self.sparsity / SPARSITY_STEP + 1e-9)


@dataclass
class _Group:
    """Layers that share a measurement: equal shape, dtype, token counts and epilogue, similar sparsity."""

    layers: list[_Layer]
    recipes: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)  # label -> layout, params
    ms: dict[int, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> _Layer:
        return min(self.layers, key=lambda layer: layer.sparsity)

    def speedup(self, choice: Mapping[int, str]) -> float:
        """Strongest dense over the choice, the smallest of all token counts."""
        return min(_best(self.ms[t], dense=True)[1] / self.ms[t][label] for t, label in choice.items())


def _best(ms: Mapping[str, float], *, dense: bool) -> tuple[str, float]:
    found = {label: value for label, value in ms.items() if label.startswith("dense/") == dense}
    label = min(found, key=lambda name: found[name]) if found else ""
    return label, found.get(label, float("inf"))


def _choose(ms: Mapping[int, Mapping[str, float]], margin: float, *, dense_only: bool = False) -> dict[int, str]:
    """Token count -> label. Sparse needs the margin; one form for all counts if none of them loses more than it."""
    choice = {}
    for tokens, times in ms.items():
        (dense, dense_ms), (sparse, sparse_ms) = _best(times, dense=True), _best(times, dense=False)
        choice[tokens] = sparse if not dense_only and sparse_ms <= (1 - margin) * dense_ms else dense
    if len(set(choice.values())) == 1:
        return choice

    def regret(label: str) -> float:
        return max(ms[tokens][label] / ms[tokens][best] for tokens, best in choice.items())

    single = min(set(choice.values()), key=regret)
    return dict.fromkeys(choice, single) if regret(single) <= 1 + margin else choice


def _examples(example: Any) -> list[Example]:
    entries = list(example) if isinstance(example, list) else [example]
    if not entries:
        raise ValueError("example: expected at least one example input, got an empty list")
    found: list[Example] = []
    for entry in entries:
        call = as_example(entry)
        if call is None:
            raise TypeError(
                f"example: expected a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these for"
                f" several examples, got {type(entry).__name__}; pass what you would call the model with"
            )
        found.append(call)
    return found


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [found for item in output for found in _tensors(item)] if isinstance(output, list | tuple) else []


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = example
    with torch.no_grad():
        return _tensors(model(*args, **kwargs))


def _outputs(
    model: nn.Module, examples: Sequence[Example], after: Callable[[], None] = lambda: None
) -> list[list[Tensor]]:
    """The outputs on all examples; `after` is called after each."""
    found = []
    for index, example in enumerate(examples):
        try:
            output = _run(model, example)
        except Exception as error:
            raise ValueError(
                f"the model cannot run example {index}: {error}; pass what you would call the model with"
            ) from error
        if not output:
            raise TypeError(f"the model's output on example {index} holds no tensor, so it cannot be checked")
        found.append(output)
        after()
    return found


def is_packed(model: nn.Module) -> bool:
    """Whether `pack_` or `load` changed this model (or the one it is a copy of)."""
    kernels = bool(KernelForward.of(model))
    return is_cast(model) or kernels or any(isinstance(module, PackedModule) for module in model.modules())


def place_(model: nn.Module, slots: Slots) -> None:
    """Put modules where their names say.

    Args:
        model: changed in place.
        slots: module name -> what stands there from now on.
    """
    for name, module in slots.items():
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = module


def _check(model: nn.Module, layouts: Sequence[str] | None, margin: float, dtype: torch.dtype | None) -> list[str]:
    """Refuse bad arguments; the sparse layouts to try."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(map(str, DTYPES))} or None, got {dtype!r}")
    if dtype == torch.float32 and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise ValueError("dtype: torch.float32 for a model with torch.bfloat16 weights; call model.float() first")
    if not 0 <= margin < 1:
        raise ValueError(f"margin: expected 0 <= margin < 1, got {margin}")
    names = list(LAYOUTS) if layouts is None else list(layouts)
    for name in names:
        if name not in LAYOUTS:
            raise ValueError(f"unknown layout {name!r}; valid: {', '.join(LAYOUTS)}")
    if is_packed(model):
        raise PackedModelError("the model is packed already; call rmtkern.unpack_(model) first")
    if isinstance(model, nn.Linear):
        raise ValueError("model: a lone nn.Linear cannot be swapped in place; wrap it in nn.Sequential")
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear, so there is nothing to pack")
    if (training := [name or "the model" for name, m in model.named_modules() if m.training]) and training:
        raise PackedModelError(f"packing is for inference and {training[0]} is in train mode; call model.eval() first")
    return [name for name in names if name != "dense"]


def _find(model: nn.Module, split: Split, device: Device) -> list[_Layer]:
    layers = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            layer = _Layer(part(name, "in_proj"), in_projection(module), split.left[name])
        elif isinstance(module, nn.Linear):
            whole = split.left.get(name.rpartition(".")[0]) if name.endswith("out_proj") else None
            layer = _Layer(name, module, whole or reason_to_leave(model, name, module, device.dtypes))
        else:
            continue
        layer.reason = layer.reason or device.reason
        weight = layer.module.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight has NaN or Inf entries; repair the checkpoint before packing")
        layer.sparsity = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
        layers.append(layer)
    return layers


def _grouped(layers: Sequence[_Layer], layouts: Sequence[str], device: Device) -> list[_Group]:
    """Groups of layers that share a measurement, with the recipes of what to time."""
    groups: dict[tuple[object, ...], _Group] = {}
    for layer in layers:
        weight = layer.module.weight.detach()
        recipes = device.recipes(weight, layouts)
        bias = layer.module.bias is not None
        epilogue = (bias, layer.seen.activation)
        key = (weight.shape, weight.dtype, *epilogue, layer.tokens, layer.sparsity_step, tuple(recipes))
        group = groups.setdefault(key, _Group([], recipes))
        group.layers.append(layer)
        layer.group = group
    return list(groups.values())


def _measure(group: _Group, budget_ms: float, timer: Timer, log: DecisionLog) -> None:
    """Pack the group's first layer in every candidate form, check each against float64 and time it.

    Token counts whose times are known for every form that passes are checked but not timed.
    """
    module, name = group.first.module, group.first.seen.activation
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    forms: dict[str, PackedWeight] = {}
    recipes = {}
    for layout, params in group.recipes.values():
        if layout == "dense":
            params = {**params, "tokens": int(median(group.first.tokens))}
        form = LAYOUTS[layout].pack(weight, **params)
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
            excess = 0.0 if label in LIBRARY else accuracy_excess(y, x[:32], weight, bias, name)
            if excess > 1:
                group.notes.append(f"{label} misses the accuracy rule by a factor {excess:.2g}")
                continue
            calls[label] = lambda x=x, form=form: linear(x, form, bias, activation=name)  # type: ignore[misc]
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


def _pack_layer(layer: _Layer, choice: Mapping[int, str]) -> PackedLinear | None:
    """The module for this choice; None if the nn.Linear stays. An inaccurate form gives way to the dense one."""
    labels = list(dict.fromkeys(choice.values()))
    if labels == [PLAIN] or layer.group is None:
        return None
    module = layer.module
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    forms = {}
    for label in labels:
        layout, params = layer.group.recipes[label]
        forms[label] = LAYOUTS[layout].pack(weight, **params)
        if label not in LIBRARY:
            x = torch.randn(32, module.in_features, generator=torch.Generator().manual_seed(1)).to(weight)
            y = linear(x, forms[label], bias, activation=layer.seen.activation)
            if (excess := accuracy_excess(y, x, weight, bias, layer.seen.activation)) > 1:
                layer.note = f"{label} misses the accuracy rule by a factor {excess:.2g}"
                if label in layer.dense.values():
                    layer.dense = dict.fromkeys(layer.tokens, PLAIN)
                layer.choice = dict(layer.dense)
                return _pack_layer(layer, layer.choice)
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


class _Swaps:
    """The model in three states: as it came, strongest dense, and packed."""

    def __init__(self, model: nn.Module, layers: Sequence[_Layer], split: Split) -> None:
        self.model = model
        self.split = split
        self.original: Slots = {layer.name: layer.module for layer in layers}
        for layer in layers:
            if layer.seen.follower is not None:
                self.original[layer.seen.follower] = model.get_submodule(layer.seen.follower)
        self.dense: Slots = dict(self.original)
        self.packed: Slots = dict(self.original)
        self.sites: dict[str, list[KernelForward]] = {}  # kernel -> what stands in modules in the packed state
        self.pairs: dict[str, tuple[GatedPair, Slots]] = {}  # by module; what they replace in the packed state
        self.now: tuple[Slots, bool] | None = None  # what stands, and whether with the kernels of `sites`

    def put(self, slots: Slots, layer: _Layer, module: PackedLinear | None) -> None:
        """Set a layer, and the activation that it absorbs, in one of the states."""
        follower = layer.seen.follower
        slots[layer.name] = self.original[layer.name] if module is None else module
        if follower is not None:
            act = self.original[follower]
            slots[follower] = act if module is None else AbsorbedActivation(act).eval()

    def copy(self, slots: Slots, layer: _Layer, source: Slots) -> None:
        """Set a layer, and its activation, as in another state."""
        for name in (layer.name, layer.seen.follower):
            if name is not None:
                slots[name] = source[name]
        self.now = None  # the state that stands may be the one that changed

    def put_pair(self, pair: GatedPair, module: PackedGatedLinear) -> None:
        """Run a pair in one kernel in the packed state."""
        slots = pair.slots(module)
        self.pairs[pair.name] = (pair, {name: self.packed[name] for name in slots})
        self.packed |= slots
        self.now = None

    def drop_pairs(self) -> None:
        """Each linear of the pairs in the form that was chosen for it alone."""
        for _, replaced in self.pairs.values():
            self.packed |= replaced
        self.unfuse()
        self.pairs = {}
        self.now = None

    def unfuse(self) -> None:
        """Their own forward for all modules that run a pair."""
        for name in fused(self.model):
            del vars(self.model.get_submodule(name))["forward"]

    @property
    def paired(self) -> set[str]:
        """Names of the linears in pairs."""
        return {path for pair, _ in self.pairs.values() for path in pair.paths}

    @property
    def forwards(self) -> list[KernelForward]:
        """All that stand in modules in the packed state."""
        return [forward for forwards in self.sites.values() for forward in forwards]

    def standing(self, whole: Sequence[SiteReport], apart: Sequence[SiteReport]) -> list[SiteReport]:
        """Of the reports on nn.MultiheadAttentions whole and apart, those on what stands in the packed state."""
        found = {site.name: site for site in apart if self.split.stands_apart(site.name, self.packed)}
        return [found.get(site.name, site) for site in whole]

    def drop_site(self, kernel: str) -> None:
        """PyTorch's function instead of this kernel in every state."""
        disable(self.sites.pop(kernel))
        self.now = None

    def run(self, slots: Slots, example: Example, *, kernels: bool = False) -> list[Tensor]:
        """The model's output in one of the states; with the kernels of `sites` in the packed one, or where asked."""
        kernels = kernels or slots is self.packed
        if self.now is None or self.now[0] is not slots or self.now[1] != kernels:
            place_(self.model, self.split.arranged(slots))
            (enable if kernels else disable)(self.forwards)
            self.unfuse()
            if slots is self.packed:
                fuse(self.model, [pair for pair, _ in self.pairs.values()])
            self.now = slots, kernels
        return _run(self.model, example)


def _tolerance(*parts: nn.Module) -> float:
    held = {parameter.dtype for part in parts for parameter in part.parameters()}
    return max(
        (OUTPUT_TOLERANCE[dtype] for dtype in held & OUTPUT_TOLERANCE.keys()), default=OUTPUT_TOLERANCE[torch.float32]
    )


def _deviation(
    outputs: Iterable[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], tolerance: float
) -> str | None:
    """Where the outputs on the examples are not what is expected, in words; None if they are."""
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        for got, want in zip(output, wanted, strict=True):
            if not want.is_floating_point():
                continue
            scale = float(want.abs().max()) if want.numel() else 0.0
            error = float((got - want).abs().max()) if want.numel() else 0.0
            if not error <= tolerance * scale:
                return f"on example {index} differs by {error:.3g} where its scale is {scale:.3g}"
    return None


def _verify(swaps: _Swaps, examples: Sequence[Example], expected: Sequence[Sequence[Tensor]], slots: Slots) -> None:
    # the linears as they came, too: those that are swapped out hold none of the model's parameters
    tolerance = _tolerance(swaps.model, *swaps.original.values())
    outputs = (swaps.run(slots, example) for example in examples)
    if deviation := _deviation(outputs, expected, tolerance):
        raise PackedModelError(
            f"the packed model's output {deviation}; nothing was changed; is the model deterministic in eval mode?"
        )


def _guard(
    swaps: _Swaps,
    layers: Sequence[_Layer],
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
        if worst := _worst(swaps, layers, slow):
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


def _worst(swaps: _Swaps, layers: Sequence[_Layer], slow: Sequence[int]) -> tuple[list[_Layer], set[int]] | None:
    """The layers of the group that gains least from a form that is not dense on the slow examples, and where."""
    found: dict[int, tuple[list[_Layer], set[int]]] = {}
    for layer in layers:
        sparse = {t for t in layer.tokens_of(slow) if layer.choice[t] != layer.dense[t]}
        if layer.group is not None and sparse and layer.name not in swaps.paired:
            members, tokens = found.setdefault(id(layer.group), ([], set()))
            members.append(layer)
            tokens |= sparse

    def gain(one: tuple[list[_Layer], set[int]]) -> float:
        (first, *_), tokens = one
        return first.group.speedup({t: first.choice[t] for t in tokens}) if first.group is not None else 1.0

    return min(found.values(), key=gain, default=None)


def _put_back(swaps: _Swaps, layers: Sequence[_Layer], tokens: set[int]) -> str:
    """Run some layers of one group in their dense form at some token counts; a note for the report."""
    for layer in layers:
        layer.choice = {t: layer.dense[t] if t in tokens else label for t, label in layer.choice.items()}
        if layer.choice == layer.dense:
            swaps.copy(swaps.packed, layer, swaps.dense)
        else:
            swaps.put(swaps.packed, layer, _pack_layer(layer, layer.choice))
            swaps.now = None
    at = ", ".join(map(str, sorted(tokens)))
    if layers[0].group is not None:
        layers[0].group.notes.append(f"put back to dense: the packed model was slower end to end at T={at}")
    names = ", ".join(layer.name for layer in layers)
    return f"end to end the packed model was slower than dense: {names} went back to the dense form at T={at}"


@dataclass
class _PairGroup:
    """Pairs that share a measurement: what _Group says of layers, and equal forms of the separate linears."""

    pairs: list[GatedPair]
    linears: list[list[_Layer]]  # of each pair
    ms: dict[int, dict[str, float]] = field(default_factory=dict)
    recipes: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def best(self) -> tuple[str, float]:
        """The form of the pair whose worst token count is best, and its time there over the separate linears'."""
        worst = {label: max(ms[label] / ms["separate"] for ms in self.ms.values()) for label in self.recipes}
        label = min(worst, key=lambda name: worst[name]) if worst else ""
        return label, worst.get(label, float("inf"))


def _pair_excess(pair: GatedPair, form: PackedWeight, layers: Sequence[_Layer]) -> float:
    """By what factor a form of the pair misses the accuracy rule."""
    gate, up, bg, bu = pair.weight([layer.module for layer in layers])
    x = torch.randn(32, gate.shape[1], generator=torch.Generator().manual_seed(1)).to(gate)
    y = pair.module(form, [layer.module for layer in layers])(x).detach()
    return accuracy_excess(y, x, gate, bg, pair.activation, up=(up, bu))


def _measure_pairs(
    pairs: Sequence[GatedPair],
    layers: Mapping[str, _Layer],
    swaps: _Swaps,
    layouts: Sequence[str],
    device: Device,
    margin: float,
    budget_ms: float,
    timer: Timer,
    show_progress: bool | None,
) -> list[GatedReport]:
    """Time each pair in one kernel against its linears in the forms chosen for them, and swap it where it is faster."""
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
    group: _PairGroup, swaps: _Swaps, layouts: Sequence[str], device: Device, budget_ms: float, timer: Timer
) -> None:
    """Fill a group's times from its first pair."""
    pair, layers = group.pairs[0], group.linears[0]
    gate, up, bg, bu = pair.weight([layer.module for layer in layers])
    both, bias = interleave(gate, up), None if bg is None or bu is None else interleave(bg, bu)
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
            calls[label] = lambda x=x, form=form: gated_linear(  # type: ignore[misc]
                x, form, bias, activation=pair.activation, features=gate.shape[0]
            )
        with torch.no_grad():
            group.ms[tokens] = dict(timer(calls, budget_ms))
        group.notes += [f"timed {way}"] if (way := how(timer)) else []


def _why(layer: _Layer, margin: float) -> str:
    """The reason for a layer's form, in words."""
    if layer.reason is not None:
        return layer.reason
    group = layer.group
    if group is None:
        return "not measured"
    parts = [] if layer.note is None else [layer.note]
    if not any(_best(times, dense=False)[0] for times in group.ms.values()):
        parts.append(f"no sparse candidate at sparsity {layer.sparsity:.3f}")
        return "; ".join([*parts, *dict.fromkeys(group.notes)])
    for tokens, times in group.ms.items():
        (dense, dense_ms), (sparse, sparse_ms) = _best(times, dense=True), _best(times, dense=False)
        at = f" at T={tokens}" if len(group.ms) > 1 else ""
        parts.append(f"{sparse} is {dense_ms / sparse_ms:.2f}x {dense}{at}")
        if layer.choice[tokens] != sparse and sparse_ms > (1 - margin) * dense_ms:
            parts[-1] += f", short of the margin ({100 * margin:g} % less time)"
    return "; ".join([*parts, *dict.fromkeys(group.notes)])


def _paired_report(report: LayerReport, pair: GatedReport, module: PackedGatedLinear, dense_ms: float) -> LayerReport:
    """The report of a linear that runs in a pair's kernel."""
    return replace(
        report,
        form=f"gated: {pair.form}",
        packed=not str(pair.form).startswith("dense/"),
        activation=pair.activation,
        speedup=dense_ms,
        nbytes_after=module.weight.nbytes // len(pair.linears),
        reason=f"gate-up pair {pair.name}: {pair.reason}; alone: {report.reason}",
    )


def _reports(
    layers: Sequence[_Layer], swaps: _Swaps, gated: Sequence[GatedReport], margin: float
) -> tuple[LayerReport, ...]:
    by_name = {layer.name: layer for layer in layers}
    reports = {layer.name: _layer_report(layer, swaps.packed.get(layer.name, layer.module), margin) for layer in layers}
    for pair in gated:
        module = swaps.packed.get(pair.linears[0])
        if pair.form is None or not isinstance(module, PackedGatedLinear):
            continue
        groups = [group for path in pair.linears if (group := by_name[path].group) is not None]
        speedup = min(
            sum(_best(group.ms[tokens], dense=True)[1] for group in groups) / times[pair.form]
            for tokens, times in pair.ms.items()
        )
        for path in pair.linears:
            reports[path] = _paired_report(reports[path], pair, module, speedup)
    return tuple(reports[layer.name] for layer in layers)


def _site_reports(sites: Sequence[SiteReport], swaps: _Swaps, kernel: str) -> tuple[SiteReport, ...]:
    """What was measured of a kernel's sites, with what the guard left of them."""
    return tuple(replace(site, used=site.used and kernel in swaps.sites) for site in sites)


def _layer_report(layer: _Layer, now: nn.Module, margin: float) -> LayerReport:
    weight, group = layer.module.weight, layer.group
    forms = list(dict.fromkeys(layer.choice.values()))
    held = weight.nbytes
    if isinstance(now, PackedLinear):
        held = sum(form.nbytes for form in now.forms)
    speedup = None if group is None else group.speedup(layer.choice)
    return LayerReport(
        name=layer.name,
        shape=(weight.shape[0], weight.shape[1]),
        tokens=layer.tokens,
        sparsity=layer.sparsity,
        form="nn.Linear" if not isinstance(now, PackedLinear) else " | ".join(forms),
        packed=any(not label.startswith("dense/") for label in forms),
        activation=now.activation if isinstance(now, PackedLinear) else None,
        ms={} if group is None else group.ms,
        speedup=speedup,
        measured_on=None if group is None else group.first.name,
        nbytes_before=weight.nbytes,
        nbytes_after=held,
        reason=_why(layer, margin),
    )


def pack_(
    model: nn.Module,
    example: Any,
    *,
    dtype: torch.dtype | None = None,
    layouts: Sequence[str] | None = None,
    attention: bool = True,
    norms: bool = True,
    margin: float = 0.03,
    budget_ms: float = 600.0,
    timer: Timer | None = None,
    decisions: Decisions | str | os.PathLike[str] | None = None,
    show_progress: bool | None = None,
) -> PackReport:
    """Swap every nn.Linear for the form that is measured fastest here, for inference.

    The two projections of an nn.MultiheadAttention count as linears, "<name>.in_proj" and "<name>.out_proj", where it
    is called for self-attention, masked or not. Where code gives the weight of a linear to F.linear, as attention with
    biases of its own does, the kernel runs there, with the bias of the call; code may also ask for the weight's shape,
    dtype and device, as nn.TransformerEncoderLayer does. A linear whose weight is used in another way, such as a part
    of it, stays dense.

    Each linear's candidates are its dense forms (nn.Linear, oneDNN, oneDNN with a reordered weight, our own) and the
    layouts that hold it in less memory. They are timed in interleaved rounds at the token counts that the examples
    give the layer, on `torch.get_num_threads()` threads; a sparse one must beat the strongest dense one by `margin`.
    Examples that disagree by more than the margin make the layer hold one form for each count (a call then takes the
    nearest), so that no measured shape is slower. A GELU, ReLU or SiLU module that provably sees nothing but a linear's
    output is absorbed into its kernel. Modules that compute act(gate(x)) * up(x) with two linears, or with one whose
    output they split, run both in one kernel where that is faster than the linears in their chosen forms, by `margin`
    at every token count. At the end the whole model is timed against the original and against every
    linear in its strongest dense form; choices that made it slower are put back.

    On a CUDA device the dense forms are nn.Linear (cuBLAS) and our own, and layers without a kernel there stay as they
    are with the reason; attention and LayerNorm stay PyTorch's. Times are the device's. What is bound by launches, as
    one or a few images are, is timed under CUDA graphs where it can be captured, and the report says so: then run the
    model under them too, or pass `timer=EventTimer(CudaClock(device), graphs=False)` (of packing.events), whose times
    hold for a model that is launched kernel by kernel.

    Args:
        model: in eval mode, with float32 or bfloat16 linears (on a CUDA device float16 too), all on one device; changed
            in place, but not at all on failure.
        example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments; a list
            of these gives several examples, such as several batch sizes.
        dtype: torch.bfloat16 turns the whole float32 model into bfloat16 (its linears sum in float32) behind its own
            interface: floating inputs are cast on the way in, outputs come back as float32. It is then compared with
            the dense model in bfloat16. Default: as the model is.
        layouts: names in LAYOUTS that may be chosen; default, all. Dense forms are always tried.
        attention: whether modules that call PyTorch's scaled_dot_product_attention may use our kernel, where it is
            measured faster by the margin.
        norms: whether LayerNorm modules may use our kernel, where it is measured faster by the margin.
        margin: by what fraction sparse must be faster than the strongest dense form, [0, 1).
        budget_ms: time spent on each distinct measurement [ms]; the whole model gets five times as much per example.
        timer: (name -> call, budget_ms) -> (name -> ms); default `interleaved_ms`, or `EventTimer` on a CUDA device.
        decisions: times of earlier calls (`PackReport.decisions`), used again for linears of equal shape, dtype, bias,
            activation, token counts, candidates and similar sparsity, if measured with this CPU, instruction set,
            thread count and versions (or this kind of GPU, compute capability and versions); or a JSON file of them,
            which is made or completed. Candidates are still checked for accuracy, and attention, gate-up pairs and the
            whole model are still timed.
        show_progress: show a bar; default, only on a terminal.

    Returns:
        What was measured and chosen, and why.

    Raises:
        TypeError: `model`, `example` or `decisions` has the wrong type, or the output holds no tensor.
        ValueError: nothing to pack, a bad option, an example that the model cannot run or on another device, a model on
            several devices or on "meta", NaN weights, or a damaged file.
        PackedModelError: train mode, packed already, or the output would change.
    """
    layouts = _check(model, layouts, margin, dtype)
    examples = _examples(example)
    device = device_of(model, examples)
    time_calls = timer or device.timer
    log = DecisionLog(decisions, device.keys(time_calls))
    split = find_multiheads(model)
    restore = cast_(model, dtype) if dtype == torch.bfloat16 else None
    attention, norms = attention and device.kernels, norms and device.kernels
    try:
        return _pack(
            model, device, split, examples, layouts, attention, norms, margin, budget_ms, time_calls, show_progress, log
        )
    except BaseException:
        place_(model, dict(split.whole))
        if restore is not None:
            restore()
        raise


def _split(
    model: nn.Module, split: Split, examples: Sequence[Example]
) -> tuple[list[list[Tensor]], dict[str, list[AttentionCall]]]:
    """Take the nn.MultiheadAttentions apart, if that changes no output; the outputs and their calls before."""
    if not split.apart:
        return [], {}
    with watch_attention(model) as calls:
        expected = _outputs(model, examples)
    calls = {name: found for name, found in calls.items() if name in split.whole}
    place_(model, dict(split.apart))
    try:
        same = _deviation(_outputs(model, examples), expected, _tolerance(model)) is None
    except (ValueError, TypeError):
        same = False
    if not same:
        reason = "the model needs nn.MultiheadAttention itself: with the linears apart it fails or differs"
        for name in tuple(split.apart):
            place_(model, split.leave(name, reason))
    return expected, calls


def _lend(
    model: nn.Module, layers: Sequence[_Layer], examples: Sequence[Example], expected: list[list[Tensor]]
) -> list[list[Tensor]]:
    """Leave the linears that lend their weights as they are, if what stands for these changes the model's outputs.

    Returns:
        What the unchanged model computes; `expected` if no linear lends its weight.
    """
    lending = {layer.name: layer for layer in layers if layer.seen.lent and layer.reason is None}
    if not lending:
        return expected
    expected = _outputs(model, examples)  # while it was watched, the weights were of a subclass of Tensor
    trial: Slots = {
        name: LendingLinear(
            LAYOUTS["dense"].pack(layer.module.weight.detach()),
            None if layer.module.bias is None else layer.module.bias.detach(),
        )
        for name, layer in lending.items()
    }
    tolerance = _tolerance(model, *(layer.module for layer in lending.values()))

    def fit(names: Iterable[str]) -> bool:
        place_(model, {name: trial[name] for name in names})
        try:
            return _deviation(_outputs(model, examples), expected, tolerance) is None
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


def _leave_whole(model: nn.Module, split: Split, layers: Sequence[_Layer], unlike: Mapping[str, str]) -> None:
    """Put nn.MultiheadAttentions back whole of which not both linears can be packed."""
    by_name = {layer.name: layer for layer in layers}
    for name in tuple(split.apart):
        mine = [by_name[child] for child in linears_of(name)]
        reason = unlike.get(name) or next((layer.reason for layer in mine if layer.reason is not None), None)
        if reason is not None:
            for layer in mine:
                layer.reason = reason
            place_(model, split.leave(name, reason))


def _pack(
    model: nn.Module,
    device: Device,
    split: Split,
    examples: list[Example],
    layouts: Sequence[str],
    attention: bool,
    norms: bool,
    margin: float,
    budget_ms: float,
    time_calls: Timer,
    show_progress: bool | None,
    log: DecisionLog,
) -> PackReport:
    whole_outputs, whole_calls = _split(model, split, examples)
    layers = _find(model, split, device)
    movable = [layer for layer in layers if layer.reason is None]
    linears = {layer.name: layer.module for layer in movable}

    def count_calls() -> None:
        for layer in movable:
            layer.calls.append(len(watched[layer.name].tokens))

    with (
        watch_calls(split.apart) as unlike,
        watch(model, linears) as watched,
        watch_attention(model) as calls,
        watch_norms(model) as norm_calls,
    ):
        outputs = _outputs(model, examples, count_calls)
    for layer in movable:
        layer.seen = watched[layer.name]
        layer.reason = layer.seen.reason
    _leave_whole(model, split, layers, unlike)
    outputs = _lend(model, layers, examples, outputs)
    _leave_whole(model, split, layers, {})
    expected = whole_outputs or outputs
    movable = [layer for layer in movable if layer.reason is None]

    by_name = {layer.name: layer for layer in movable}
    pairs = find_pairs(model, {layer.name: layer.module for layer in movable if not layer.seen.lent})
    pairs = [pair for pair in pairs if len({tuple(by_name[path].seen.tokens) for path in pair.paths}) == 1]
    groups = _grouped(movable, layouts, device)
    for group in progress(groups, "timing", show=show_progress):
        _measure(group, budget_ms, time_calls, log)
        for layer in group.layers:
            layer.choice = _choose(group.ms, margin)
            layer.dense = _choose(group.ms, margin, dense_only=True)

    apart_calls = {name: calls[name] for name in split.apart if name in calls}
    calls = {**calls, **whole_calls}
    timing = (margin, budget_ms, time_calls, show_progress)
    sites = measure_sites("attention", calls, *timing) if attention else []
    apart_sites = measure_sites("attention", apart_calls, *timing) if attention else []
    norm_sites = measure_sites("layer_norm", norm_calls, *timing) if norms else []
    swaps = _Swaps(model, movable, split)
    for kernel, kind, found in (("attention", AttentionForward, sites), ("LayerNorm", NormForward, norm_sites)):
        if any(site.used for site in found):
            modules = {**dict(model.named_modules()), **split.whole}
            swaps.sites[kernel] = [kind(modules[site.name]) for site in found if site.used]
    if used := [AttentionForward(split.apart[site.name]) for site in apart_sites if site.used]:
        swaps.sites["attention"] = [*swaps.sites.get("attention", []), *used]
    end_to_end: list[EndToEnd] = []
    notes: list[str] = []
    gated: list[GatedReport] = []
    try:
        for layer in progress(movable, "packing", show=show_progress):
            swaps.put(swaps.dense, layer, _pack_layer(layer, layer.dense))
            if layer.choice == layer.dense:
                swaps.copy(swaps.packed, layer, swaps.dense)
            else:
                swaps.put(swaps.packed, layer, _pack_layer(layer, layer.choice))
        if movable or swaps.sites:
            _verify(swaps, examples, expected, swaps.dense)
            _verify(swaps, examples, expected, swaps.packed)
            gated = _measure_pairs(pairs, by_name, swaps, layouts, device, *timing)
            if swaps.pairs:
                try:
                    _verify(swaps, examples, expected, swaps.packed)
                except PackedModelError as error:  # a forward that does not always compute what was tried
                    swaps.drop_pairs()
                    gated = [replace(pair, form=None, reason=str(error)) for pair in gated]
            end_to_end, notes = _guard(swaps, movable, examples, 5 * budget_ms, time_calls, show_progress)
            gated = [
                replace(pair, form=None, reason=f"{pair.reason}; put back: the model was slower end to end")
                if pair.form is not None and pair.name not in swaps.pairs
                else pair
                for pair in gated
            ]
        report = PackReport(
            _reports(layers, swaps, gated, margin),
            tuple(end_to_end),
            torch.get_num_threads(),
            (*([f"on {device.name}"] if device.name else []), *notes),
            _site_reports(swaps.standing(sites, apart_sites), swaps, "attention"),
            log.new,
            log.measured,
            log.reused if log.given else None,
            tuple(gated),
            _site_reports(norm_sites, swaps, "LayerNorm"),
        )
        log.save()
    except BaseException:
        place_(model, split.arranged(swaps.original))
        disable(swaps.forwards)
        swaps.unfuse()
        raise
    place_(model, split.arranged(swaps.packed))
    disable(swaps.forwards)
    standing = set(model.modules())
    enable(forward for forward in swaps.forwards if forward.module in standing)
    fuse(model, [pair for pair, _ in swaps.pairs.values()])
    return report


def unpack_(model: nn.Module) -> int:
    """Turn every PackedLinear, and every packed gate-up pair, back into plain nn.Linears.

    Absorbed activations, nn.MultiheadAttention, PyTorch's attention and LayerNorm, and a dtype that pack_ changed come
    back too.

    Args:
        model: a model that pack_ changed, or a copy of one; changed in place.

    Returns:
        How many layers were unpacked; 0 if none was packed. Weights are bit-exact at the packed dtype (-0.0 becomes
        0.0) and require grad as before; a model that was packed with `dtype` is float32 again, with the precision that
        `dtype` left.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` itself is a packed module; call its `unpack()`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, PackedModule):
        raise ValueError(
            f"model: a lone {type(model).__name__} cannot be swapped in place; use linear = packed.unpack()"
        )
    slots: Slots = unfuse(model)
    count = len(slots)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            slots[name] = module.unpack()
            count += 1
        elif isinstance(module, AbsorbedActivation):
            slots[name] = module.original.train(module.training)
    place_(model, slots)
    place_(
        model, {name: module.whole() for name, module in model.named_modules() if isinstance(module, PackedMultihead)}
    )
    disable(KernelForward.of(model))
    uncast_(model)
    return count
