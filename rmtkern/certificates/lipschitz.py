"""What follows a weight: a Lipschitz bound from its output to the logits, and whether a LayerNorm feeds it.

It follows tensors through one forward pass; it knows no pruning, and what it does not recognise has no bound.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Path", "named", "tensors", "trace"]


@dataclass
class Path:
    """How a weight's output reaches the logits.

    Args:
        lipschitz: l_inf -> l_inf Lipschitz bound of everything after the weight's output, for every input; inf: none
            known (softmax attention and LayerNorm have none worth stating).
        norm: (gain [K] or None, bias [K] or None) of the LayerNorm whose output is the weight's input.
        calls: how often the weight was used.
    """

    lipschitz: float = math.inf
    norm: "_Norm | None" = None
    calls: int = 0


_Norm = tuple[Tensor | None, Tensor | None]
_Slopes = dict[str, float]
"""Weight name -> Lipschitz bound from its output to some tensor; weights that do not reach it are left out."""

_SAME = (
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "unsqueeze", "squeeze",
    "__getitem__", "to", "float", "double", "clone", "detach", "expand", "chunk", "split", "unbind", "select", "narrow",
    "roll", "t", "swapaxes", "movedim", "index_select", "repeat", "__neg__", "neg",
)  # fmt: skip
_CONTRACTIONS = (
    "relu", "relu_", "relu6", "hardtanh", "tanh", "sigmoid", "hardsigmoid", "logsigmoid", "softplus", "clamp", "abs",
    "max_pool2d", "_max_pool2d", "adaptive_avg_pool2d", "mean", "amax", "amin", "softshrink", "tanhshrink",
)  # fmt: skip
_STEEPER = {"gelu": 1.1291, "silu": 1.0999, "mish": 1.0885, "hardswish": 1.5}
"""Largest slopes, rounded up; gelu covers the tanh form."""
_QUESTIONS = (
    "__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "is_complex", "get_device",
    "__len__", "element_size", "type", "ndimension", "nelement", "has_names",
)  # fmt: skip
"""What a model may ask of a tensor without its values deciding anything."""
_INPUT = ""
"""The name under which what depends on the images is carried: no factor that does is a constant."""


class _Trace(TorchFunctionMode):
    """Carries a Lipschitz bound from the output of every watched weight along every tensor that depends on it."""

    def __init__(self, names: Mapping[int, str], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.names = names
        self.paths: dict[str, Path] = {}
        self.lost: set[str] = set()  # weights whose output went somewhere that is not followed
        self.kept = list(inputs)  # a tensor that dies would lend its id to another
        self.slopes: dict[int, _Slopes] = {id(x): {_INPUT: 1.0} for x in self.kept}
        self.norms: dict[int, _Norm] = {}

    def of(self, value: Any) -> _Slopes:
        return self.slopes.get(id(value), {}) if isinstance(value, Tensor) else {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        before = {name for value in given for name in self.of(value)}
        out = func(*args, **kwargs)
        results = list(tensors(out))
        name = getattr(func, "__name__", "")
        if not results:
            if name not in _QUESTIONS:
                self.lost |= before
                self.norms.clear()
            return out
        plain = name in _SAME or name in _CONTRACTIONS or func in _RULES
        if name not in (*_SAME, "dropout") and any(result is value for result in results for value in given):
            self.norms.clear()  # in place: others may look at the same memory
            if not plain:
                self.lost |= self._overwritten(name, results[0], before)
        slopes = self._after(func, args, kwargs, results[0]) if before else {}
        own = self._own(func, args, kwargs)
        if own is not None:
            slopes = {**slopes, own: 1.0}
        for result in results:
            self.kept.append(result)
            self.slopes[id(result)] = slopes
            if given and id(given[0]) in self.norms and _keeps_rows(name, given[0], result, kwargs):
                self.norms[id(result)] = self.norms[id(given[0])]
            else:
                self.norms.pop(id(result), None)
        if func is F.layer_norm:
            _, shape, gain, bias = named(("input", "normalized_shape", "weight", "bias"), args, kwargs)
            if len(shape) == 1 and not self.of(gain) and not self.of(bias):
                self.norms[id(out)] = (gain, bias)
        return out

    def _overwritten(self, name: str, result: Tensor, before: set[str]) -> set[str]:
        """The weights whose bound is lost when a tensor changes in place."""
        memory = result.untyped_storage().data_ptr()
        seen = any(x is not result and x.untyped_storage().data_ptr() == memory for x in self.kept)
        return before if seen or name not in ("__iadd__", "add_") else set()

    def _own(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """The watched weight that a call uses, if it is a plain product with it."""
        for value in tensors((args, kwargs)):
            name = self.names.get(id(value))
            if name is None:
                continue
            path = self.paths.setdefault(name, Path())
            path.calls += 1
            place = _product(func, args, kwargs)
            if place is None or place[1] is not value:
                path.calls += 1  # used in a way that is not followed: as good as used twice
                continue
            path.norm = self.norms.get(id(place[0])) if func is not F.conv2d else None
            return name
        return None

    def _after(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> _Slopes:
        name = getattr(func, "__name__", "")
        tracked = [self.of(value) for value in tensors((args, kwargs)) if self.of(value)]
        unknown = {weight: math.inf for slopes in tracked for weight in slopes}
        product = _product(func, args, kwargs)
        if product is not None:
            source, matrix, bias = product
            if self.of(matrix) or self.of(bias):
                return unknown
            return _scaled(self.of(source), _gain(matrix, transposed=func is torch.addmm))
        if func in _RULES:
            return _RULES[func](self, args, kwargs, unknown)
        if name in ("add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__"):
            return _sum([_scaled(slopes, max(1.0, abs(kwargs.get("alpha", 1)))) for slopes in tracked])
        if (
            name in ("mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide")
            and len(tracked) == 1
            and not kwargs
        ):
            return _scaled(tracked[0], _factor(name, args, self)) if len(args) == 2 else unknown
        if name in ("cat", "concat", "stack"):
            return _largest(tracked)
        x: Any = args[0] if args else None
        if len(tracked) != 1 or not self.of(x) or not out.is_floating_point() or _bits(out) < _bits(x):
            return unknown
        if name in _SAME or name in _CONTRACTIONS:
            return tracked[0]
        if name == "sum":
            return _scaled(tracked[0], x.numel() / max(out.numel(), 1))
        return _scaled(tracked[0], _STEEPER[name]) if name in _STEEPER else unknown


def _dropout(trace: _Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any], unknown: _Slopes) -> _Slopes:
    x, p, training = named(("input", "p", "training"), args, kwargs)
    return unknown if training or (training is None and p != 0) else trace.of(x)


def _leaky(trace: _Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any], unknown: _Slopes) -> _Slopes:
    x, slope = named(("input", "slope"), args, {**kwargs, "slope": kwargs.get("negative_slope", kwargs.get("alpha"))})
    return _scaled(trace.of(x), max(1.0, abs(1.0 if slope is None else slope)))


def _batch_norm(trace: _Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any], unknown: _Slopes) -> _Slopes:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, _, variance, gain, _, training, _, eps = named(names, args, kwargs)
    if training or variance is None:
        return unknown
    scale = (variance.double() + (1e-5 if eps is None else eps)).rsqrt()
    return _scaled(trace.of(x), float((scale if gain is None else scale * gain.double().abs()).max()))


def _average(trace: _Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any], unknown: _Slopes) -> _Slopes:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    x, *_, divisor = named(names, args, kwargs)
    return unknown if divisor is not None else trace.of(x)


_Rule = Callable[[_Trace, tuple[Any, ...], Mapping[str, Any], _Slopes], _Slopes]
_RULES: dict[Any, _Rule] = {
    F.dropout: _dropout,
    F.leaky_relu: _leaky,
    F.elu: _leaky,
    F.batch_norm: _batch_norm,
    F.avg_pool2d: _average,
}


def _keeps_rows(name: str, x: Tensor, out: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether the last dimension of `out` holds rows of `x`, whole, or means of such rows (a bound is convex)."""
    if out.ndim == 0 or out.shape[-1] != x.shape[-1]:
        return False
    if name == "dropout":
        return not kwargs.get("training", True) or torch.equal(out, x)
    if name == "mean":
        return x.ndim == 3 and out.ndim == 2 and x.shape[1] != x.shape[2]
    if name not in _SAME or x.stride(-1) != 1 or out.stride(-1) != 1:
        return False
    same = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return same and x.is_contiguous() and int(out.storage_offset() - x.storage_offset()) % x.shape[-1] == 0


