"""Linears that run in one kernel with what is next to them: a LayerNorm before, or another linear after.

normed.py and mlp.py find them and say what to run; this times that in the forms chosen for the linears, and puts it in.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from rmtkern.errors import PackedModelError
from rmtkern.examples import Example
from rmtkern.packing.layers import Layer
from rmtkern.packing.mlp import Chain, MlpForward, find_chains, mlp_calls
from rmtkern.packing.multihead import Split
from rmtkern.packing.norm import NormCall
from rmtkern.packing.normed import LeavingForward, find_normed, normed_calls
from rmtkern.packing.outputs import tolerance_of
from rmtkern.packing.report import SiteReport
from rmtkern.packing.sites import measure_sites
from rmtkern.packing.swaps import Swaps, verify
from rmtkern.packing.timing import Timer

__all__ = ["Fusible", "find_fusible", "put_fused"]

Timing = tuple[float, float, Timer, bool | None]
"""(margin, budget_ms, timer, show_progress), as `measure_sites` takes them."""


@dataclass(frozen=True)
class Fusible:
    """What may run in one kernel.

    Args:
        normed: name of a LayerNorm -> of the linear that alone reads it.
        chains: modules that run two linears one after the other, on the same token counts.
    """

    normed: Mapping[str, str]
    chains: Sequence[Chain]


def find_fusible(
    model: nn.Module,
    layers: Mapping[str, Layer],
    norm_calls: Mapping[str, Sequence[NormCall]],
    split: Split,
    examples: Sequence[Example],
    outputs: Sequence[Sequence[Tensor]],
    *,
    norms: bool,
    mlps: bool,
) -> Fusible:
    """Find them in a model as it came.

    Args:
        model: with the nn.MultiheadAttentions of `split` taken apart; their linears, whole in some states of the
            model, take no rows of a LayerNorm.
        layers: name -> linear that may be swapped and that nothing else reads.
        norm_calls: name of a LayerNorm -> its calls.
        split: which modules are apart.
        examples: what to call the model with.
        outputs: what it computes on them.
        norms: whether LayerNorms are wanted.
        mlps: whether chains of linears are.
    """
    linears = {name: layer.module for name, layer in layers.items()}
    normed: dict[str, str] = {}
    if norms:
        fixed = {name: linear for name, linear in linears.items() if name.rpartition(".")[0] not in split.apart}
        good = [name for name, found in norm_calls.items() if all(call.reason is None for call in found)]
        ours = {name: norm for name in good if isinstance(norm := model.get_submodule(name), nn.LayerNorm)}
        normed = find_normed(model, ours, fixed, examples, outputs, tolerance_of(model))
    chains = find_chains(model, linears) if mlps else []
    return Fusible(
        normed, [chain for chain in chains if len({tuple(layers[path].seen.tokens) for path in chain.paths}) == 1]
    )


def put_fused(
    fusible: Fusible,
    layers: Mapping[str, Layer],
    swaps: Swaps,
    examples: Sequence[Example],
    expected: Sequence[Sequence[Tensor]],
    timing: Timing,
) -> dict[str, list[SiteReport]]:
    """Time each against its parts one after the other, and let those that are faster run in one kernel.

    Args:
        fusible: as `find_fusible` gives them.
        layers: name -> the layers, with their choices.
        swaps: its packed state changes.
        examples: what to call the model with.
        expected: what it computes on them; where one kernel changes that, none of them stays.
        timing: what decides.

    Returns:
        "normed linear" and "MLP", as in `swaps.sites` -> one report for each LayerNorm and each chain.
    """
    found = {
        "normed linear": _put_normed(fusible.normed, layers, swaps, timing),
        "MLP": _put_mlps(fusible.chains, layers, swaps, timing),
    }
    if found.keys() & swaps.sites.keys():
        try:
            verify(swaps, examples, expected, swaps.packed)
        except PackedModelError as error:  # a forward that does not always compute what was tried
            for kernel in found.keys() & swaps.sites.keys():
                swaps.drop_site(kernel)
                found[kernel] = [replace(site, used=False, reason=str(error)) for site in found[kernel]]
    return found


def _put_normed(
    found: Mapping[str, str], layers: Mapping[str, Layer], swaps: Swaps, timing: Timing
) -> list[SiteReport]:
    """Time each LayerNorm and the linear after it in one kernel against both, and let those that are faster use it."""
    modules = dict(swaps.model.named_modules())
    ours = {
        name for name, module in modules.items() if any(f.module is module for f in swaps.sites.get("LayerNorm", []))
    }
    calls = normed_calls(found, modules, swaps.packed, *_of(layers), ours)
    sites = measure_sites("normed", calls, *timing, rival="LayerNorm and linear apart")
    used = [site.name for site in sites if site.used]
    if used:
        places = {name: found[name].rpartition(".") for name in used}
        swaps.sites["normed linear"] = [
            LeavingForward(modules[name], swaps.model.get_submodule(parent), child)
            for name, (parent, _, child) in places.items()
        ]
        swaps.now = None
    return sites


def _put_mlps(chains: Sequence[Chain], layers: Mapping[str, Layer], swaps: Swaps, timing: Timing) -> list[SiteReport]:
    """Time each chain of linears in one kernel against its linears, and let those that are faster use it."""
    calls = mlp_calls(chains, swaps.packed, *_of(layers))
    sites = measure_sites("mlp", calls, *timing, rival="the two linears'")
    used = {site.name for site in sites if site.used}
    if used:
        modules = dict(swaps.model.named_modules())
        swaps.sites["MLP"] = [MlpForward(modules[chain.name], chain) for chain in chains if chain.name in used]
        swaps.now = None
    return sites


def _of(layers: Mapping[str, Layer]) -> tuple[dict[str, tuple[int, ...]], dict[str, Hashable]]:
    """Name of a linear -> its token counts, and -> what is equal where its time is."""
    tokens = {name: layer.tokens for name, layer in layers.items()}
    return tokens, {name: (id(layer.group), *layer.choice.items()) for name, layer in layers.items()}
