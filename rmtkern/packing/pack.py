"""pack_: the verb, what it refuses, and the order of its steps. Each step is a file beside this one."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.errors import PackedModelError
from rmtkern.examples import Example, as_examples
from rmtkern.layouts import LAYOUTS
from rmtkern.packing.attention import AttentionForward, watch_attention
from rmtkern.packing.decisions import DecisionLog, Decisions
from rmtkern.packing.device import Device, device_of
from rmtkern.packing.dtype import DTYPES, cast_
from rmtkern.packing.gated import find_pairs, fuse
from rmtkern.packing.guard import guard
from rmtkern.packing.layers import Layer, choose_forms, find_layers, group_layers, measure_group, pack_layer
from rmtkern.packing.mlp import Chain, MlpForward, find_chains, mlp_calls
from rmtkern.packing.multihead import Split, find_multiheads, watch_calls
from rmtkern.packing.norm import NormCall, NormForward, watch_norms
from rmtkern.packing.normed import LeavingForward, find_normed, normed_calls
from rmtkern.packing.outputs import outputs_on, tolerance_of
from rmtkern.packing.pairs import measure_pairs
from rmtkern.packing.report import EndToEnd, GatedReport, PackReport, SiteReport
from rmtkern.packing.sites import disable, enable, measure_sites
from rmtkern.packing.summary import layer_reports, site_reports
from rmtkern.packing.swaps import Swaps, place_, verify
from rmtkern.packing.timing import Timer
from rmtkern.packing.trials import leave_lenders, leave_whole, split_multiheads
from rmtkern.packing.unpack import is_packed
from rmtkern.packing.watch import watch
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
            several devices or on "meta", NaN weights, or a damaged file.
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
    kernels = attention and device.kernels, norms and device.kernels, mlps and device.kernels
    try:
        return _pack(
            model, device, split, divided, examples, layouts, kernels, margin, budget_ms, time_calls, show_progress, log
        )
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


def _pack(
    model: nn.Module,
    device: Device,
    split: Split,
    divided: Mapping[str, SpectralLinear],
    examples: list[Example],
    layouts: Sequence[str],
    kernels: tuple[bool, bool, bool],
    margin: float,
    budget_ms: float,
    time_calls: Timer,
    show_progress: bool | None,
    log: DecisionLog,
) -> PackReport:
    """The steps in order: try what can move, choose per linear, site, pair and MLP, judge the whole, report.

    `kernels` says whether attention, LayerNorms and MLPs may use ours; `divided` has the parts of linears that stand
    merged in the model.
    """
    attention, norms, mlps = kernels
    whole_outputs, whole_calls = split_multiheads(model, split, examples)
    layers = find_layers(model, split, device, divided)
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
        outputs = outputs_on(model, examples, count_calls)
    for layer in movable:
        layer.seen = watched[layer.name]
        layer.reason = layer.seen.reason
    leave_whole(model, split, layers, unlike)
    outputs = leave_lenders(model, layers, examples, outputs)
    leave_whole(model, split, layers, {})
    expected = whole_outputs or outputs
    movable = [layer for layer in movable if layer.reason is None]

    by_name = {layer.name: layer for layer in movable}
    called = {layer.name: layer.module for layer in movable if not layer.seen.lent}
    pairs, chains = find_pairs(model, called), find_chains(model, called) if mlps else []
    normed = _find_normed(model, norm_calls, called, split, examples, outputs) if norms else {}
    chains = [chain for chain in chains if len({tuple(by_name[path].seen.tokens) for path in chain.paths}) == 1]
    pairs = [pair for pair in pairs if len({tuple(by_name[path].seen.tokens) for path in pair.paths}) == 1]
    groups = group_layers(movable, layouts, device)
    for group in progress(groups, "timing", show=show_progress):
        measure_group(group, budget_ms, time_calls, log)
        for layer in group.layers:
            layer.choice = choose_forms(group.ms, margin)
            layer.dense = choose_forms(group.ms, margin, dense_only=True)

    apart_calls = {name: calls[name] for name in split.apart if name in calls}
    calls = {**calls, **whole_calls}
    timing = (margin, budget_ms, time_calls, show_progress)
    sites = measure_sites("attention", calls, *timing) if attention else []
    apart_sites = measure_sites("attention", apart_calls, *timing) if attention else []
    norm_sites = measure_sites("layer_norm", norm_calls, *timing) if norms else []
    swaps = Swaps(model, movable, split)
    for kernel, kind, found in (("attention", AttentionForward, sites), ("LayerNorm", NormForward, norm_sites)):
        if any(site.used for site in found):
            modules = {**dict(model.named_modules()), **split.whole}
            swaps.sites[kernel] = [kind(modules[site.name]) for site in found if site.used]
    if used := [AttentionForward(split.apart[site.name]) for site in apart_sites if site.used]:
        swaps.sites["attention"] = [*swaps.sites.get("attention", []), *used]
    end_to_end: list[EndToEnd] = []
    notes: list[str] = []
    gated: list[GatedReport] = []
    fused: dict[str, list[SiteReport]] = {}
    try:
        for layer in progress(movable, "packing", show=show_progress):
            swaps.put(swaps.dense, layer, pack_layer(layer, layer.dense))
            if layer.choice == layer.dense:
                swaps.copy(swaps.packed, layer, swaps.dense)
            else:
                swaps.put(swaps.packed, layer, pack_layer(layer, layer.choice))
        if movable or swaps.sites:
            verify(swaps, examples, expected, swaps.dense)
            verify(swaps, examples, expected, swaps.packed)
            gated = measure_pairs(pairs, by_name, swaps, layouts, device, *timing)
            if swaps.pairs:
                try:
                    verify(swaps, examples, expected, swaps.packed)
                except PackedModelError as error:  # a forward that does not always compute what was tried
                    swaps.drop_pairs()
                    gated = [replace(pair, form=None, reason=str(error)) for pair in gated]
            fused["normed linear"] = _put_normed(normed, by_name, swaps, *timing)
            fused["MLP"] = _put_mlps(chains, by_name, swaps, *timing)
            if fused.keys() & swaps.sites.keys():
                try:
                    verify(swaps, examples, expected, swaps.packed)
                except PackedModelError as error:  # as above
                    for kernel, found in fused.items():
                        if kernel in swaps.sites:
                            swaps.drop_site(kernel)
                            fused[kernel] = [replace(site, used=False, reason=str(error)) for site in found]
            end_to_end, notes = guard(swaps, movable, examples, 5 * budget_ms, time_calls, show_progress)
            gated = [
                replace(pair, form=None, reason=f"{pair.reason}; put back: the model was slower end to end")
                if pair.form is not None and pair.name not in swaps.pairs
                else pair
                for pair in gated
            ]
        report = PackReport(
            layer_reports(layers, swaps, gated, margin),
            tuple(end_to_end),
            torch.get_num_threads(),
            (*([f"on {device.name}"] if device.name else []), *notes),
            site_reports(swaps.standing(sites, apart_sites), swaps, "attention"),
            log.new,
            log.measured,
            log.reused if log.given else None,
            tuple(gated),
            site_reports(norm_sites, swaps, "LayerNorm"),
            *(site_reports(fused.get(kernel, []), swaps, kernel) for kernel in ("MLP", "normed linear")),
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


def _put_mlps(
    chains: Sequence[Chain],
    layers: Mapping[str, Layer],
    swaps: Swaps,
    margin: float,
    budget_ms: float,
    timer: Timer,
    show_progress: bool | None,
) -> list[SiteReport]:
    """Time each chain of linears in one kernel against its linears, and let those that are faster use it."""
    calls = mlp_calls(chains, swaps.packed, *_of(layers))
    sites = measure_sites("mlp", calls, margin, budget_ms, timer, show_progress, rival="the two linears'")
    used = {site.name for site in sites if site.used}
    if used:
        modules = dict(swaps.model.named_modules())
        swaps.sites["MLP"] = [MlpForward(modules[chain.name], chain) for chain in chains if chain.name in used]
        swaps.now = None
    return sites


def _find_normed(
    model: nn.Module,
    calls: Mapping[str, Sequence[NormCall]],
    linears: Mapping[str, nn.Linear],
    split: Split,
    examples: Sequence[Example],
    outputs: Sequence[Sequence[Tensor]],
) -> dict[str, str]:
    """As find_normed, but for linears in nn.MultiheadAttentions, which are whole in some states of the model."""
    fixed = {name: linear for name, linear in linears.items() if name.rpartition(".")[0] not in split.apart}
    good = [name for name, found in calls.items() if all(call.reason is None for call in found)]
    norms = {name: norm for name in good if isinstance(norm := model.get_submodule(name), nn.LayerNorm)}
    return find_normed(model, norms, fixed, examples, outputs, tolerance_of(model))


def _put_normed(
    found: Mapping[str, str],
    layers: Mapping[str, Layer],
    swaps: Swaps,
    margin: float,
    budget_ms: float,
    timer: Timer,
    show_progress: bool | None,
) -> list[SiteReport]:
    """Time each LayerNorm and the linear after it in one kernel against both, and let those that are faster use it."""
    modules = dict(swaps.model.named_modules())
    ours = {
        name for name, module in modules.items() if any(f.module is module for f in swaps.sites.get("LayerNorm", []))
    }
    calls = normed_calls(found, modules, swaps.packed, *_of(layers), ours)
    rival = "LayerNorm and linear apart"
    sites = measure_sites("normed", calls, margin, budget_ms, timer, show_progress, rival=rival)
    used = [site.name for site in sites if site.used]
    if used:
        places = {name: found[name].rpartition(".") for name in used}
        swaps.sites["normed linear"] = [
            LeavingForward(modules[name], swaps.model.get_submodule(parent), child)
            for name, (parent, _, child) in places.items()
        ]
        swaps.now = None
    return sites


def _of(layers: Mapping[str, Layer]) -> tuple[dict[str, tuple[int, ...]], dict[str, Hashable]]:
    """Name of a linear -> its token counts, and -> what is equal where its time is."""
    tokens = {name: layer.tokens for name, layer in layers.items()}
    return tokens, {name: (id(layer.group), *layer.choice.items()) for name, layer in layers.items()}
