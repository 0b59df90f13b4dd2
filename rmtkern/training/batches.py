"""Training data: what a batch holds, which part is held out, and in which order batches come on which rank.

It knows no model's architecture and no loss. Everything random here follows from a seed and an epoch.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from rmtkern.evaluation import logits_of
from rmtkern.pruning.calibrate import LABELS
from rmtkern.ranks import Ranks

__all__ = ["Batch", "Source", "read_batch", "rng_kept", "seed_epoch", "split"]


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Args:
        call: what the model takes: a tensor, or keyword arguments.
        labels: [B] int64; None: none.
        size: B.
    """

    call: Tensor | dict[str, Any]
    labels: Tensor | None
    size: int

    def logits(self, model: Callable[..., Any]) -> Tensor:
        """Logits [B, classes] of a model, checked against the labels.

        Raises:
            ValueError: no logits, another number of rows, or a label outside the classes.
        """
        logits = logits_of(model(**self.call) if isinstance(self.call, dict) else model(self.call))
        if len(logits) != self.size:
            raise ValueError(f"expected logits [{self.size}, classes], one row per image, got {tuple(logits.shape)}")
        if self.labels is not None:
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= logits.shape[1]:
                raise ValueError(
                    f"labels must lie in 0..{logits.shape[1] - 1}, got {low}..{high}; number the classes as the "
                    "model does"
                )
        return logits


