"""export_onnx: a pruned model as an ONNX file of its dense weights, zeros kept, for engines that are not ours.

It chooses no weight and runs no engine.
"""

import copy
import importlib.util
import inspect
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmtkern.examples import Example, as_example
from rmtkern.packing import is_packed, unpack_
from rmtkern.storage import replacing

__all__ = ["export_onnx"]

_NEEDS = ("onnx", "onnxscript")


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example: Any, *, dynamic_batch: bool = True) -> None:
    """Write a model as ONNX: a graph of standard operators and the dense weights, with the zeros that `prune_` made.

    ONNX has no operator for packed weights, so a packed model is copied and unpacked first; the file is that of the
    dense model, bit for bit. Engines such as ONNX Runtime and OpenVINO load it, and take the time of a dense model
    unless they look for zeros themselves. The graph is made by torch.onnx.export, by way of torch.export. A model that
    merges tokens merges them in the file too; of equally similar tokens an engine may take others (OpenVINO does).

    Args:
        model: dense or packed, in eval mode, not changed. One that was packed in another dtype is written in its own,
            with the precision that the packed dtype left.
        path: of the file, such as "vit.onnx". From about 1.5 GB on the weights lie beside it, in "vit.onnx.data". Files
            are written beside it first, then renamed.
        example: what the model is called with: a tensor, a tuple of arguments or a mapping of keyword arguments. Inputs
            of the graph are called as the arguments of `forward`.
        dynamic_batch: let the file take any batch size: the first dimension of each tensor of the example that is as
            long as that of the first one. False fixes every dimension, for models that compute sizes from their batch.

    Raises:
        TypeError: `model` is not a module, or `example` is not what a model is called with.
        ValueError: train mode, a path without ".onnx", an example without a tensor, or a model whose
            batch size cannot change.
        ImportError: onnx and onnxscript are not installed.
        torch.onnx.OnnxExporterError: PyTorch cannot export the model.
        OSError: the file cannot be written; an old one is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected eval mode, got train mode; call model.eval() first")
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"{target}: expected a name that ends in .onnx")
    call = as_example(example)
    if call is None:
        raise TypeError(
            f"example: expected a tensor, a tuple of arguments or a mapping of keyword arguments, got"
            f" {type(example).__name__}"
        )
    if not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in pytree.tree_leaves(call)):
        raise ValueError("example: expected a tensor with a batch dimension in it, got none")
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise ImportError(f"export_onnx needs {' and '.join(missing)}: pip install 'rmtkern[onnx]'")
    if is_packed(model):
        model = copy.deepcopy(model)
        unpack_(model)
    program = _program(model, call, dynamic_batch)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        program.save(Path(folder) / target.name)
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)  # the graph after its data
        for file in written:
            with replacing(target.with_name(file.name)) as temporary:
                file.replace(temporary)


def _program(model: nn.Module, call: Example, dynamic_batch: bool) -> torch.onnx.ONNXProgram:
    (args, kwargs), shapes = _with_any_batch(model, call) if dynamic_batch else (call, None)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")  # twice: by both tensors
            program = torch.onnx.export(
                model, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        if shapes is None:
            raise
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ValueError(f"{_FIXED} ({(str(reason).splitlines() or [''])[0]})") from error
    assert program is not None
    if shapes is not None:  # which PyTorch narrows to the example's where the model needs that, and says nothing
        varying = sum(leaf is not None for leaf in pytree.tree_leaves(shapes, is_leaf=_is_size))
        first = [value.shape[0] for value in program.model.graph.inputs if value.shape]
        if sum(not isinstance(size, int) for size in first) < varying:
            raise ValueError(_FIXED)
    return program


def _stable_sort(x: Any, *, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
    """What torch.onnx.export lacks, and merging tokens needs: ONNX's TopK of all entries, stable by definition."""
    from onnxscript import opset18 as op  # not above: onnxscript is an extra

    axis = dim % len(x.shape)
    return op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)


_FIXED = "PyTorch cannot export the model for every batch size; with dynamic_batch=False it may for that of the example"


def _is_size(value: Any) -> bool:
    """Whether a leaf of dynamic shapes is one of a tensor: {dimension: size}, or None."""
    return value is None or (isinstance(value, dict) and set(value) == {0})


def _with_any_batch(model: nn.Module, call: Example) -> tuple[Example, dict[str, Any]]:
    """The call, its batch at least 2 (torch.export takes a 1 for a constant), and what may vary, by argument."""
    batch = next(leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim)

    def varies(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch

    bound = inspect.signature(model.forward).bind(*call[0], **call[1]).arguments
    size = torch.export.Dim("batch", min=1)
    shapes = pytree.tree_map(lambda leaf: {0: size} if varies(leaf) else None, dict(bound))
    if batch == 1:
        call = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if varies(leaf) else leaf, call)
    return call, shapes
