"""load_pretrained: a packed transformers model from its folder alone, built without its dense weights.

`files` loads what is packed; this file makes the model that it is loaded into.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkern.errors import short
from rmtkern.files import load
from rmtkern.shards import read_metadata

__all__ = ["load_pretrained"]

CONFIG = "config.json"


def load_pretrained(folder: str | os.PathLike[str], *, mmap: bool = True) -> nn.Module:
    """Build the transformers model that a folder of `save` describes, and load its packed weights.

    What `from_pretrained` is for dense models. The class is the one that config.json names, of the installed
    transformers; no code that comes with a folder is run, and nothing is downloaded. Parameters are made on the meta
    device, so no dense weight of a packed layer is ever in memory.

    Args:
        folder: that `save(model, folder)` wrote of a transformers model.
        mmap: as for `load`.

    Returns:
        The packed model, in eval mode.

    Raises:
        ValueError: no such folder, no config.json in it, one that transformers does not take or that names no model
            class of it, or weights that do not fit or are damaged (as `load` says).
        ModuleNotFoundError: transformers is not installed.
    """
    source = Path(folder)
    if not (source / CONFIG).is_file():
        raise ValueError(
            f"{source}: no {CONFIG} in it; give the folder that rmtkern.save wrote of a transformers model, or build "
            "the model and call rmtkern.load(path, model)"
        )
    read_metadata(source)  # a missing or damaged file is said before anything is built
    config, kind = _described(source)
    with _parameters_on_meta(), _default_dtype(config):
        model = kind(config)
    loaded: nn.Module = load(source, model, mmap=mmap)
    return loaded


def _described(source: Path) -> tuple[Any, Any]:
    """The config in a folder, and the class of transformers that it is for."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("load_pretrained needs transformers: pip install transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises whatever its checks do
        reason = " ".join(str(error).split())
        raise ValueError(f"{source / CONFIG}: transformers does not take it ({short(reason)})") from error
    named = getattr(config, "architectures", None)
    name = named[0] if isinstance(named, list) and named else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or not isinstance(config, kind.config_class or ()):
        raise ValueError(
            f"{source / CONFIG}: architectures: expected the name of a model class of the installed transformers for "
            f"a {type(config).__name__}, got {short(named)}; build the model and call rmtkern.load(folder, model)"
        )
    return config, kind


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are built meanwhile, in any thread, have parameters without memory; buffers are as ever.

    Buffers that no file holds (positions, say) are computed by constructors, so that they cannot be on meta.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is there already is tied
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _default_dtype(config: Any) -> Iterator[None]:
    """The dtype that a config says its model is in, for what is built meanwhile."""
    said = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch.")
    before = torch.get_default_dtype()
    torch.set_default_dtype({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(said, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)
