"""What torch.distributed adds: who we are, sums over ranks, sharded tensors (DTensor), and when gradients travel.

It knows no optimizer and no loss. Without torch.distributed everything here is the identity.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Ranks", "distribute_", "full", "gradients_travel", "is_sharded", "local", "reshard", "wrap"]


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


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Args:
        rank: from 0; rank 0 writes files and shows progress.
        world: processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Self:
        """As torch.distributed says; one process if it was not initialised.

        Raises:
            ValueError: torchrun started several processes and torch.distributed is not initialised.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, but torch.distributed is not initialised; "
                "call torch.distributed.init_process_group() before finetune_"
            )
        return cls()

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Elementwise sums over all ranks, float64 where the device has it."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    def differ(self, value: int, device: torch.device) -> bool:
        """Whether the ranks hold different values."""
        total, square = self.total([value, value * value], device)
        return total * total != square * self.world


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
