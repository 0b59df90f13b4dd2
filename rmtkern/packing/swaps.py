"""Swaps: the model as it came, with every linear in its strongest dense form, and packed; one of them stands.

What is put in here decides nothing and times nothing.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from rmtkern.errors import PackedModelError
from rmtkern.examples import Example
from rmtkern.nn import AbsorbedActivation, PackedGatedLinear, PackedLinear
from rmtkern.packing.gated import GatedPair, fuse, fused
from rmtkern.packing.layers import Layer
from rmtkern.packing.multihead import Split
from rmtkern.packing.outputs import deviation_of, run_model, tolerance_of
from rmtkern.packing.report import SiteReport
from rmtkern.packing.sites import KernelForward, disable, enable
from rmtkern.places import place_

__all__ = ["Slots", "Swaps", "verify"]

Slots = dict[str, nn.Module]
"""Module name -> what stands there."""


class Swaps:
    """The model in three states: as it came, strongest dense, and packed.

    Args:
        model: changed in place by `run`, which places the state that it runs.
        layers: those that can be swapped.
        split: the nn.MultiheadAttentions that were taken apart.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], split: Split) -> None:
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

    def put(self, slots: Slots, layer: Layer, module: PackedLinear | None) -> None:
        """Set a layer, and the activation that it absorbs, in one of the states."""
        follower = layer.seen.follower
        slots[layer.name] = self.original[layer.name] if module is None else module
        if follower is not None:
            act = self.original[follower]
            slots[follower] = act if module is None else AbsorbedActivation(act).eval()

    def copy(self, slots: Slots, layer: Layer, source: Slots) -> None:
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

    def place(self, slots: Slots, *, kernels: bool = False) -> None:
        """Let one of the states stand; with the kernels of `sites` in the packed one, or where asked."""
        kernels = kernels or slots is self.packed
        if self.now is None or self.now[0] is not slots or self.now[1] != kernels:
            place_(self.model, self.split.arranged(slots))
            (enable if kernels else disable)(self.forwards)
            self.unfuse()
            if slots is self.packed:
                fuse(self.model, [pair for pair, _ in self.pairs.values()])
            self.now = slots, kernels

    def run(self, slots: Slots, example: Example, *, kernels: bool = False) -> list[Tensor]:
        """The model's output in one of the states, as `place` has it."""
        self.place(slots, kernels=kernels)
        return run_model(self.model, example)

    def leave_original(self) -> None:
        """Leave the model as it came."""
        place_(self.model, self.split.arranged(self.original))
        disable(self.forwards)
        self.unfuse()

    def leave_packed(self) -> None:
        """Leave the model packed."""
        place_(self.model, self.split.arranged(self.packed))
        disable(self.forwards)
        standing = set(self.model.modules())
        enable(forward for forward in self.forwards if forward.module in standing)
        fuse(self.model, [pair for pair, _ in self.pairs.values()])


def verify(swaps: Swaps, examples: Sequence[Example], expected: Sequence[Sequence[Tensor]], slots: Slots) -> None:
    """Refuse a state of the model that computes something else on the examples.

    Raises:
        PackedModelError: an output differs from `expected` by more than the tolerance of the model's dtypes.
    """
    # the linears as they came, too: those that are swapped out hold none of the model's parameters
    tolerance = tolerance_of(swaps.model, *swaps.original.values())
    outputs = (swaps.run(slots, example) for example in examples)
    if deviation := deviation_of(outputs, expected, tolerance):
        raise PackedModelError(
            f"the packed model's output {deviation}; nothing was changed; is the model deterministic in eval mode?"
        )
