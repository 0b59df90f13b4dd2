"""Second moments of the inputs of weights over calibration images, summed online, no activation kept.

For all weights in one pass of the model as it is, or for one weight of a stage with all products of its inputs. It
watches the calls that use a weight rather than modules, so that weights used by functions count too.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.models import PrunableWeight
from rmtkern.progress import progress
from rmtkern.pruning.stages import Call, Stage

__all__ = ["Moments", "calibrate", "evaluating", "forward_passes", "second_moment", "weights_in_order"]

_BATCH = 32


@dataclass
class Moments:
    """Second moments of the inputs of some weights.

    Args:
        features: weight name -> [G, K] float64, E x_k^2 >= 0; G > 1 where blocks of rows see different inputs
            (groups of a convolution, q against k and v of a cross-attention).
        images: how many images were seen.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0


def calibrate(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    images: Tensor | Iterable[Any],
    *,
    show_progress: bool | None = None,
) -> Moments:
    """Measure the second moments of the inputs of `weights` over some images.

    The model runs in eval mode without gradients and is left as it was, mode of every module included.

    Args:
        model: takes one batch of images as its first argument.
        weights: from models.prunable_weights(model, ...).
        images: [B, C, H, W] tensor, a pair (images, labels), or an iterable (a loader) of batches: tensors, tuples
            whose first item is the images, or mappings of keyword arguments. Labels are not used.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        [G, K] for every weight.

    Raises:
        TypeError: a batch of another type.
        ValueError: no image, inputs with NaN or Inf, or a weight that no image reached.
    """
    watch = _Watch(weights)
    seen = 0
    with evaluating(model):
        for run, count in progress(forward_passes(model, images), "calibrate", show=show_progress):
            with watch:
                run()
            seen += count
    return Moments({weight.name: watch.moment(weight) for weight in weights}, seen)