def read_batch(batch: Any, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch of a loader: a tensor, (inputs,), (inputs, labels) with a tensor or a mapping as inputs, or a mapping.

    Args:
        batch: in a mapping, "labels" or "label" holds the labels and the rest are keyword arguments of the model.
        device: where the model is.
        dtype: that floating-point inputs are cast to.

    Raises:
        TypeError: a batch of another type, or labels that are not integers.
        ValueError: labels that are not one per image.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    inputs, labels = batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    if isinstance(inputs, Mapping):
        call: Tensor | dict[str, Any] = {key: move(value) for key, value in inputs.items() if key not in LABELS}
        labels = next((inputs[key] for key in LABELS if inputs.get(key) is not None), labels)
        sizes = [len(value) for value in call.values() if isinstance(value, Tensor) and value.ndim]
    elif isinstance(inputs, Tensor) and inputs.ndim:
        call, sizes = move(inputs), [len(inputs)]
    else:
        sizes = []
    if not sizes:
        raise TypeError(
            "train_loader: expected batches that are tensors, (inputs, labels) or mappings of tensors, got "
            f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        )
    return Batch(call, None if labels is None else _labels(labels, sizes[0]).to(device), sizes[0])


def _labels(labels: Any, size: int) -> Tensor:
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integer class numbers, got {found}")
    if labels.shape != (size,):
        raise ValueError(f"labels: expected shape ({size},), one per image, got {tuple(labels.shape)}")
    return labels.long()


class Source:
    """Batches that can be gone through once per epoch.

    Args:
        batches: a loader with a length, or tensors of equal first dimension.
        indices: for tensors, the rows that belong to this source.
        batch_size: for tensors.
        shuffle: for tensors, a new order in every epoch.
        seed: of the order.
        ranks: for tensors, each takes its own equal part of the rows.
    """

    def __init__(
        self,
        batches: Any,
        indices: Tensor | None = None,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.batches, self.indices = batches, indices
        self.batch_size, self.shuffle, self.seed, self.ranks = batch_size, shuffle, seed, ranks or Ranks()

    def __len__(self) -> int:
        if self.indices is None:
            return len(self.batches)
        return -(-(len(self.indices) // self.ranks.world) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of one epoch."""
        if self.indices is None:
            _seed_loader(self.batches, self.seed, epoch)
            return iter(self.batches)
        return self._rows(self.indices, epoch)

    def _rows(self, rows: Tensor, epoch: int) -> Iterator[Any]:
        rank, world = self.ranks.rank, self.ranks.world
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[: len(rows) // world * world][rank::world]
        for part in rows.split(self.batch_size):
            yield tuple(tensor[part.to(tensor.device)] for tensor in self.batches)


def split(
    train: Any, held_out: Any, *, fraction: float, batch_size: int, seed: int, ranks: Ranks
) -> tuple[Source, Source | None]:
    """The sources of training and of held-out data.

    Args:
        train: a tensor of images, a pair (images, labels), or a loader with a length.
        held_out: the same kinds, or None: `fraction` of `train` is taken away from it, the same with every seed and
            number of ranks: rows of tensors or of a DataLoader's map-style data set, or the last of a list of batches.
        fraction: [0, 1); 0: nothing is held out.
        batch_size: for tensors.
        seed: of the order.
        ranks: each trains on its part of tensors; a loader must do that itself (DistributedSampler).

    Raises:
        TypeError: none of these kinds, or a loader without a length.
        ValueError: no data, tensors of unequal length, or a loader that nothing can be taken from.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "ranks": ranks}
    source = _source("train_loader", train, options, shuffle=True)
    if held_out is not None:
        return source, _source("held_out", held_out, options, shuffle=False)
    if fraction == 0:
        return source, None
    if source.indices is not None:
        kept, taken = _part(len(source.indices), fraction, ranks.world)
        return Source(source.batches, kept, shuffle=True, **options), Source(source.batches, taken, **options)
    if isinstance(train, DataLoader):
        kept, taken = _part(_rows_of(train), fraction, ranks.world)
        return Source(_subset(train, kept, True), seed=seed), Source(_subset(train, taken, False), seed=seed)
    if isinstance(train, Sequence):
        at = len(train) - max(1, round(fraction * len(train)))
        if at > 0:
            return Source(train[:at], seed=seed), Source(train[at:], seed=seed)
        raise ValueError(f"cannot hold out data of {len(train)} batch; pass held_out=, or holdout=0")
    raise ValueError(
        f"cannot hold out a part of a {type(train).__name__}; pass held_out= (a loader or a pair of tensors), or "
        "holdout=0 to keep the last state"
    )


def _source(what: str, data: Any, options: dict[str, Any], *, shuffle: bool) -> Source:
    tensors = (data,) if isinstance(data, Tensor) else data
    if isinstance(tensors, tuple) and len(tensors) in (1, 2) and all(isinstance(part, Tensor) for part in tensors):
        images = tensors[0]
        if images.ndim < 2 or any(len(part) != len(images) for part in tensors):
            shapes = " and ".join(str(tuple(part.shape)) for part in tensors)
            raise ValueError(f"{what}: expected images [B, ...] and labels [B], got {shapes}")
        if len(images) < options["ranks"].world:
            raise ValueError(f"{what}: expected at least one image for each process, got {len(images)}")
        return Source(tensors, torch.arange(len(images)), shuffle=shuffle, **options)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"{what}: expected a tensor, a pair (images, labels) or a loader of batches, got {type(data).__name__}"
        )
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{what}: expected a loader with a length, as the schedule needs the number of steps, got "
            f"{type(data).__name__}; make it a list or a DataLoader"
        ) from None
    if length == 0:
        raise ValueError(f"{what}: expected at least one batch, got none")
    return Source(data, seed=options["seed"])


def _part(count: int, fraction: float, world: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out: the same for all seeds, so that states of different runs compare."""
    held = max(world, round(fraction * count))
    if held + world > count:
        raise ValueError(f"cannot hold out {held} of {count} images; pass held_out=, or holdout=0")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[held:].sort().values, order[:held].sort().values


def _rows_of(loader: DataLoader[Any]) -> int:
    known = isinstance(loader.sampler, SequentialSampler | RandomSampler | DistributedSampler)
    if loader.batch_size is None or not known or not hasattr(loader.dataset, "__len__"):
        raise ValueError(
            "cannot hold out a part of a DataLoader with a sampler or a data set of its own kind; pass held_out=, or "
            "holdout=0 to keep the last state"
        )
    return len(loader.dataset)


def _subset(loader: DataLoader[Any], rows: Tensor, train: bool) -> DataLoader[Any]:
    """The same loader over some rows; the held-out part in order, and on every rank its share."""
    subset = Subset(loader.dataset, rows.tolist())
    sampler: DistributedSampler[Any] | None = None
    if isinstance(loader.sampler, DistributedSampler):
        old = loader.sampler
        sampler = DistributedSampler(
            subset, old.num_replicas, old.rank, shuffle=old.shuffle and train, seed=old.seed, drop_last=old.drop_last
        )
    return DataLoader(
        subset,
        loader.batch_size,
        shuffle=train and isinstance(loader.sampler, RandomSampler) if sampler is None else None,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last and train,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def _mix(*numbers: int) -> int:
    """A seed in [0, 2^63) that follows from some numbers and has nothing in common with its neighbours'."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Start the generators of torch, numpy and random where this epoch starts on this rank, whatever ran before."""
    start = _mix(seed, epoch, rank)
    torch.manual_seed(start)
    random.seed(start)
    np.random.seed(start % 2**32)


def _seed_loader(loader: Any, seed: int, epoch: int) -> None:
    """Do the same for a loader that has a generator or a sampler of its own."""
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(_mix(seed, epoch))
    sampler = getattr(loader, "sampler", None)
    if sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


@contextmanager
def rng_kept() -> Iterator[None]:
    """Afterwards the generators of torch, numpy and random are where they were."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        torch.cuda.set_rng_state_all(cuda)