def _factor(name: str, args: tuple[Any, ...], trace: _Trace) -> float:
    """Largest factor of a product or quotient of which one side is tracked."""
    left, right = args
    other = right if trace.of(left) else left
    size = float(other.detach().abs().max()) if isinstance(other, Tensor) else abs(float(other))
    if name in ("mul", "__mul__", "__rmul__"):
        return size
    if not trace.of(left):
        return math.inf  # a constant over x
    least = float(other.detach().abs().min()) if isinstance(other, Tensor) else size
    return 1 / least if least else math.inf


def _product(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    """(input, weight, bias) of a linear layer, convolution or addmm."""
    if func in (F.linear, F.conv2d):
        x, weight, bias = named(("input", "weight", "bias"), args, kwargs)
        return x, weight, bias
    if func is torch.addmm and not {"beta", "alpha"} & set(kwargs):
        bias, x, weight = named(("input", "mat1", "mat2"), args, kwargs)
        return x, weight, bias
    return None


def _gain(matrix: Tensor, transposed: bool) -> float:
    """||W||_inf, the largest row sum of |W|."""
    values = matrix.detach().double().abs()
    return float((values.sum(0) if transposed else values.flatten(1).sum(1)).max())


def _scaled(slopes: _Slopes, factor: float) -> _Slopes:
    return {name: slope * factor if slope and factor else 0.0 for name, slope in slopes.items()}


def _sum(all_: Iterable[_Slopes]) -> _Slopes:
    total: _Slopes = {}
    for slopes in all_:
        for name, slope in slopes.items():
            total[name] = total.get(name, 0.0) + slope
    return total


def _largest(all_: Iterable[_Slopes]) -> _Slopes:
    most: _Slopes = {}
    for slopes in all_:
        for name, slope in slopes.items():
            most[name] = max(most.get(name, 0.0), slope)
    return most


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def _bits(x: Any) -> int:
    return torch.finfo(x.dtype).bits


def named(names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments of a call by name, None where not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


@torch.no_grad()
def trace(weights: Mapping[str, Tensor], inputs: Iterable[Tensor], run: Callable[[], Tensor]) -> dict[str, Path]:
    """Follow one forward pass.

    Args:
        weights: name -> the parameter as the model uses it.
        inputs: what depends on the image; a factor that does is no constant.
        run: runs the model in eval mode on one image and returns its logits.

    Returns:
        Name -> Path for the weights that were used, in the order of their first use.
    """
    watch = _Trace({id(parameter): name for name, parameter in weights.items()}, inputs)
    with watch:
        logits = run()
    for name, slope in watch.of(logits).items():
        if not {name, _INPUT} & watch.lost and name != _INPUT and watch.paths[name].calls == 1:
            watch.paths[name].lipschitz = slope
    return watch.paths