def forward_passes(model: nn.Module, images: Tensor | Iterable[Any]) -> Iterator[tuple[Callable[[], Any], int]]:
    """For each batch of calibration images: the model applied to it, as a function to call, and the number of images.

    Args:
        model: takes one batch of images as its first argument.
        images: as for `calibrate`; a loader is read batch by batch.

    Raises:
        TypeError: a batch of another type.
        ValueError: no image in all.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    seen = 0
    for batch in _batches(images):
        call, count = _inputs(batch, device, dtype)
        if count:
            yield partial(model, **call) if isinstance(call, dict) else partial(model, call), count
        seen += count
    if seen == 0:
        raise ValueError("calibration: expected at least one image, got none")


def weights_in_order(stage: Stage, call: Call) -> list[tuple[PrunableWeight, int]]:
    """The weights of a stage in the order in which a call first uses them, and how often each is used.

    Raises:
        ValueError: a weight that the call does not use.
    """
    watch = _Watch(stage.weights)
    with watch:
        stage.module(*call.args, **call.kwargs)
    for weight in stage.weights:
        watch.moment(weight)  # refuses a weight that was not used, or only in part
    by_name = {weight.name: weight for weight in stage.weights}
    return [(by_name[name], uses) for name, uses in watch.uses.items()]


def second_moment(stage: Stage, weight: PrunableWeight, uses: int, calls: Iterable[Call]) -> Tensor:
    """E x xᵀ over the inputs x of a weight, [G, K, K], in float32, or float64 for a float64 model.

    Args:
        stage: owns the weight; each call runs until it has used the weight `uses` times.
        weight: one of the stage's.
        uses: from `weights_in_order`.
        calls: one for each batch.

    Returns:
        [G, K, K], symmetric; G > 1 where blocks of rows see different inputs.

    Raises:
        ValueError: inputs with NaN or Inf.
    """
    watch = _Watch([weight], products=True)
    for call in calls:
        watch.stop_at = watch.uses[weight.name] + uses
        try:
            with watch:
                stage.module(*call.args, **call.kwargs)
        except _Enough:
            pass
    return watch.moment(weight)


def _batches(images: Tensor | Iterable[Any]) -> Iterator[Any]:
    if isinstance(images, tuple) and len(images) == 2 and isinstance(images[0], Tensor) and images[0].ndim > 1:
        labels = images[1]
        if not isinstance(labels, Tensor) or labels.ndim <= 1:
            images = images[0]
    if isinstance(images, Tensor):
        return iter(images.split(_BATCH))
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise TypeError(f"calibration: expected a tensor or an iterable of batches, got {type(images).__name__}")
    return iter(images)


def _inputs(batch: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | dict[str, Any], int]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    if isinstance(batch, Mapping):
        call = {name: move(value) for name, value in batch.items()}
        return call, max([len(value) for value in call.values() if isinstance(value, Tensor) and value.ndim], default=0)
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            "calibration: expected batches that are tensors of images, (images, labels) or mappings, "
            f"got {type(batch).__name__}"
        )
    return move(first), len(first)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and attention without the fused path that hides the products; all restored."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in training.items():
            module.training = was


_Rows = tuple[int, int]
_ATTENTION = inspect.signature(F.multi_head_attention_forward)


class _Enough(BaseException):
    """Ends a call whose rest is not needed."""


class _Watch(TorchFunctionMode):
    """Sees every linear, convolution and addmm, and adds up what the weights it watches get as inputs.

    Squares [G, K] in float64, or with `products` all products [G, K, K]. After `stop_at` uses it ends the call.
    """

    def __init__(self, weights: Sequence[PrunableWeight], products: bool = False) -> None:
        super().__init__()
        self.products, self.stop_at = products, -1
        self.uses: Counter[str] = Counter()
        self.by_storage: dict[int, list[PrunableWeight]] = {}
        for weight in weights:
            self.by_storage.setdefault(weight.parameter.untyped_storage().data_ptr(), []).append(weight)
        self.sums: dict[str, dict[_Rows, Tensor]] = {weight.name: {} for weight in weights}
        self.counts: dict[str, dict[_Rows, int]] = {weight.name: {} for weight in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self._linear(*_named(("input", "weight"), args, kwargs))
        elif func is torch.addmm:
            _, x, matrix = _named(("input", "mat1", "mat2"), args, kwargs)
            self._linear(x, matrix)
        elif func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self._conv(*_named(names, args, kwargs))
        elif func is F.multi_head_attention_forward:  # its products are not seen one by one
            self._attention(_ATTENTION.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _find(self, tensor: Tensor) -> tuple[PrunableWeight, _Rows] | None:
        """The watched weight that a tensor is, or whose rows it is a block of (q, k, v of a fused weight)."""
        for weight in self.by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            offset = int(tensor.storage_offset()) - int(weight.parameter.storage_offset())
            rows, columns = weight.shape
            if offset == 0 and tensor.shape == weight.parameter.shape:
                return weight, (0, rows)
            start, rest = divmod(offset, columns)
            fits = rest == 0 and tensor.ndim == 2 and tensor.shape[1] == columns
            if fits and weight.kind == "linear" and 0 <= start <= rows - tensor.shape[0]:
                return weight, (start, start + tensor.shape[0])
        return None

    def _linear(self, x: Any, matrix: Any) -> None:
        found = self._find(matrix) if isinstance(matrix, Tensor) else None
        if found is not None:
            flat = x.detach().reshape(-1, x.shape[-1])
            self._add(*found, self._sum(flat)[None], len(flat))

    def _sum(self, flat: Tensor) -> Tensor:
        """The sum over rows [T, K] of the squares, or of all products."""
        if not self.products:
            return flat.float().square().sum(0, dtype=torch.float64)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        return flat.t() @ flat

    def _attention(self, call: dict[str, Any]) -> None:
        inputs = [call[name] for name in ("query", "key", "value")]
        fused, out = call["in_proj_weight"], call["out_proj_weight"]
        if call.get("use_separate_proj_weight"):
            parts = [call[f"{name}_proj_weight"] for name in "qkv"]
        else:
            parts = list(fused.chunk(3))
        if fused is not None and inputs[0] is inputs[1] is inputs[2]:
            inputs, parts = inputs[:1], [fused]
        for x, part in zip(inputs, parts, strict=True):
            self._linear(x, part)
        if self._find(out) is not None:  # the input of out_proj is what comes out with an identity in its place
            identity = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
            plain = {**call, "out_proj_weight": identity, "out_proj_bias": None, "need_weights": False}
            self._linear(F.multi_head_attention_forward(**plain)[0], out)

    def _conv(self, x: Any, kernel: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> None:
        found = self._find(kernel) if isinstance(kernel, Tensor) else None
        if found is None:
            return
        stride, dilation = _pair(stride or 1), _pair(dilation or 1)
        height, width = kernel.shape[2:]
        if padding == "same":
            spare = [step * (size - 1) for step, size in zip(dilation, (height, width), strict=True)]
            pad = [spare[1] // 2, spare[1] - spare[1] // 2, spare[0] // 2, spare[0] - spare[0] // 2]
        else:
            down, right = (0, 0) if padding in ("valid", None) else _pair(padding)
            pad = [right, right, down, down]
        padded = F.pad((x if x.ndim == 4 else x[None]).detach(), pad)
        if self.products:
            columns = F.unfold(padded, (height, width), dilation, 0, stride).transpose(1, 2)
            parts = columns.reshape(-1, columns.shape[-1]).tensor_split(groups or 1, dim=1)
            self._add(*found, torch.stack([self._sum(part) for part in parts]), len(parts[0]))
            return
        squares = padded.float().square()
        steps = [(squares.shape[2 + i] - dilation[i] * (kernel.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
        sums = torch.zeros(squares.shape[1], height, width, dtype=torch.float64, device=x.device)
        for i in range(height):
            for j in range(width):
                window = squares[:, :, i * dilation[0] :: stride[0], j * dilation[1] :: stride[1]]
                sums[:, i, j] = window[:, :, : steps[0], : steps[1]].sum((0, 2, 3), dtype=torch.float64)
        weight, rows = found
        self._add(weight, rows, sums.reshape(groups or 1, -1), len(squares) * steps[0] * steps[1])

    def _add(self, weight: PrunableWeight, rows: _Rows, sums: Tensor, count: int) -> None:
        name = weight.name
        earlier = self.sums[name].get(rows)
        self.sums[name][rows] = sums if earlier is None else earlier.add_(sums)
        self.counts[name][rows] = self.counts[name].get(rows, 0) + count
        self.uses[name] += 1
        if self.uses[name] == self.stop_at:
            raise _Enough

    def moment(self, weight: PrunableWeight) -> Tensor:
        """[G, K] or [G, K, K]: one entry for each block of the weight's rows that saw inputs of its own."""
        sums, counts = self.sums[weight.name], self.counts[weight.name]
        starts = sorted({edge for rows in sums for edge in rows})
        if starts[:1] != [0] or starts[-1] != weight.shape[0]:
            raise ValueError(
                f"calibration: no image reached {weight.name}; add it to ignore=, or use a method without calibration"
            )
        block = min(stop - start for start, stop in pairwise(starts))
        moments = []
        for at in range(0, weight.shape[0], block):
            seen = [rows for rows in sums if rows[0] <= at < rows[1]]
            moments.append(torch.stack([sums[rows] for rows in seen]).sum(0) / sum(counts[rows] for rows in seen))
        moment = torch.cat(moments) if len(moments) > 1 else moments[0]
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(
                f"calibration: the inputs of {weight.name} have NaN or Inf; check the images and the model"
            )
        return moment


def _named(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
