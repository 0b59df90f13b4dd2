"""unpack_: every packed module back to what it was; is_packed: whether there is any."""

from torch import nn

from rmtkern.nn import AbsorbedActivation, PackedLinear, PackedModule
from rmtkern.packing.dtype import is_cast, uncast_
from rmtkern.packing.gated import unfuse
from rmtkern.packing.multihead import PackedMultihead
from rmtkern.packing.sites import KernelForward, disable
from rmtkern.packing.swaps import Slots
from rmtkern.places import place_

__all__ = ["is_packed", "unpack_"]


def is_packed(model: nn.Module) -> bool:
    """Whether `pack_` or `load` changed this model (or the one it is a copy of)."""
    kernels = bool(KernelForward.of(model))
    return is_cast(model) or kernels or any(isinstance(module, PackedModule) for module in model.modules())


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
