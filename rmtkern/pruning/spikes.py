"""What stands out of the noise becomes factors of its own, so that only the rest is pruned: pattern "spectral".

It divides weights and chooses nothing of what goes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.models import PrunableWeight
from rmtkern.places import place_
from rmtkern.pruning.held_out import model_outputs, relative_change
from rmtkern.pruning.permute import few
from rmtkern.ranks import Ranks
from rmtkern.spectral_linear import SpectralLinear
from rmtkern.spectrum.fit import fit_spectra, spike_vectors

__all__ = ["divide_spikes_"]


def divide_spikes_(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    share: float,
    images: Tensor | Iterable[Any],
    *,
    show_progress: bool | None = None,
) -> dict[str, nn.Module]:
    """Turn linears into SpectralLinears: factors B A of the spikes above the edge, and the rest S, W = B A + S.

    A weight without a spike stays a plain linear, and one that is divided already stays as it is. The model must
    compute the same on a few images, which code that reads `.weight` itself would not.

    Args:
        model: changed in place; the modules that were there are not.
        weights: of nn.Linears of the model, none tied.
        share: of the spikes, the largest first, (0, 1]; at least one where there is any.
        images: as calibrate.calibrate takes them.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Module name -> what stood there, to be put back if something later fails.

    Raises:
        ValueError: a weight of another kind of module, a tied one, or a model that then computes something else.
    """
    owners = {weight.name: weight.name.rpartition(".")[0] for weight in weights}
    for weight in weights:
        module = model.get_submodule(owners[weight.name])
        known = type(module) is nn.Linear or isinstance(module, SpectralLinear)
        if not known or weight.tied or not owners[weight.name]:
            more = f" and is {', '.join(weight.tied)} too" if weight.tied else ""
            raise ValueError(
                f"pattern 'spectral': {weight.name} belongs to a {type(module).__name__}{more}, and only the weight of "
                "an nn.Linear inside the model, and of no other, becomes factors and a rest; add it to ignore="
            )
    modules = {weight.name: model.get_submodule(owners[weight.name]) for weight in weights}
    linears = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    plain = {weight.name: weight.as_matrix() for weight in weights if weight.name in linears}
    fits = fit_spectra(plain, show_progress=show_progress)
    triples = spike_vectors({name: plain[name] for name in plain if fits[name].n_spikes}, fits)
    sample, ranks = few(images), Ranks.current()  # taken once: a loader may shuffle
    wanted = model_outputs(model, sample)
    before: dict[str, nn.Module] = {}
    try:
        for name, triple in triples.items():
            module, (u, values, vh) = linears[name], (torch.as_tensor(part).to(plain[name]) for part in triple)
            rank = max(1, round(share * len(values)))
            root = values[:rank].sqrt()
            before[owners[name]] = module
            divided = SpectralLinear.of(module, u[:, :rank] * root, root[:, None] * vh[:rank])
            for parameter in (divided.factor_a, divided.factor_b, divided.weight):
                ranks.share_(parameter)
            place_(model, {owners[name]: divided})
        change = relative_change(wanted, model_outputs(model, sample))
        exact = all(matrix.element_size() >= 4 for matrix in plain.values())
        if not change <= (1e-6 if exact else 1e-2):
            raise ValueError(
                f"pattern 'spectral': divided into factors and a rest, the model's outputs change by {change:.2g} of "
                "their squares; does other code read a .weight itself? Add that weight to ignore="
            )
    except BaseException:
        place_(model, before)
        raise
    return before
