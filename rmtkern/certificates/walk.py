"""From the dense weights to the pruned ones, one weight at a time, with a forward pass after each step.

It decides what is measured on which network; what follows from the numbers is for statements.py and report.py.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.certificates.inputs import InputWatch
from rmtkern.certificates.lipschitz import Path, tensors, trace
from rmtkern.certificates.statements import spread, top_gap, true_margin
from rmtkern.evaluation import logits_of
from rmtkern.models import PrunableWeight, prunable_weights

__all__ = ["OTHER", "Seen", "Step", "Walk", "join", "unfused"]

OTHER = "(other parameters)"
"""Name of the last step: whatever differs besides the prunable weights, such as biases and norms."""


@dataclass(eq=False)
class Step:
    """One weight that differs between the two models; `weight` is None for the step OTHER.

    Args:
        name: of the parameter.
        weight: of the private copy.
        dense: its values before, in the shape of the parameter.
        pruned: the same after.
        path: how its output reaches the logits in the dense model.
    """

    name: str
    weight: PrunableWeight | None = None
    dense: Tensor | None = None
    pruned: Tensor | None = None
    path: Path = field(default_factory=Path)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(dense, pruned) as float64 [N, K]."""
        if self.weight is None or self.dense is None or self.pruned is None:
            raise TypeError(f"{self.name} is no matrix")
        both = [
            replace(self.weight, parameter=nn.Parameter(value, requires_grad=False)).as_matrix().double()
            for value in (self.dense, self.pruned)
        ]
        return both[0], both[1]


@dataclass
class Seen:
    """Measured numbers, float64: [S] for each image, [M, S] for each step and image; NaN where nothing was seen.

    Args:
        eta: ||dz||_inf of each step. spread: osc(dz) of each step.
        change: ||R psi||_inf of each step's weight. sup: ||psi||_inf. two: ||psi||_2.
        local: largest sum_j |dz_k / dh_j| in the dense model, if asked.
        rest_eta: ||dz||_inf from the dense model to the pruned one with this step's weight restored, if asked.
        total_eta: ||dz||_inf from end to end. total_spread: osc(dz). gap: top-2 gap of the dense logits.
        kept: whether the predicted label stayed, bool.
        margin: true margin of the dense logits. loss: [2, S] cross-entropy, dense and pruned. right: [2, S]
            probability of the label. hit: [2, S] whether the label is predicted; these four only with labels.
    """

    eta: Tensor
    spread: Tensor
    change: Tensor
    sup: Tensor
    two: Tensor
    local: Tensor
    rest_eta: Tensor
    total_eta: Tensor
    total_spread: Tensor
    gap: Tensor
    kept: Tensor
    margin: Tensor
    loss: Tensor
    right: Tensor
    hit: Tensor


