"""Images with or without labels, from what a user has at hand, as batches for a model. It runs no model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["batches"]

Batch = tuple[Tensor | dict[str, Any], int, Tensor | None]
"""(what to call the model with, number of images, labels or None)."""


def batches(images: Any, batch_size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
    """Batches of at most `batch_size` images.

    Args:
        images: [B, ...] tensor, a pair (images, labels [B]), or an iterable of batches: tensors, pairs, or mappings of
            keyword arguments whose "labels", if any, are the labels.
        batch_size: larger batches are split.
        device: to put the images on.
        dtype: of images of floating point.

    Raises:
        TypeError: images or a batch of another type.
        ValueError: images and labels of different lengths, or some batches with labels and some without.
    """
    one = isinstance(images, Tensor) or _is_pair(images)
    if not one and (isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable)):
        raise TypeError(
            f"images: expected a tensor, a pair (images, labels) or an iterable of batches, got {type(images).__name__}"
        )
    labelled: bool | None = None
    for batch in [images] if one else images:
        call, labels = _parts(batch)
        if labelled not in (None, labels is not None):
            raise ValueError("images: expected labels in every batch or in none, got both kinds")
        labelled = labels is not None
        sizes = {len(value) for value in call.values() if isinstance(value, Tensor) and value.ndim}
        if len(sizes | ({len(labels)} if labels is not None else set())) != 1:
            raise ValueError(f"images: expected one label and one row of every input per image, got lengths {sizes}")
        count = sizes.pop()
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            inputs = {name: _move(value, part, device, dtype) for name, value in call.items()}
            yield (
                inputs if isinstance(batch, Mapping) else inputs["images"],
                part.stop - part.start,
                None if labels is None else labels[part],
            )


def _is_pair(value: Any) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)):
        return False
    return bool(value[0].ndim > 1 and value[1].ndim == 1)


def _parts(batch: Any) -> tuple[dict[str, Any], Tensor | None]:
    if isinstance(batch, Mapping):
        call = {name: value for name, value in batch.items() if name != "labels"}
        return call, batch.get("labels")
    if isinstance(batch, Tensor):
        return {"images": batch}, None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        labels = batch[1] if len(batch) > 1 else None
        if labels is None or (isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()):
            return {"images": batch[0]}, labels
    raise TypeError(
        "images: expected batches that are tensors, pairs (images, labels [B] of integers) or mappings, "
        f"got {type(batch).__name__}"
    )


def _move(value: Any, part: slice, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    value = value[part].to(device)
    return value.to(dtype) if value.is_floating_point() else value
