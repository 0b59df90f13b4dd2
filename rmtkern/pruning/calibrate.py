"""Second moments of the inputs of weights over calibration images, summed online, no activation kept.

For all weights in one pass of the model as it is, or for one weight of a stage with all products of its inputs. It
watches the calls that use a weight rather than modules, so that weights used by functions count too.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.errors import NoGradientsError, PackedModelError
from rmtkern.models import PrunableWeight
from rmtkern.progress import progress
from rmtkern.pruning.stages import Call, Stage
from rmtkern.ranks import Ranks

__all__ = [
    "LABELS", "Moments", "all_tensors", "calibrate", "check_batches", "checked", "evaluating", "forward_passes",
    "output_gradients", "second_moment", "second_moments", "tensors_of", "weights_in_order",
]  # fmt: skip

LABELS = ("labels", "label")
"""The keys of a mapping under which a batch has its labels, which the model does not get."""

_BATCH, _BATCH_ENTRIES = 32, 8 * 3 * 224 * 224  # at most; what a block computes of one batch should fit beside a model
_GRADIENT_BATCH, _GRADIENT_IMAGES = 2, 128  # a backward pass holds all activations


@dataclass
class Moments:
    """Second moments of the inputs of some weights.

    Args:
        features: weight name -> [G, K] float64, E x_k^2 >= 0; G > 1 where blocks of rows see different inputs
            (groups of a convolution, q against k and v of a cross-attention).
        images: how many images were seen.
        inputs: weight name -> how many inputs x were seen, at least, by each row.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0
    inputs: dict[str, int] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    images: Tensor | Iterable[Any],
    *,
    show_progress: bool | None = None,
) -> Moments:
    """Measure the second moments of the inputs of `weights` over some images.

    The model runs in eval mode without gradients and is left as it was, mode of every module included. Of several
    processes of torch.distributed each sees its part, and all get the moments over all of them.

    Args:
        model: takes one batch of images as its first argument.
        weights: from models.prunable_weights(model, ...).
        images: [B, C, H, W] tensor, a pair (images, labels), or an iterable (a loader) of batches: tensors, mappings of
            keyword arguments, or tuples whose first item is one of these. Labels, in a mapping those of LABELS, are not
            used.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        [G, K] for every weight.

    Raises:
        TypeError: a batch of another type.
        ValueError: no image, images that the model does not take, inputs with NaN or Inf, or a weight that no image
            reached.
    """
    watch, ranks = _Watch(weights), Ranks.current()
    seen = 0
    with evaluating(model):
        for run, count in progress(forward_passes(model, images, ranks=ranks), "calibrate", show=show_progress):
            with watch:
                run()
            seen += count
    features = {weight.name: watch.moment(weight, ranks) for weight in weights}
    return Moments(features, int(ranks.total([seen])[0]), watch.inputs(weights, ranks))


def forward_passes(
    model: nn.Module, images: Tensor | Iterable[Any], size: int | None = None, *, ranks: Ranks | None = None
) -> Iterator[tuple[Callable[[], Any], int]]:
    """For each batch of calibration images: the model applied to it, as a function to call, and the number of images.

    Args:
        model: takes one batch of images as its first argument.
        images: as for `calibrate`; a loader is read batch by batch.
        size: images in a batch, if they are one tensor; None: 32, or fewer large ones (8 of 3 x 224 x 224).
        ranks: of one tensor, or a pair, each takes its own part; a loader must do that itself (DistributedSampler).
            None: one process.

    Raises:
        TypeError: a batch of another type.
        ValueError: no image in all; what is yielded raises it where the model does not take the batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    run, seen = checked(model), 0
    for batch in _batches(images, size, ranks or Ranks()):
        call, count = _inputs(batch, device, dtype)
        if count:
            yield partial(run, **call) if isinstance(call, dict) else partial(run, call), count
        seen += count
    if seen == 0:
        raise ValueError("calibration: expected at least one image, got none")


_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What models raise for inputs that they do not take."""


