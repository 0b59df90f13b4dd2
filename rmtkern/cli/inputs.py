"""What several verbs read, and what they refuse: models, checkpoints, folders of images, JSON files."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from rmtkern.evaluation import folder_batches, preprocessing_of
from rmtkern.loading import is_safetensors, load_model
from rmtkern.shards import SUFFIX, read_metadata
from rmtkern.token_merging import merge_tokens_

__all__ = [
    "calibration_of",
    "check_batch",
    "check_output",
    "images_and_labels",
    "metadata_of",
    "model_of",
    "read_json",
]

Made = TypeVar("Made")


def model_of(args: argparse.Namespace, checkpoint: Path | None = None) -> nn.Module:
    """The model that a verb's arguments name, or the same with another checkpoint."""
    model = load_model(args.model, checkpoint=checkpoint or args.checkpoint, random_weights=args.random_weights)
    if args.merge_tokens is not None:
        merge_tokens_(model, args.merge_tokens)
    return model


def check_batch(batch: int) -> None:
    """Refuse what is no batch size; ValueError."""
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")


def check_output(output: Path | None, *endings: str) -> None:
    """Refuse a file that cannot be written, or that is named like another kind of file; ValueError.

    Args:
        output: its path; None is fine.
        endings: what its name may end in; none given, anything but a checkpoint's.
    """
    if output is None:
        return
    if not output.name or output.is_dir():
        raise ValueError(f"{output}: is a folder; give the name of a file to write")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write {output.name} into; create it first")
    if endings and output.suffix.lower() not in endings:
        raise ValueError(f"{output}: expected a name that ends in {' or '.join(endings)}")
    if not endings and output.suffix == SUFFIX:
        raise ValueError(f"{output}: is the name of a checkpoint, and no tensors are written here; give another name")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"{output.parent}: {output.name} may not be written into this folder; give another one")


def metadata_of(checkpoint: Path | None, key: str) -> str | None:
    """What travels with a checkpoint under a name, if anything."""
    if checkpoint is None or not is_safetensors(checkpoint):
        return None
    return read_metadata(checkpoint).get(key)


def calibration_of(args: argparse.Namespace, model: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
    """Batches (images, labels) of the folder that --calibration names, if any."""
    if args.calibration is None:
        return None
    return list(folder_batches(args.calibration, preprocessing_of(model), limit=args.calibration_images))


def images_and_labels(folder: Path, model: nn.Module, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of a folder, as the model wants them."""
    batches = folder_batches(folder, preprocessing_of(model), limit=limit)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels


def read_json(path: Path, read: Callable[[str], Made], what: str) -> Made:
    """What a function makes of a JSON file; `what` says what is expected in it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {what}")
    try:
        return read(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected {what}") from error
