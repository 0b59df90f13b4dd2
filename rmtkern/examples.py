"""What a model is called with, as a user passes it. It knows no model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Example", "as_example", "as_examples"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of one call."""


def as_example(given: Any) -> Example | None:
    """The call that a tensor, a tuple of arguments or a mapping of keyword arguments stands for; None for all else."""
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, tuple):
        return given, {}
    return ((), dict(given)) if isinstance(given, Mapping) else None


def as_examples(example: Any) -> list[Example]:
    """The calls that a user's `example` stands for: one as `as_example` takes it, or a list of these.

    Raises:
        ValueError: an empty list.
        TypeError: an entry is nothing that a model is called with.
    """
    entries = list(example) if isinstance(example, list) else [example]
    if not entries:
        raise ValueError("example: expected at least one example input, got an empty list")
    found: list[Example] = []
    for entry in entries:
        call = as_example(entry)
        if call is None:
            raise TypeError(
                f"example: expected a tensor, a tuple of arguments, a dict of keyword arguments, or a list of these for"
                f" several examples, got {type(entry).__name__}; pass what you would call the model with"
            )
        found.append(call)
    return found
