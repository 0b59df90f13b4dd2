"""What torch.distributed adds to training: sharded tensors (DTensor), DistributedDataParallel, when gradients travel.

It knows no optimizer and no loss. Without torch.distributed everything here is the identity.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rmtkern.ranks import Ranks

__all__ = ["distribute_", "full", "gradients_travel", "is_sharded", "local", "reshard", "wrap"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as the parameters of `fully_shard` are."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, detached; it shares the tensor's memory."""
    detached: Any = tensor.detach()
    return detached.to_local() if is_sharded(detached) else detached


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded (then every rank must call this), detached."""
    detached: Any = tensor.detach()
    return detached.full_tensor() if is_sharded(detached) else detached


def distribute_(target: Tensor, whole: Tensor) -> None:
    """Copy a tensor, whole or sharded like the target, into a target of the same shape; every rank calls this."""
    if is_sharded(target) and not is_sharded(whole):
        from torch.distributed.tensor import distribute_tensor

        spec: Any = target
        whole = local(distribute_tensor(whole.to(local(target).device), spec.device_mesh, spec.placements))
    local(target).copy_(local(whole))


def wrap(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, nn.Module]:
    """What to call in training and the module that holds the parameters.

    A plain module on several ranks is put into DistributedDataParallel; a module that is so already, or sharded with
    fully_shard, or compiled, stays as it is.

    Raises:
        ValueError: some parameters are sharded and others are not, so that nothing would keep these equal.
    """
    bare = model
    while isinstance(inner := getattr(bare, "_orig_mod", None) or _inside_ddp(bare), nn.Module):
        bare = inner
    trained = {name: parameter for name, parameter in bare.named_parameters() if parameter.requires_grad}
    sharded = [name for name, parameter in trained.items() if is_sharded(parameter)]
    if sharded and len(sharded) < len(trained):
        plain = next(name for name in trained if name not in sharded)
        raise ValueError(f"{plain} is not sharded but {sharded[0]} is; call fully_shard(model) on the root as well")
    if ranks.world > 1 and not sharded and not any(_inside_ddp(one) for one in (model, getattr(model, "_orig_mod", 0))):
        return nn.parallel.DistributedDataParallel(model), bare
    return model, bare


def _inside_ddp(module: Any) -> nn.Module | None:
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else None


def _sharding(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on."""
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


@contextmanager
def gradients_travel(model: nn.Module, travel: bool) -> Iterator[None]:
    """Inside, a backward pass averages gradients over ranks only if `travel`; without ranks nothing changes."""
    if travel:
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        modules = _sharding(model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)


def reshard(model: nn.Module) -> None:
    """Drop gathered copies that a forward pass left behind, so that the next one sees parameters written since."""
    for module in _sharding(model):
        module.reshard()
