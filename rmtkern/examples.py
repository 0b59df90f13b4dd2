"""What a model is called with, as a user passes it. It knows no model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Example", "as_example"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of one call."""


def as_example(given: Any) -> Example | None:
    """The call that a tensor, a tuple of arguments or a mapping of keyword arguments stands for; None for all else."""
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, tuple):
        return given, {}
    return ((), dict(given)) if isinstance(given, Mapping) else None
