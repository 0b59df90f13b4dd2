"""A model from what a user types: a timm name, `module:function`, and a checkpoint in safetensors.

Only the command line and fine-tuning need it. Pickled checkpoints are read with torch's safe loader; no code in a file
is ever run.
"""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rmtkern.evaluation import preprocessing_of
from rmtkern.foreign import plain_state
from rmtkern.places import place_
from rmtkern.pruning.plan import PrunePlan
from rmtkern.shards import INDEX, SUFFIX, read_metadata, read_tensors
from rmtkern.shrink_plan import ShrinkPlan
from rmtkern.spectral_linear import divide_as_
from rmtkern.storage import write_tensors

__all__ = [
    "SHRUNK",
    "holds_packed",
    "input_size_of",
    "is_safetensors",
    "load_model",
    "load_plan",
    "load_state_",
    "random_input",
    "read_checkpoint",
    "save_dense",
]

SHRUNK = "rmtkern.shrunk"
"""Name in a checkpoint's metadata of the ShrinkPlan that made the model smaller."""


TOKENS = 128
"""Length of the random text that a text model is timed on."""


def _from_function(spec: str) -> nn.Module:
    module_name, _, function_name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    wanted = f"{spec}: expected an importable module:function that returns a model"
    if not all(map(str.isidentifier, (*module_name.split("."), function_name))):
        raise ValueError(f"{wanted}, such as mymodel:model")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{wanted} ({error})") from error
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted} when it is called with no argument ({error})") from error
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec}: expected the function to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(
            f"{name}: timm names need timm: pip install 'rmtkern[models]'; or give module:function"
        ) from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(
            f"{name}: no timm model of that name{'; similar: ' + near if near else ''}; or give module:function"
        )
    try:
        return timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        if not pretrained:
            raise
        raise ValueError(
            f"{name}: could not load pretrained weights ({type(error).__name__}: {error}); "
            "use --checkpoint FILE, or --random-weights where no model hub is reachable"
        ) from error


def is_safetensors(path: Path) -> bool:
    """Whether a checkpoint's name is that of safetensors: a file, an index of shards, or a folder."""
    return path.is_dir() or path.name.endswith((SUFFIX, INDEX))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A dense state dict, also of a model that another tool pruned.

    Args:
        path: safetensors (a file, an index of shards, or the folder of either, such as transformers writes), or a torch
            file that its weights-only loader accepts. Weights that torch.nn.utils.prune keeps with their masks and
            those in compressed-tensors' bitmask formats (SparseML, llm-compressor) become plain ones, zeros included.

    Returns:
        Name -> tensor, for `model.load_state_dict`.

    Raises:
        ValueError: no such file, a damaged one, a packed model, or one that holds anything but tensors; it names the
            tensor.
    """
    source = Path(path)
    state = _read_state(source)
    try:
        return plain_state(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def holds_packed(record: object) -> TypeGuard[dict[str, Any]]:
    """Whether what rmtkern wrote into a checkpoint's metadata, as JSON says it, is of a packed model."""
    return isinstance(record, dict) and "linears" in record


