"""An exponential moving average of parameters, and trading places with them. Nothing else is decided here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rmtkern.training.ranks import local

__all__ = ["Ema"]


class Ema:
    """Averages of trained parameters; a parameter's zeros stay exactly 0 in its average.

    Args:
        parameters: name -> parameter; averages start as copies.
        decay: share that stays at each update, (0, 1), and less in the first updates: at most (1 + t) / (10 + t).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters; `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            local(self.averages[name]).lerp_(local(parameter), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for parameters; afterwards its own bits again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = local(parameter).clone()
            local(parameter).copy_(local(self.averages[name]))
            local(self.averages[name]).copy_(own)
