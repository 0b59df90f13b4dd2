"""Where a report's weights come from: a model, packed or not, or a checkpoint alone. It reads and computes nothing."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rmtkern.files import load
from rmtkern.loading import holds_packed, load_model, load_plan
from rmtkern.models import PrunableWeight, prunable_weights, weights_of_state
from rmtkern.packing import is_packed, unpack_
from rmtkern.pruning.plan import PrunePlan
from rmtkern.shards import read_metadata, read_tensors

__all__ = ["Source", "from_checkpoint", "from_model", "load_checkpoint", "travelling_plan"]


@dataclass(frozen=True)
class Source:
    """The dense weights of a model, and its sizes.

    Args:
        name: of the model or the file.
        words: where the weights come from, in a sentence.
        weights: in the order of the model.
        parameters: of the whole model.
        nbytes: of all parameters, dense.
        nbytes_packed: of all tensors as they are packed; None if nothing is.
    """

    name: str
    words: str
    weights: tuple[PrunableWeight, ...]
    parameters: int
    nbytes: int
    nbytes_packed: int | None = None


def from_model(model: nn.Module, file: Path | None) -> Source:
    """Of a module, which is not changed; a packed one is copied and unpacked.

    Args:
        model: any.
        file: that its weights came from, to be named; or None.

    Raises:
        ValueError, PackedModelError: as models.prunable_weights raises them.
    """
    kind, nbytes_packed = type(model).__name__, None
    if is_packed(model):
        nbytes_packed = sum(tensor.nbytes for tensor in model.state_dict().values())
        model = copy.deepcopy(model)
        unpack_(model)
    parameters = list(model.parameters())
    return Source(
        kind if file is None else _name(file),
        f"weights of a {kind}{'' if nbytes_packed is None else ', packed'}",
        tuple(prunable_weights(model, "all")),
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.nbytes for parameter in parameters),
        nbytes_packed,
    )


def from_checkpoint(file: Path) -> Source:
    """Of a dense checkpoint alone; what its layers do is told by the names of its tensors.

    Args:
        file: safetensors, the index of shards, or the folder of either.

    Raises:
        ValueError: no such file, a damaged one, shards that do not belong together, or a packed model.
    """
    if holds_packed(_metadata(file)):
        raise ValueError(
            f"{file}: it holds a packed model, whose weights need their model: rmtkern report --model NAME, or "
            "rmtkern.load(path, model) and pass the model"
        )
    state = {name: tensor for name, tensor in read_tensors(file).items() if tensor.is_floating_point()}
    return Source(
        _name(file),
        "layer types told by the names of the tensors in the file",
        tuple(weights_of_state(state)),
        sum(tensor.numel() for tensor in state.values()),
        sum(tensor.nbytes for tensor in state.values()),
    )


def load_checkpoint(spec: str, file: Path) -> nn.Module:
    """A model with the weights of a checkpoint, packed as it is packed.

    Args:
        spec: as loading.load_model takes it.
        file: safetensors, the index of shards, or the folder of either, dense or packed.

    Raises:
        ValueError: as load_model and files.load raise it.
    """
    if not holds_packed(_metadata(file)):
        return load_model(spec, checkpoint=file)
    model = load_model(spec, random_weights=True)
    load(file, model)
    return model


def travelling_plan(file: Path) -> PrunePlan | None:
    """The plan that travels with a checkpoint, dense or packed; None if none does.

    Raises:
        ValueError: no such file, or damaged metadata.
    """
    record = _metadata(file)
    without = holds_packed(record) and record.get("plan") is None
    return None if record is None or without else load_plan(file)


def _name(file: Path) -> str:
    """Of a file or folder, also if it is given as "."."""
    return file.resolve().name


def _metadata(file: Path) -> object:
    """What rmtkern wrote into a checkpoint's metadata; None if nothing."""
    text = read_metadata(file).get("rmtkern")
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its rmtkern metadata is not complete JSON; copy it again") from error