def checked(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model as a function that says what the batch was where the model does not take it.

    Raises:
        ValueError: from it, instead of what a model raises for inputs of another shape, dtype or name.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return model(*args, **kwargs)
        except (PackedModelError, NotImplementedError, torch.OutOfMemoryError):  # RuntimeErrors, but not of the batch
            raise
        except _REFUSALS as error:
            parts = [*(("", value) for value in args), *kwargs.items()]
            batch = ", ".join(f"{name} {_shape(value)}".strip() for name, value in parts)
            raise ValueError(
                f"calibration: the model does not take a batch of {batch} ({type(error).__name__}: {error}); pass "
                "images as the model is called with them, [B, C, H, W] of floating point, or mappings of its keyword "
                "arguments"
            ) from error

    return run


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def weights_in_order(stage: Stage, call: Call) -> list[tuple[PrunableWeight, int]]:
    """The weights of a stage in the order in which a call first uses them, and how often each is used.

    Raises:
        ValueError: a weight that the call does not use.
    """
    watch = _Watch(stage.weights)
    with watch:
        stage.module(*call.args, **call.kwargs)
    for weight in stage.weights:
        watch.starts(weight)  # refuses a weight that was not used, or only in part
    by_name = {weight.name: weight for weight in stage.weights}
    return [(by_name[name], uses) for name, uses in watch.uses.items()]


def second_moment(
    stage: Stage, weight: PrunableWeight, uses: int, calls: Iterable[Call], *, constant: bool = False
) -> Tensor:
    """E x xᵀ over the inputs x of a weight, on all ranks, [G, K, K], in float32, or float64 for a float64 model.

    Args:
        stage: owns the weight; each call runs until it has used the weight `uses` times.
        weight: one of the stage's.
        uses: from `weights_in_order`.
        calls: one for each batch.
        constant: give x a last entry that is always 1, as a bias sees it: K is one more, and the last row holds E x.

    Returns:
        [G, K, K], symmetric; G > 1 where blocks of rows see different inputs.

    Raises:
        ValueError: inputs with NaN or Inf.
    """
    watch = _Watch([weight], products=True, constant=constant)
    for call in calls:
        watch.stop_at = watch.uses[weight.name] + uses
        try:
            with watch:
                stage.module(*call.args, **call.kwargs)
        except _Enough:
            pass
    return watch.moment(weight, Ranks.current())


def second_moments(
    stage: Stage, calls: Iterable[Call], *, enough: float = math.inf
) -> tuple[dict[str, Tensor], list[Any]]:
    """`second_moment` of every weight of a stage, by name, in one run of each call, while none of them changes.

    Args:
        stage: owns the weights.
        calls: one for each batch.
        enough: no more calls once every weight has seen so many inputs x for each entry of x; of several ranks each
            sees its share of them.

    Returns:
        The moments, and what the stage returned for each call that was made.

    Raises:
        ValueError: inputs with NaN or Inf, or a weight that no call uses.
    """
    watch, outputs, ranks = _Watch(stage.weights, products=True), [], Ranks.current()
    for call in calls:
        with watch:
            outputs.append(stage.module(*call.args, **call.kwargs))
        if all(watch.seen(weight) * ranks.world >= enough * weight.shape[1] for weight in stage.weights):
            break
    return {weight.name: watch.moment(weight, ranks) for weight in stage.weights}, outputs


def output_gradients(model: nn.Module, weights: Sequence[PrunableWeight], images: Tensor | Iterable[Any]) -> Moments:
    """How strongly the model's outputs depend on each output of each weight, over at most about 128 images.

    For output n of a weight: the sum over its places (tokens) of the squared gradient of u . y, where y are all outputs
    of the model and u independent random signs, so that in the mean over u it is |dy / dz|^2. No .grad is touched.

    Args:
        model: differentiable from the weights' outputs to its own; frozen parameters do not matter.
        weights: of the model.
        images: as for `calibrate`.

    Returns:
        [1, N] for every weight, a mean over the images, and how many there were of these and of inputs.

    Raises:
        TypeError: a batch of another type.
        NoGradientsError: the outputs have no gradients, or the model cannot run backward.
        ValueError: no image, a gradient that is NaN or Inf, or a weight that no image reached.

    Source: Hutchinson 1990, the squared Frobenius norm of a Jacobian from random signs.
    """
    watch, seen, ranks = _Outputs(weights), 0, Ranks.current()
    generator = torch.Generator().manual_seed(ranks.rank)
    with evaluating(model):
        for run, count in forward_passes(model, images, _GRADIENT_BATCH, ranks=ranks):
            with torch.enable_grad():
                with watch:
                    found = run()
                watch.add([one for one in tensors_of(found) if one.requires_grad], generator)
            seen += count
            if seen * ranks.world >= _GRADIENT_IMAGES:
                break
    seen = int(ranks.total([seen])[0])
    energies = {weight.name: watch.energy(weight, ranks)[None] / seen for weight in weights}
    return Moments(energies, seen, watch.inputs(weights, ranks))


def all_tensors(found: Any) -> list[Tensor]:
    """The tensors in what a module takes or returns: itself, or in mappings, tuples and lists."""
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else ()
    return [tensor for part in parts for tensor in all_tensors(part)]


def tensors_of(found: Any) -> list[Tensor]:
    """Those of a floating dtype among all_tensors."""
    return [tensor for tensor in all_tensors(found) if tensor.is_floating_point()]


def check_batches(images: Any) -> None:
    """Refuse what holds no batches of images; TypeError."""
    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
        raise TypeError(f"calibration: expected a tensor or an iterable of batches, got {type(images).__name__}")


def _batches(images: Tensor | Iterable[Any], size: int | None, ranks: Ranks) -> Iterator[Any]:
    if isinstance(images, tuple) and len(images) == 2 and isinstance(images[0], Tensor) and images[0].ndim > 1:
        labels = images[1]
        if not isinstance(labels, Tensor) or labels.ndim <= 1:
            images = images[0]
    if isinstance(images, Tensor):
        if 0 < len(images) < ranks.world:
            raise ValueError(f"calibration: expected at least one image for each process, got {len(images)}")
        images = images[ranks.rank :: ranks.world]
        entries = max(1, images[:1].numel())
        return iter(images.split(size or max(1, min(_BATCH, _BATCH_ENTRIES // entries))))
    check_batches(images)
    return iter(images)


def _inputs(batch: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | dict[str, Any], int]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Mapping):
        call = {name: move(value) for name, value in first.items() if name not in LABELS}
        return call, max([len(value) for value in call.values() if isinstance(value, Tensor) and value.ndim], default=0)
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise TypeError(
            "calibration: expected batches that are tensors of images, (images, labels) or mappings, "
            f"got {type(batch).__name__}" + (f" of {type(first).__name__}" if first is not batch else "")
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

    def __init__(self, weights: Sequence[PrunableWeight], products: bool = False, *, constant: bool = False) -> None:
        super().__init__()
        self.products, self.constant, self.stop_at = products, constant, -1
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
        if self.constant:
            flat = F.pad(flat, (0, 1), value=1.0)
        return _gram(flat)

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

    def seen(self, weight: PrunableWeight) -> int:
        """How many inputs the rows of the weight that have seen the fewest have seen."""
        return min(self.counts[weight.name].values(), default=0)

    def inputs(self, weights: Sequence[PrunableWeight], ranks: Ranks) -> dict[str, int]:
        """`seen` of each, on all ranks together, by name."""
        counts = ranks.total([self.seen(weight) for weight in weights])
        return {weight.name: int(count) for weight, count in zip(weights, counts, strict=True)}

    def starts(self, weight: PrunableWeight) -> list[int]:
        """Where blocks of the weight's rows begin and end that saw inputs of their own; refuses rows that saw none."""
        starts = sorted({edge for rows in self.sums[weight.name] for edge in rows})
        if starts[:1] != [0] or starts[-1] != weight.shape[0]:
            raise ValueError(
                f"calibration: no image reached {weight.name}; add it to ignore=, or use a method without calibration"
            )
        return starts

    def moment(self, weight: PrunableWeight, ranks: Ranks) -> Tensor:
        """[G, K] or [G, K, K] over all ranks: one entry for each block of rows that saw inputs of its own."""
        sums, counts = self.sums[weight.name], self.counts[weight.name]
        block = min(stop - start for start, stop in pairwise(self.starts(weight)))
        moments = []
        for at in range(0, weight.shape[0], block):
            seen = [rows for rows in sums if rows[0] <= at < rows[1]]
            total = ranks.sum(reduce(torch.add, (sums[rows] for rows in seen)))
            moments.append(total / ranks.total([sum(counts[rows] for rows in seen)])[0])
        moment = torch.cat(moments) if len(moments) > 1 else moments[0]
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(
                f"calibration: the inputs of {weight.name} have NaN or Inf; check the images and the model"
            )
        return moment


class _Outputs(_Watch):
    """Keeps the output of every use of a weight, and adds up what a backward pass brings there."""

    def __init__(self, weights: Sequence[PrunableWeight]) -> None:
        super().__init__(weights)
        self.outputs: list[tuple[PrunableWeight, _Rows, int, Tensor]] = []
        self.energies: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func is F.conv2d:
            matrix = _named(("input", "weight"), args, kwargs)[1]
            return self._keep(matrix, 1 if func is F.conv2d else -1, func(*args, **kwargs))
        if func is torch.addmm:
            return self._keep(_named(("input", "mat1", "mat2"), args, kwargs)[2], -1, func(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            return self._attend(_ATTENTION.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _keep(self, matrix: Any, axis: int, y: Tensor) -> Tensor:
        found = self._find(matrix) if isinstance(matrix, Tensor) else None
        if found is None:
            return y
        if not y.requires_grad:  # nothing before it has a gradient
            y.requires_grad_()
        axis = axis if axis < 0 else y.ndim - 3  # channels of [B, C, H, W], or of [C, H, W]
        self.outputs.append((*found, axis, y))
        counts = self.counts[found[0].name]
        counts[found[1]] = counts.get(found[1], 0) + y.numel() // max(y.shape[axis], 1)
        return y.clone()  # which may be overwritten

    def _attend(self, call: dict[str, Any]) -> Any:
        """The same attention, with its projections done before it where their outputs can be seen."""
        if call.get("use_separate_proj_weight"):
            matrices = [call[f"{name}_proj_weight"] for name in "qkv"]
        else:
            matrices = list(call["in_proj_weight"].chunk(3))
        bias = call["in_proj_bias"]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        inputs = [call[name] for name in ("query", "key", "value")]
        q, k, v = (self._keep(matrix, -1, F.linear(x, matrix, one))
                   for x, matrix, one in zip(inputs, matrices, biases, strict=True))  # fmt: skip
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).repeat(3, 1)
        y, attention = F.multi_head_attention_forward(
            **{**call, "query": q, "key": k, "value": v, "in_proj_weight": identity, "in_proj_bias": None,
               "use_separate_proj_weight": False}
        )  # fmt: skip
        return self._keep(call["out_proj_weight"], -1, y), attention

    def add(self, found: list[Tensor], generator: torch.Generator) -> None:
        """Run the backward pass from the model's outputs and let go of what was kept."""
        outputs, self.outputs = self.outputs, []
        if not outputs:
            return
        if not found:
            raise NoGradientsError(
                "calibration: expected a model whose outputs have gradients, got none (does it run under no_grad?); "
                "take budget='uniform'"
            )
        signs = [torch.randint(0, 2, one.shape, generator=generator).to(one) * 2 - 1 for one in found]
        try:
            gradients = torch.autograd.grad(found, [y for *_, y in outputs], signs, allow_unused=True)
        except RuntimeError as error:  # an operator without a derivative, a value that was overwritten
            raise NoGradientsError(
                f"calibration: the model cannot run backward ({error}); take budget='uniform'"
            ) from error
        for (weight, rows, axis, y), gradient in zip(outputs, gradients, strict=True):
            total = self.energies.setdefault(weight.name, torch.zeros(weight.shape[0], dtype=torch.float64))
            self.uses[weight.name] += 1
            if gradient is not None:
                places = [i for i in range(y.ndim) if i != axis % y.ndim]
                total[slice(*rows)] += gradient.double().square().sum(places).cpu()

    def energy(self, weight: PrunableWeight, ranks: Ranks) -> Tensor:
        """[N] float64, the sum over all ranks."""
        if not self.uses[weight.name]:
            raise ValueError(
                f"calibration: no image reached {weight.name}; add it to ignore=, or use a method without calibration"
            )
        energy = ranks.sum(self.energies[weight.name])
        if not bool(torch.isfinite(energy).all()):
            raise ValueError(
                f"calibration: the gradients at {weight.name} have NaN or Inf; check the images and the model, or take "
                "budget='uniform'"
            )
        return energy


_SPLIT = 512


def _gram(flat: Tensor) -> Tensor:
    """flatᵀ flat [K, K] of a tall [T, K]; of a wide one half above the diagonal is computed and half copied."""
    k = flat.shape[1]
    if k < 2 * _SPLIT:
        return flat.t() @ flat
    products = flat.new_empty(k, k)
    for first in range(0, k, _SPLIT):
        part, rest = slice(first, first + _SPLIT), slice(first + _SPLIT, k)
        products[part, first:] = flat[:, part].t() @ flat[:, first:]
        products[rest, part] = products[part, rest].t()
    return products


def _named(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
