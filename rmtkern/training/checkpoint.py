"""The whole state of a run in one safetensors file, with JSON in its metadata: no pickle. It trains nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.ranks import Ranks
from rmtkern.storage import read_metadata, read_tensors, write_tensors
from rmtkern.training.ranks import distribute_, full

__all__ = ["optimizer_tensors", "read_run", "restore_", "restore_optimizer_", "save_run"]

_KEY = "rmtkern-finetune"


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter>.<what>" -> tensor, such as "fc.weight.exp_avg"."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def save_run(
    path: str | Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write a run; complete or not at all. Every rank calls this, rank 0 writes.

    Args:
        path: of the file; an older one is replaced.
        parts: part -> name -> tensor; sharded ones are gathered, so that the file does not depend on the ranks.
        facts: JSON-safe, everything that is not a tensor.
        ranks: who writes.
    """
    whole = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            gathered = full(tensor)
            if ranks.rank == 0:
                whole[f"{part}/{name}"] = gathered
    if ranks.rank == 0:
        write_tensors(whole, path, {_KEY: json.dumps(facts)})


def read_run(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The inverse of `save_run`: whole tensors on the CPU, and the facts.

    Raises:
        ValueError: not a complete file of `save_run`.
    """
    facts = read_metadata(path).get(_KEY)
    if facts is None:
        raise ValueError(f"{path}: not a checkpoint of finetune_; give the file that checkpoint= wrote")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts, json.loads(facts)


@torch.no_grad()
def restore_(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors, whole or sharded like the targets, into live ones of the same names; on every rank."""
    for name, target in targets.items():
        distribute_(target, saved[name])


@torch.no_grad()
def restore_optimizer_(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Give an optimizer that has not stepped yet the state that `optimizer_tensors` read."""
    for name, parameter in parameters.items():
        found = {key.removeprefix(f"{name}."): tensor for key, tensor in saved.items() if key.startswith(f"{name}.")}
        for key, tensor in found.items():
            if tensor.shape == parameter.shape:
                state = torch.zeros_like(parameter, dtype=tensor.dtype, requires_grad=False)
                distribute_(state, tensor)
            else:
                state = tensor.clone()
            optimizer.state[parameter][key] = state
