"""Who we are among the processes of torch.distributed, and what they add up, share and agree on.

It knows no model. Without torch.distributed everything here is the identity.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that compute together.

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
                "call torch.distributed.init_process_group() first"
            )
        return cls()

    def total(self, values: Sequence[float], device: torch.device | None = None) -> list[float]:
        """Elementwise sums over all ranks, float64 where the device has it; on the CPU by default."""
        if self.world == 1:
            return list(values)
        exact = device is None or device.type != "mps"
        return self.sum(torch.tensor(values, dtype=torch.float64 if exact else torch.float32, device=device)).tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, the same bits on each; the tensor itself where there is one rank."""
        if self.world == 1:
            return tensor
        there = tensor.detach().to(_reach(tensor), copy=True)
        dist.all_reduce(there)
        return there.to(tensor.device)

    def all(self, value: bool) -> bool:
        """Whether every rank holds True."""
        return self.total([not value])[0] == 0

    def gather(self, value: Any) -> list[Any]:
        """What each rank holds, in their order; anything that pickle takes."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def share_(self, tensor: Tensor) -> None:
        """Give every rank the values that rank 0 has."""
        if self.world > 1:
            there = tensor.detach().to(_reach(tensor))
            dist.broadcast(there, 0)
            if there.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(there)

    def differ(self, value: int, device: torch.device | None = None) -> bool:
        """Whether the ranks hold different values."""
        total, square = self.total([value, value * value], device)
        return total * total != square * self.world


def _reach(tensor: Tensor) -> torch.device:
    """Where the ranks exchange a tensor: where it is, but NCCL reaches GPUs only."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
