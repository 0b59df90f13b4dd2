"""pack_: the verb, what it refuses, and the order of its steps. Each step is a file beside this one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rmtkern.errors import PackedModelError
from rmtkern.examples import Example, as_examples
from rmtkern.layouts import LAYOUTS
from rmtkern.packing.attention import AttentionCall, AttentionForward, watch_attention
from rmtkern.packing.decisions import DecisionLog, Decisions
from rmtkern.packing.device import Device, device_of
from rmtkern.packing.dtype import DTYPES, cast_
from rmtkern.packing.fusing import find_fusible, put_fused
from rmtkern.packing.gated import GatedPair, find_pairs
from rmtkern.packing.guard import guard
from rmtkern.packing.layers import Layer, choose_forms, find_layers, group_layers, measure_group, pack_layer
from rmtkern.packing.multihead import Split, find_multiheads, watch_calls
from rmtkern.packing.norm import NormCall, NormForward, watch_norms
from rmtkern.packing.outputs import outputs_on
from rmtkern.packing.pairs import measure_pairs
from rmtkern.packing.report import EndToEnd, GatedReport, PackReport, SiteReport
from rmtkern.packing.sites import KernelForward, measure_sites
from rmtkern.packing.summary import layer_reports, site_reports
from rmtkern.packing.swaps import Swaps, verify
from rmtkern.packing.timing import Timer
from rmtkern.packing.trials import leave_lenders, leave_referenced, leave_whole, split_multiheads
from rmtkern.packing.unpack import is_packed
from rmtkern.packing.watch import watch
from rmtkern.places import place_
from rmtkern.progress import progress
from rmtkern.spectral_linear import SpectralLinear, spectral_linears

__all__ = ["pack_"]


def pack_(
    model: nn.Module,
    example: Any,
    *,
    dtype: torch.dtype | None = None,
    layouts: Sequence[str] | None = None,
    attention: bool = True,
    norms: bool = True,
    mlps: bool = True,
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
    of it, stays dense. A SpectralLinear (of `prune_(pattern="spectral")`) is tried in the layout "spectral" with its
    own parts, and else counts as a linear with the weight B A + S, which `unpack_` also makes of it.

    Each linear's candidates are its dense forms (nn.Linear, oneDNN, oneDNN with a reordered weight, our own) and the
    layouts that hold it in less memory. They are timed in interleaved rounds at the token counts that the examples
    give the layer, on `torch.get_num_threads()` threads; a sparse one must beat the strongest dense one by `margin`.
    Examples that disagree by more than the margin make the layer hold one form for each count (a call then takes the
    nearest), so that no measured shape is slower. A GELU, ReLU or SiLU module that provably sees nothing but a linear's
    output is absorbed into its kernel. Modules that compute act(gate(x)) * up(x) with two linears, or with one whose
    output they split, run both in one kernel where that is faster than the linears in their chosen forms, by `margin`
    at every token count. Modules that run one linear, its absorbed activation and another linear do so in one kernel,
    which keeps the hidden features in the cache, under the same condition. At the end the whole model is timed against
    the original and against every linear in its strongest dense form; choices that made it slower are put back. Until
    then each linear is held as it was, in its strongest dense form and in its chosen one: beside the model at most
    twice its dense weights, with one example (docs/benchmarks.md, Memory).

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
        norms: whether LayerNorm modules may use our kernel, or leave their rows to the packed linear that alone reads
            them, where it is measured faster by the margin.
        mlps: whether modules that run two linears one after the other may use one kernel for both, where it is measured
            faster by the margin.
        margin: by what fraction sparse must be faster than the strongest dense form, [0, 1).
        budget_ms: time spent on each distinct measurement [ms]; the whole model gets five times as much per example.
        timer: (name -> call, budget_ms) -> (name -> ms); default `interleaved_ms`, or `EventTimer` on a CUDA device.
        decisions: times of earlier calls (`PackReport.decisions`), used again for linears of equal shape, dtype, bias,
            activation, token counts, candidates and similar sparsity, if measured with this CPU, instruction set,
            thread count and versions (or this kind of GPU, compute capability and versions); or a JSON file of them,
            which is made or completed. Candidates are still checked for accuracy, and attention, gate-up pairs, MLPs
            and the whole model are still timed.
        show_progress: show a bar; default, only on a terminal.

    Returns:
        What was measured and chosen, and why.

    Raises:
        TypeError: `model`, `example` or `decisions` has the wrong type, or the output holds no tensor.
        ValueError: nothing to pack, a bad option, an example that the model cannot run or on another device, a model on
            several devices or on "meta", NaN weights or outputs, a call in autocast, or a damaged file.
        PackedModelError: train mode, packed already, or the output would change.
    """
    layouts = _check(model, layouts, margin, dtype)
    examples = as_examples(example)
    device = device_of(model, examples)
    time_calls = timer or device.timer
    log = DecisionLog(decisions, device.keys(time_calls))
    split = find_multiheads(model)
    divided = spectral_linears(model)
    place_(model, {name: module.merged() for name, module in divided.items()})
    restore = cast_(model, dtype) if dtype == torch.bfloat16 else None
    attention, norms, mlps = (wanted and device.kernels for wanted in (attention, norms, mlps))
    ask = _Ask(layouts, attention, norms, mlps, margin, budget_ms, time_calls, show_progress, log)
    try:
        return _pack(model, device, split, divided, examples, ask)
    except BaseException:
        place_(model, dict(split.whole))
        if restore is not None:
            restore()
        place_(model, dict(divided))
        raise


