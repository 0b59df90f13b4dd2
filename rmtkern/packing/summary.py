"""The rows of a PackReport from what was measured, with the reason for each choice in words."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rmtkern.nn import PackedGatedLinear, PackedLinear
from rmtkern.packing.layers import Layer, best_form
from rmtkern.packing.report import GatedReport, LayerReport, SiteReport
from rmtkern.packing.swaps import Swaps

__all__ = ["layer_reports", "site_reports"]


def layer_reports(
    layers: Sequence[Layer], swaps: Swaps, gated: Sequence[GatedReport], margin: float
) -> tuple[LayerReport, ...]:
    """What was measured and chosen of each layer, after the guard.

    Args:
        layers: every linear of the model, in its order.
        swaps: what stands in the packed state.
        gated: the reports on gate-up pairs; the linears of one that runs in one kernel report that.
        margin: by what fraction sparse had to be faster.
    """
    by_name = {layer.name: layer for layer in layers}
    reports = {layer.name: _layer_report(layer, swaps.packed.get(layer.name, layer.module), margin) for layer in layers}
    for pair in gated:
        module = swaps.packed.get(pair.linears[0])
        if pair.form is None or not isinstance(module, PackedGatedLinear):
            continue
        groups = [group for path in pair.linears if (group := by_name[path].group) is not None]
        speedup = min(
            sum(best_form(group.ms[tokens], dense=True)[1] for group in groups) / times[pair.form]
            for tokens, times in pair.ms.items()
        )
        for path in pair.linears:
            reports[path] = _paired_report(reports[path], pair, module, speedup)
    return tuple(reports[layer.name] for layer in layers)


def site_reports(sites: Sequence[SiteReport], swaps: Swaps, kernel: str) -> tuple[SiteReport, ...]:
    """What was measured of a kernel's sites, with what the guard left of them."""
    return tuple(replace(site, used=site.used and kernel in swaps.sites) for site in sites)


def _layer_report(layer: Layer, now: nn.Module, margin: float) -> LayerReport:
    """The report of a linear for which `now` stands, as if it were in no pair."""
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


def _why(layer: Layer, margin: float) -> str:
    """The reason for a layer's form, in words."""
    if layer.reason is not None:
        return layer.reason
    group = layer.group
    if group is None:
        return "not measured"
    parts = [] if layer.note is None else [layer.note]
    if not any(best_form(times, dense=False)[0] for times in group.ms.values()):
        parts.append(f"no sparse candidate at sparsity {layer.sparsity:.3f}")
        return "; ".join([*parts, *dict.fromkeys(group.notes)])
    for tokens, times in group.ms.items():
        (dense, dense_ms), (sparse, sparse_ms) = best_form(times, dense=True), best_form(times, dense=False)
        at = f" at T={tokens}" if len(group.ms) > 1 else ""
        parts.append(f"{sparse} is {dense_ms / sparse_ms:.2f}x {dense}{at}")
        if layer.choice[tokens] != sparse and sparse_ms > (1 - margin) * dense_ms:
            parts[-1] += f", short of the margin ({100 * margin:g} % less time)"
    return "; ".join([*parts, *dict.fromkeys(group.notes)])