class Walk:
    """The two models as one private copy whose weights can be set; the models themselves are never touched.

    Args:
        structure: either model; its class and settings are copied.
        dense: name -> value of the dense parameters and buffers.
        pruned: the same of the pruned model.
        dtype: that both run in.

    Raises:
        ValueError: names or shapes differ, or nothing differs.
    """

    def __init__(
        self, structure: nn.Module, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> None:
        names = dict(structure.named_parameters())
        for which, state in (("dense", dense), ("pruned", pruned)):
            wrong = [name for name, value in names.items() if name not in state or state[name].shape != value.shape]
            if wrong:
                raise ValueError(
                    f"the {which} weights do not fit the other model: {', '.join(wrong[:3])}"
                    f"{', ...' if len(wrong) > 3 else ''} missing or of another shape; pass both copies of one model"
                )
            other = next((name for name, value in names.items() if state[name].dtype != value.dtype), None)
            if other is not None and dtype is None:
                raise ValueError(
                    f"{other} is {dense[other].dtype} in the dense model and {pruned[other].dtype} in the pruned one; "
                    "pass dtype=torch.float64 to compare them"
                )
        self.device = next((p.device for p in structure.parameters()), torch.device("cpu"))
        self.dtype = dtype
        memo: dict[int, Any] = {}
        for name, parameter in structure.named_parameters():
            memo[id(parameter)] = nn.Parameter(self._cast(dense[name]), requires_grad=False)
        for name, buffer in structure.named_buffers():
            memo[id(buffer)] = self._cast(dense.get(name, buffer)).clone()
        self.model = copy.deepcopy(structure, memo).eval()
        if dtype is not None:
            self.model.to(dtype)
        self.parameters = dict(self.model.named_parameters())
        self.buffers = dict(self.model.named_buffers())
        self.input_dtype = next((p.dtype for p in self.parameters.values() if p.is_floating_point()), torch.float32)
        weights = {weight.name: weight for weight in prunable_weights(self.model, "all")}
        differ = [name for name in names if not _same(dense[name], pruned[name])]
        self.steps = [
            Step(name, weights[name], self.parameters[name].data, self._cast(pruned[name]))
            for name in differ if name in weights
        ]  # fmt: skip
        self.rest = {
            name: (self._cast(dense[name]), self._cast(pruned[name])) for name in differ if name not in weights
        }
        self.rest |= {
            name: (buffer.clone(), self._cast(pruned[name]))
            for name, buffer in self.buffers.items()
            if name in pruned and not _same(dense.get(name, buffer), pruned[name])
        }
        if self.rest:
            self.steps.append(Step(OTHER))
        if not self.steps:
            raise ValueError("the two models have the same weights; pass the pruned model and the dense one")

    def _cast(self, value: Tensor) -> Tensor:
        value = value.detach().to(self.device)
        return value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value

    def set_(self, step: Step, pruned: bool) -> None:
        """Give one step's weight (or all other parameters) its dense or its pruned values."""
        if step.weight is not None:
            values = step.pruned if pruned else step.dense
            self.parameters[step.name].data = values if values is not None else self.parameters[step.name].data
            return
        for name, both in self.rest.items():
            if name in self.parameters:
                self.parameters[name].data = both[pruned]
            else:
                self.buffers[name].copy_(both[pruned])

    def changed(self, step: Step) -> list[tuple[str, Tensor, Tensor]]:
        """(name, dense, pruned) of every parameter that a step changes; buffers are no parameters."""
        if step.dense is not None and step.pruned is not None:
            return [(step.name, step.dense, step.pruned)]
        return [(name, *both) for name, both in self.rest.items() if name in self.parameters]

    def run(self, call: Any) -> Tensor:
        """Logits [B, C] of one batch; a mapping is passed as keyword arguments."""
        return logits_of(self.model(**call) if isinstance(call, Mapping) else self.model(call))

    def logits(self, call: Any) -> Tensor:
        """Logits as float64 on the CPU, checked."""
        with torch.no_grad():
            found = self.run(call).double().cpu()
        if found.shape[1] < 2:
            raise ValueError(f"expected logits of at least two classes, got {found.shape[1]}; certify a classifier")
        if not bool(torch.isfinite(found).all()):
            raise ValueError("the model returned NaN or Inf logits; check its weights and its input's scale")
        return found

    def sort_(self, call: Any) -> None:
        """Find every step's path on one image and put the steps in the order in which the model uses them."""
        named = {step.name: step.weight.parameter for step in self.steps if step.weight is not None}
        paths = trace(named, tensors(call), lambda: self.run(call))
        order = {name: index for index, name in enumerate(paths)}
        for step in self.steps:
            step.path = paths.get(step.name, Path())
        self.steps.sort(key=lambda step: (step.name == OTHER, order.get(step.name, len(order))))

    def measure(self, call: Any, count: int, labels: Tensor | None, *, restore: bool, local: bool) -> Seen:
        """All numbers of one batch: M + 1 forward passes, M more to restore, C backward passes for `local`."""
        shape = (len(self.steps), count)
        eta, spreads, change, sup, two, slopes, rest_eta = (torch.full(shape, torch.nan).double() for _ in range(7))
        for step in self.steps:
            self.set_(step, pruned=False)
        if local:
            for index, found in self._slopes(call, count).items():
                slopes[index] = found
        first = previous = torch.zeros(0)
        for index, step in enumerate(self.steps):
            watch = self._watch(step, count)
            with watch or nullcontext():
                logits = self.logits(call)
            if index == 0:
                first = logits
            else:
                eta[index - 1], spreads[index - 1] = (logits - previous).abs().amax(1), spread(logits - previous)
            if watch is not None and watch.change is not None:
                change[index], sup[index], two[index] = watch.change, watch.sup, watch.two
            previous = logits
            self.set_(step, pruned=True)
        last = self.logits(call)
        eta[-1], spreads[-1] = (last - previous).abs().amax(1), spread(last - previous)
        if restore:
            for index, step in enumerate(self.steps):
                self.set_(step, pruned=False)
                rest_eta[index] = (self.logits(call) - first).abs().amax(1)
                self.set_(step, pruned=True)
        seen = Seen(
            eta, spreads, change, sup, two, slopes, rest_eta,
            total_eta=(last - first).abs().amax(1), total_spread=spread(last - first), gap=top_gap(first),
            kept=first.argmax(1) == last.argmax(1), margin=torch.empty(0), loss=torch.empty(2, 0),
            right=torch.empty(2, 0), hit=torch.empty(2, 0, dtype=torch.bool),
        )  # fmt: skip
        if labels is not None:
            _add_labels(seen, first, last, labels)
        return seen

    def _watch(self, step: Step, count: int) -> InputWatch | None:
        if step.weight is None:
            return None
        dense, pruned = step.matrices()
        return InputWatch(step.weight, dense - pruned, count)

    def _slopes(self, call: Any, count: int) -> dict[int, Tensor]:
        """Largest over k of sum_j |dz_k / dh_j|, h the outputs of each weight in the dense model."""
        outputs = _Outputs({id(step.weight.parameter): i for i, step in enumerate(self.steps) if step.weight})
        with torch.enable_grad(), outputs:
            logits = self.run(call)
        found: dict[int, Tensor] = {}
        for k in range(logits.shape[1]):
            keep = k + 1 < logits.shape[1]
            heights = list(outputs.found.values())
            gradients = torch.autograd.grad(logits[:, k].sum(), heights, retain_graph=keep, allow_unused=True)
            for index, gradient in zip(outputs.found, gradients, strict=True):
                if gradient is not None and gradient.shape[0] % count == 0:
                    size = gradient.double().abs().reshape(count, -1).sum(1).cpu()
                    found[index] = torch.maximum(found[index], size) if index in found else size
        return found


class _Outputs(TorchFunctionMode):
    """Keeps the output of every plain product with a watched weight, as something to differentiate by."""

    def __init__(self, indices: Mapping[int, int]) -> None:
        super().__init__()
        self.indices = indices
        self.found: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d, torch.addmm):
            index = next((self.indices[id(x)] for x in tensors((args, kwargs)) if id(x) in self.indices), None)
            if index is not None:
                self.found[index] = out if out.requires_grad else out.detach().requires_grad_()
                return self.found[index].clone()  # what follows may write into it
        return out


def _add_labels(seen: Seen, first: Tensor, last: Tensor, labels: Tensor) -> None:
    labels = labels.long().cpu()
    if labels.shape != (len(first),) or int(labels.min()) < 0 or int(labels.max()) >= first.shape[1]:
        raise ValueError(
            f"labels: expected {len(first)} class numbers in 0..{first.shape[1] - 1}, got shape {tuple(labels.shape)} "
            f"with values {int(labels.min())}..{int(labels.max())}; number the classes as the model does"
        )
    seen.margin = true_margin(first, labels)
    both = torch.stack([first, last])
    seen.loss = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in both])
    seen.right = torch.exp(-seen.loss)
    seen.hit = both.argmax(2) == labels


def join(parts: Sequence[Seen]) -> Seen:
    """Batches of images side by side."""
    return Seen(**{name: torch.cat([getattr(part, name) for part in parts], -1) for name in parts[0].__dict__})


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach(), other.detach().to(one.device, one.dtype))


@contextmanager
def unfused() -> Iterator[None]:
    """Attention without the fused path that hides its products; restored afterwards."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