def _is_packed_file(path: Path) -> bool:
    try:
        return holds_packed(json.loads(read_metadata(path).get("rmtkern") or "null"))
    except (json.JSONDecodeError, RecursionError):  # somebody else's, or damaged: the tensors are read all the same
        return False


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if is_safetensors(path):
        if _is_packed_file(path):
            raise ValueError(
                f"{path}: it holds a packed model, and dense weights are needed; give the file that it was packed from,"
                " or write those of rmtkern.load(path, model) after rmtkern.unpack_(model)"
            )
        return read_tensors(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # around that torch advises to run the file
        reason = text.partition("\n")[0].partition(". Please ")[0] or type(error).__name__
        raise ValueError(
            f"{path}: expected safetensors or a weights-only torch file, as torch.save(model.state_dict(), path) writes"
            f" ({reason})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors; convert the checkpoint to safetensors")
    return state


def _check_fit(what: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a state dict with other keys or shapes than wanted, in one line that names the first few."""
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "wrong shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"{what}: {'; '.join(found)}; give the model that the checkpoint was saved from")


def load_model(spec: str, *, checkpoint: str | Path | None = None, random_weights: bool = False) -> nn.Module:
    """Build a model and, if given, load a checkpoint strictly; the model is returned in eval mode.

    Args:
        spec: "demo" (the shipped demo model), a timm model name, or "module:function" (called with no argument).
        checkpoint: as `read_checkpoint` takes it; low-precision tensors are cast.
        random_weights: do not ask a model hub for a timm model's weights.

    Returns:
        The model.

    Raises:
        ValueError: unknown name, unreachable weights, or a checkpoint that is damaged or does not fit.
    """
    if ":" in spec:
        model = _from_function(spec)
    elif spec == "demo":
        from rmtkern.demo import load_demo_model

        model = load_demo_model()
    else:
        model = _from_timm(spec, pretrained=not random_weights and checkpoint is None)
    if checkpoint is not None:
        load_state_(model, checkpoint, spec)
    return model.eval()


def load_state_(model: nn.Module, checkpoint: str | Path, name: str) -> None:
    """Load a checkpoint strictly into a model.

    Args:
        model: not changed if the checkpoint does not fit; made as small as the checkpoint is if `shrink_` made that,
            and divided as it is where `prune_` made factors.
        checkpoint: as `read_checkpoint` takes it; low-precision tensors are cast.
        name: of the model, for messages.

    Raises:
        ValueError: a checkpoint that is damaged or does not fit.
    """
    path = Path(checkpoint)
    state = read_checkpoint(path)
    shrunk = read_metadata(path).get(SHRUNK) if is_safetensors(path) else None
    take_back = None if shrunk is None else ShrinkPlan.from_json(shrunk).apply_(model)
    whole = divide_as_(model, state)
    try:
        _check_fit(f"{checkpoint}: does not fit {name}", state, model.state_dict())
    except ValueError:
        place_(model, whole)
        if take_back is not None:
            take_back()
        raise
    model.load_state_dict(dict(state))


def input_size_of(model: nn.Module, batch: int) -> tuple[int, int, int, int]:
    """Shape [B, C, H, W] of the images that the model takes."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else 3
    return (batch, channels, *preprocessing_of(model).size)


def random_input(model: nn.Module, batch: int) -> Tensor:
    """What to time a model on, the same every time: images, or token ids where it has an embedding and no convolution.

    Args:
        model: not run.
        batch: B, how many of them.

    Returns:
        [B, C, H, W] float32, standard normal; or [B, T] int64, each token of the vocabulary as likely, with T = 128 or
        the most that the model's config allows.
    """
    generator = torch.Generator().manual_seed(0)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables or any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return torch.randn(input_size_of(model, batch), generator=generator)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", TOKENS)
    return torch.randint(tables[0].num_embeddings, (batch, min(TOKENS, longest)), generator=generator)


def save_dense(
    model: nn.Module, path: str | Path, plan_json: str | None = None, shrink_json: str | None = None
) -> None:
    """Write the model's state dict as dense safetensors under its own keys; complete or not at all.

    Shared tensors are stored once per key. The plans travel in the metadata under "rmtkern" and "rmtkern.shrunk".

    Args:
        model: not packed.
        path: of the new file; written beside it first, then renamed.
        plan_json: the plan, as PrunePlan.to_json gives it.
        shrink_json: what made the model smaller, as ShrinkPlan.to_json gives it; without it the file loads only into a
            model that is as small.
    """
    metadata = {"rmtkern": plan_json, SHRUNK: shrink_json}
    write_tensors(model.state_dict(), path, {key: text for key, text in metadata.items() if text is not None})


def load_plan(path: str | Path) -> PrunePlan:
    """The plan that travels with a checkpoint, packed (`rmtkern.save`) or dense (`rmtkern prune`).

    Args:
        path: of the safetensors file, of the index of its shards, or of the folder that `save` wrote.

    Returns:
        The plan.

    Raises:
        ValueError: no such file, a damaged one, or one without a plan.
    """
    text = read_metadata(path).get("rmtkern")
    remedy = "give the file that rmtkern.save(model, path, plan) or rmtkern prune wrote"
    try:
        record = None if text is None else json.loads(text)
        if holds_packed(record):  # then the plan is one of its fields
            record = record.get("plan")
        if record is None:
            raise ValueError("it holds no plan")
        return PrunePlan.from_json(json.dumps(record))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; {remedy}") from error
