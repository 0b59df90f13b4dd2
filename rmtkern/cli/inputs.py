"""What several verbs read, and what they refuse: models, checkpoints, folders of images, JSON files."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from rmtkern.evaluation import folder_batches, preprocessing_of
from rmtkern.loading import input_size_of, is_safetensors, load_model
from rmtkern.shards import read_metadata
from rmtkern.token_merging import merge_tokens_

__all__ = [
    "calibration_of",
    "check_batch",
    "check_folder",
    "images_and_labels",
    "images_for",
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


def images_for(model: nn.Module, batch: int) -> Tensor:
    """Random images to time a model on."""
    return torch.randn(input_size_of(model, batch), generator=torch.Generator().manual_seed(0))


def check_batch(batch: int) -> None:
    """Refuse what is no batch size; ValueError."""
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")


def check_folder(output: Path | None) -> None:
    """Refuse a file to write whose folder is not there; ValueError."""
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write {output.name} into; create it first")


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
