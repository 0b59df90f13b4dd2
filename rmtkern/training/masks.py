"""Which weights stay zero, and the check that they do. It knows no loss, no optimizer's kind and no loader."""

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from rmtkern.models import prunable_weights
from rmtkern.pruning.plan import Count, PrunePlan, mask_hash
from rmtkern.training.ranks import full, local

__all__ = ["Masks"]


@dataclass(frozen=True)
class Masks:
    """The pruned entries of a model's parameters.

    Gradients are zeroed where a weight is pruned, before clipping and before the optimizer sees them. Momentum and
    Adam's moments then stay exactly 0, weight decay scales a 0 and averages mix zeros, so nothing needs to be written
    into the weights; `check` proves it.

    Args:
        held: parameter name -> (parameter, bool in the shape of this rank's part, true where pruned).
        count: pruned entries among all of these parameters.
        digest: SHA-256 over names and zero patterns; equal digests are equal masks.
    """

    held: dict[str, tuple[nn.Parameter, Tensor]]
    count: Count
    digest: str

    @classmethod
    def of(cls, model: nn.Module, plan: PrunePlan | None) -> Self:
        """The zeros that a plan made, or all zeros of all prunable weights as they are now.

        Raises:
            ValueError: the model's zeros are not those of the plan.
            PackedModelError: the model is packed.
        """
        weights = prunable_weights(model, "all")
        if plan is not None:
            plan.verify(model)
            chosen = {layer.name for layer in plan.layers}
            weights = [weight for weight in weights if weight.name in chosen]
        held: dict[str, tuple[nn.Parameter, Tensor]] = {}
        words, zeros, total = [], 0, 0
        for weight in weights:
            found = full(weight.as_matrix() == 0)
            words.append(f"{weight.name} {mask_hash(found)}")
            zeros, total = zeros + int(found.sum()), total + found.numel()
            if bool(found.any()):
                held[weight.name] = (weight.parameter, local(weight.parameter) == 0)
        return cls(held, Count(zeros, total), hashlib.sha256("\n".join(words).encode()).hexdigest())

    @torch.no_grad()
    def hold_gradients_(self) -> None:
        """Set the gradients of pruned weights to 0, even where they are NaN."""
        for parameter, mask in self.held.values():
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(mask, 0)

    def check(self, where: str) -> None:
        """Refuse a pruned weight that is not exactly 0.

        Args:
            where: for the message, such as "after epoch 2, step 7".

        Raises:
            RuntimeError: names the weight and how many of its entries were written.
        """
        for name, (parameter, mask) in self.held.items():
            _refuse(name, local(parameter), mask, "weights", where)

    def check_state(self, optimizer: torch.optim.Optimizer, where: str) -> None:
        """Refuse momentum or a moment of a pruned weight that is not exactly 0.

        Raises:
            RuntimeError: names the weight and the state.
        """
        for name, (parameter, mask) in self.held.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and local(value).shape == mask.shape:
                    _refuse(name, local(value), mask, f"entries of the optimizer's {key}", where)


def _refuse(name: str, tensor: Tensor, mask: Tensor, what: str, where: str) -> None:
    wrong = tensor.ne(0).logical_and_(mask)
    if bool(wrong.any()):
        raise RuntimeError(
            f"{name}: {int(wrong.sum())} pruned {what} are not 0 {where}, though their gradients were; something else "
            "writes into them (a hook, or the model's own forward); remove it, the model is as it was when last good"
        )
