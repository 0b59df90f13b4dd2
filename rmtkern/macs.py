"""count_macs: the multiplications of one forward pass, by watching it: which products it makes and of what.

It knows no formula of any model; roles of weights come from models.py. It changes nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from rmtkern.examples import as_example
from rmtkern.models import ATTENTION_WORDS, ROLES, prunable_weights
from rmtkern.pruning.calibrate import evaluating
from rmtkern.tables import Table, Tabulated

__all__ = ["LayerMacs", "MacReport", "count_macs"]

KINDS = (*ROLES, "attention", "other")
"""What a product belongs to: the role of its weight, attention (two activations inside of it), or other."""


@dataclass(frozen=True, slots=True)
class LayerMacs:
    """The products with one weight, or those of activations in one module.

    Args:
        name: of the parameter, or of the module.
        kind: of KINDS.
        places: how often each entry of the weight is used: tokens (or places of a convolution) of the whole batch, over
            all calls; 0 for products of activations.
        macs: multiply-accumulates, zeros included.
        nonzero: those with nonzero entries of the weight.
    """

    name: str
    kind: str
    places: int
    macs: int
    nonzero: int


@dataclass(frozen=True, slots=True)
class MacReport(Tabulated):
    """Multiply-accumulates of one forward pass; prints as a table by kind.

    Biases, norms, activations and softmax are not counted, as usual.

    Args:
        layers: in the order in which the pass first used them.
    """

    layers: tuple[LayerMacs, ...]

    @property
    def total(self) -> int:
        """All of them, zeros included."""
        return sum(layer.macs for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Those with nonzero weights, and all products of activations."""
        return sum(layer.nonzero for layer in self.layers)

    def of(self, *kinds: str) -> tuple[int, int]:
        """(macs, nonzero) of some kinds.

        Raises:
            ValueError: an unknown kind.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind {unknown[0]!r}; valid: {', '.join(KINDS)}")
        found = [layer for layer in self.layers if layer.kind in kinds]
        return sum(layer.macs for layer in found), sum(layer.nonzero for layer in found)

    def table(self) -> Table:
        """One row per kind that occurs, totals as a note."""
        rows = []
        for kind in KINDS:
            count = sum(layer.kind == kind for layer in self.layers)
            if count:
                macs, nonzero = self.of(kind)
                rows.append((kind, count, macs / 1e9, nonzero / 1e9, 100 * macs / self.total))
        note = f"in all {self.total / 1e9:.4f} G, {self.nonzero / 1e9:.4f} G without zero weights"
        return Table(("kind", "layers", "GMACs", "without zeros", "% of all"), rows, [note])

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps({"total": self.total, "nonzero": self.nonzero, **asdict(self)}, indent=1)


def count_macs(model: nn.Module, example: Any) -> MacReport:
    """Count the multiply-accumulates of a model's linears, convolutions and attention on an example.

    One forward pass in eval mode is watched, so tokens that `merge_tokens_` merged away are not counted, and whatever
    a model computes twice counts twice. Attention is counted in full, whatever a mask hides.

    Args:
        model: not packed; not changed. On the meta device only shapes count, and no weight is taken to be zero.
        example: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments; all counts are
            of the whole batch.

    Returns:
        MacReport.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model cannot run the example.
        PackedModelError: the model is packed.
    """
    roles = {weight.name: weight.role for weight in prunable_weights(model, "all")}
    call = as_example(example)
    if call is None:
        raise TypeError(
            "example: expected a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(example).__name__}; pass what you would call the model with"
        )
    args, kwargs = call
    watch = _Watch(model, roles)
    try:
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), watch.tracker, watch:
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"the model cannot run the example: {error}; pass what you would call it with") from error
    return MacReport(tuple(LayerMacs(name, kind, *numbers) for (name, kind), numbers in watch.found.items()))


class _Watch(TorchDispatchMode):
    """Sees every matrix product and convolution below the functions that make them."""

    def __init__(self, model: nn.Module, roles: Mapping[str, str]) -> None:
        super().__init__()
        self.tracker = ModuleTracker()
        self.roles = roles
        self.names: dict[int, str] = {}  # storage -> parameter; also on the meta device, where addresses are all 0
        for name, parameter in model.named_parameters():
            self.names.setdefault(_storage(parameter), name)
        self.found: dict[tuple[str, str], list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _PRODUCTS.get(func.overloadpacket)
        if count is not None:
            self._add(*count(args, out))
        return out

    def _add(self, macs: int, *operands: Tensor) -> None:
        for operand in operands:
            name = self.names.get(_storage(operand))
            if name is not None:
                places = macs // max(operand.numel(), 1)
                nonzero = operand.numel() if operand.is_meta else int(operand.count_nonzero())
                self._note(name, self.roles.get(name, "other"), places, macs, places * nonzero)
                return
        module = max(self.tracker.parents, key=len).partition(".")[2]
        inside = any(word in module.lower() for word in ATTENTION_WORDS)
        self._note(module, "attention" if inside else "other", 0, macs, macs)

    def _note(self, name: str, kind: str, *numbers: int) -> None:
        sums = self.found.setdefault((name, kind), [0, 0, 0])
        sums[:] = [old + new for old, new in zip(sums, numbers, strict=True)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _product(a: Tensor, b: Tensor) -> tuple[int, Tensor, Tensor]:
    """[..., M, K] times [..., K, N]."""
    return prod(a.shape) * b.shape[-1], b, a


def _convolution(args: Any, out: Tensor) -> tuple[int, Tensor]:
    x, weight, transposed = args[0], args[1], args[6]
    side = x if transposed else out
    return weight.numel() * side.numel() // max(side.shape[1], 1), weight


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[[Any, Tensor], Any]] = {
    _aten.mm: lambda args, out: _product(*args[:2]),
    _aten.bmm: lambda args, out: _product(*args[:2]),
    _aten.addmm: lambda args, out: _product(*args[1:3]),
    _aten.baddbmm: lambda args, out: _product(*args[1:3]),
    _aten.convolution: _convolution,
}
"""Operator -> its arguments and output as multiply-accumulates and the operands that may be a weight."""