def _check(model: nn.Module, layouts: Sequence[str] | None, margin: float, dtype: torch.dtype | None) -> list[str]:
    """Refuse bad arguments; the sparse layouts to try."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(map(str, DTYPES))} or None, got {dtype!r}")
    if dtype == torch.float32 and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise ValueError("dtype: torch.float32 for a model with torch.bfloat16 weights; call model.float() first")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_lazy(module.weight):
            raise ValueError(f"model: {name or 'it'} has no weight before the model ran; run it once")
        if dtype is not None and isinstance(module, nn.Linear) and module.weight.dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype} for a model with {module.weight.dtype} weights; call model.float() first")
    if torch._C._is_any_autocast_enabled():
        raise ValueError(
            "autocast is on, and products of its dtype would be timed and compared; call pack_ outside of it, with"
            " dtype=torch.bfloat16 for a model that shall run in bfloat16"
        )
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


@dataclass(frozen=True)
class _Ask:
    """What pack_ was asked for; `attention`, `norms` and `mlps` also need kernels on the device."""

    layouts: Sequence[str]
    attention: bool
    norms: bool
    mlps: bool
    margin: float
    budget_ms: float
    timer: Timer
    show_progress: bool | None
    log: DecisionLog

    @property
    def timing(self) -> tuple[float, float, Timer, bool | None]:
        """As what measures takes it."""
        return self.margin, self.budget_ms, self.timer, self.show_progress


@dataclass(frozen=True)
class _Found:
    """What the forward passes on the examples showed.

    Args:
        layers: every linear, with the reason of those that stay.
        attention: module name -> its calls of attention; of an nn.MultiheadAttention, those of it whole.
        apart: the same of the nn.MultiheadAttentions that were taken apart, as they are then.
        norms: name of a LayerNorm -> its calls.
        outputs: of the model with these apart.
        expected: of the model as it came.
    """

    layers: Sequence[Layer]
    attention: Mapping[str, Sequence[AttentionCall]]
    apart: Mapping[str, Sequence[AttentionCall]]
    norms: Mapping[str, Sequence[NormCall]]
    outputs: Sequence[Sequence[Tensor]]
    expected: Sequence[Sequence[Tensor]]

    @property
    def movable(self) -> list[Layer]:
        """The layers that may be swapped."""
        return [layer for layer in self.layers if layer.reason is None]


@dataclass(frozen=True)
class _Sites:
    """The reports on attention, on that in nn.MultiheadAttentions taken apart, and on LayerNorm."""

    attention: list[SiteReport]
    apart: list[SiteReport]
    norms: list[SiteReport]


def _pack(
    model: nn.Module,
    device: Device,
    split: Split,
    divided: Mapping[str, SpectralLinear],
    examples: list[Example],
    ask: _Ask,
) -> PackReport:
    """The steps in order: try what can move, choose per linear, site, pair and MLP, judge the whole, report.

    `divided` has the parts of linears that stand merged in the model.
    """
    found = _find(model, device, split, divided, examples)
    movable = found.movable
    by_name = {layer.name: layer for layer in movable}
    called = {layer.name: layer for layer in movable if not layer.seen.lent}
    pairs = find_pairs(model, {name: layer.module for name, layer in called.items()})
    pairs = [pair for pair in pairs if len({tuple(by_name[path].seen.tokens) for path in pair.paths}) == 1]
    fusible = find_fusible(model, called, found.norms, split, examples, found.outputs, norms=ask.norms, mlps=ask.mlps)
    _measure_layers(movable, device, ask)
    swaps = Swaps(model, movable, split)
    sites = _measure_sites(found, swaps, ask)
    end_to_end: list[EndToEnd] = []
    notes: list[str] = []
    gated: list[GatedReport] = []
    fused: dict[str, list[SiteReport]] = {}
    try:
        _put_layers(movable, swaps, ask.show_progress)
        if movable or swaps.sites:
            verify(swaps, examples, found.expected, swaps.dense)
            verify(swaps, examples, found.expected, swaps.packed)
            gated = _put_pairs(pairs, by_name, swaps, device, examples, found.expected, ask)
            fused = put_fused(fusible, by_name, swaps, examples, found.expected, ask.timing)
            end_to_end, notes = guard(swaps, movable, examples, 5 * ask.budget_ms, ask.timer, ask.show_progress)
            gated = [
                replace(pair, form=None, reason=f"{pair.reason}; put back: the model was slower end to end")
                if pair.form is not None and pair.name not in swaps.pairs
                else pair
                for pair in gated
            ]
        report = PackReport(
            layer_reports(found.layers, swaps, gated, ask.margin),
            tuple(end_to_end),
            torch.get_num_threads(),
            (*([f"on {device.name}"] if device.name else []), *notes),
            site_reports(swaps.standing(sites.attention, sites.apart), swaps, "attention"),
            ask.log.new,
            ask.log.measured,
            ask.log.reused if ask.log.given else None,
            tuple(gated),
            site_reports(sites.norms, swaps, "LayerNorm"),
            *(site_reports(fused.get(kernel, []), swaps, kernel) for kernel in ("MLP", "normed linear")),
        )
        ask.log.save()
    except BaseException:
        swaps.leave_original()
        raise
    swaps.leave_packed()
    return report


def _find(
    model: nn.Module, device: Device, split: Split, divided: Mapping[str, SpectralLinear], examples: list[Example]
) -> _Found:
    """Run the model on the examples; what cannot be swapped gets its reason, and stays whole."""
    whole_outputs, whole_calls = split_multiheads(model, split, examples)
    layers = find_layers(model, split, device, divided)
    movable = [layer for layer in layers if layer.reason is None]

    def count_calls() -> None:
        for layer in movable:
            layer.calls.append(len(watched[layer.name].tokens))

    with (
        watch_calls(split.apart) as unlike,
        watch(model, {layer.name: layer.module for layer in movable}) as watched,
        watch_attention(model) as calls,
        watch_norms(model) as norm_calls,
    ):
        outputs = outputs_on(model, examples, count_calls)
    for layer in movable:
        layer.seen = watched[layer.name]
        layer.reason = layer.seen.reason
    leave_referenced(model, movable, examples)
    leave_whole(model, split, layers, unlike)
    outputs = leave_lenders(model, layers, examples, outputs)
    leave_whole(model, split, layers, {})
    apart_calls = {name: calls[name] for name in split.apart if name in calls}
    return _Found(layers, {**calls, **whole_calls}, apart_calls, norm_calls, outputs, whole_outputs or outputs)


def _measure_layers(layers: Sequence[Layer], device: Device, ask: _Ask) -> None:
    """Choose the forms of each layer, the strongest of all and the strongest dense ones."""
    for group in progress(group_layers(layers, ask.layouts, device), "timing", show=ask.show_progress):
        measure_group(group, ask.budget_ms, ask.timer, ask.log)
        for layer in group.layers:
            layer.choice = choose_forms(group.ms, ask.margin)
            layer.dense = choose_forms(group.ms, ask.margin, dense_only=True)


def _measure_sites(found: _Found, swaps: Swaps, ask: _Ask) -> _Sites:
    """Time attention and LayerNorm where they run, and put our kernels in where they are faster."""
    sites = _Sites(
        measure_sites("attention", found.attention, *ask.timing) if ask.attention else [],
        measure_sites("attention", found.apart, *ask.timing) if ask.attention else [],
        measure_sites("layer_norm", found.norms, *ask.timing) if ask.norms else [],
    )
    split = swaps.split
    modules = {**dict(swaps.model.named_modules()), **split.whole}
    forwards: dict[str, list[KernelForward]] = {
        "attention": [
            *(AttentionForward(modules[site.name]) for site in sites.attention if site.used),
            *(AttentionForward(split.apart[site.name]) for site in sites.apart if site.used),
        ],
        "LayerNorm": [NormForward(modules[site.name]) for site in sites.norms if site.used],
    }
    swaps.sites |= {kernel: standing for kernel, standing in forwards.items() if standing}
    return sites


def _put_layers(layers: Sequence[Layer], swaps: Swaps, show_progress: bool | None) -> None:
    """Pack each layer for the dense state and for the packed one."""
    for layer in progress(layers, "packing", show=show_progress):
        swaps.put(swaps.dense, layer, pack_layer(layer, layer.dense))
        if layer.choice == layer.dense:
            swaps.copy(swaps.packed, layer, swaps.dense)
        else:
            swaps.put(swaps.packed, layer, pack_layer(layer, layer.choice))


def _put_pairs(
    pairs: Sequence[GatedPair],
    layers: Mapping[str, Layer],
    swaps: Swaps,
    device: Device,
    examples: Sequence[Example],
    expected: Sequence[Sequence[Tensor]],
    ask: _Ask,
) -> list[GatedReport]:
    """Let the gate-up pairs that are faster so run in one kernel, unless the model then computes something else."""
    gated = measure_pairs(pairs, layers, swaps, ask.layouts, device, *ask.timing)
    if swaps.pairs:
        try:
            verify(swaps, examples, expected, swaps.packed)
        except PackedModelError as error:  # a forward that does not always compute what was tried
            swaps.drop_pairs()
            gated = [replace(pair, form=None, reason=str(error)) for pair in gated]
    return gated
