"""Lets a linear normalise its rows itself where a LayerNorm feeds it alone, and takes that back.

It finds these by watching a forward pass, and proves that nobody else reads what the LayerNorm gives by running the
model with NaN there. pack.py decides who does it.
"""

from collections.abc import Container, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.activations import apply_activation
from rmtkern.examples import Example
from rmtkern.layer_norm import layer_norm
from rmtkern.mlp import normed_linear, reason_against
from rmtkern.nn import PackedLinear
from rmtkern.packing.norm import NormForward
from rmtkern.packing.outputs import deviation_of, outputs_on
from rmtkern.testing import excess_over

__all__ = ["LeavingForward", "NormedCall", "find_normed", "normed_calls"]

CHECKED = 64
"""Tokens of a call, evenly spread, that are compared with float64."""


class LeavingForward(NormForward):
    """Stands as a LayerNorm's `forward`: x as it is, where the linear after it normalises it; else as NormForward.

    Args:
        module: the LayerNorm.
        parent: the module that holds the linear.
        child: its name there.
    """

    def __init__(self, module: nn.LayerNorm, parent: nn.Module, child: str) -> None:
        super().__init__(module)
        self.parent, self.child = parent, child
        self.linear: PackedLinear | None = None

    def start(self) -> None:
        """Stand in the LayerNorm, and let the packed linear that stands there now take the rows."""
        self.release()
        super().start()
        linear = self.parent._modules[self.child]
        self.linear = linear if isinstance(linear, PackedLinear) else None
        if self.linear is not None:
            self.linear.norms = (self.module,)

    def stop(self) -> None:
        """Leave the LayerNorm and the linear as they were."""
        super().stop()
        self.release()

    def release(self) -> None:
        """Let the linear that took the rows so far take them no more."""
        if self.linear is not None:
            self.linear.norms = ()
        self.linear = None

    def __call__(self, x: Tensor) -> Tensor:
        """As the class says."""
        linear = self.linear
        if linear is not None and linear is self.parent._modules[self.child] and linear.takes(x):
            return x
        return super().__call__(x)


def find_normed(
    model: nn.Module,
    norms: Mapping[str, nn.LayerNorm],
    linears: Mapping[str, nn.Linear],
    examples: Sequence[Example],
    expected: Sequence[Sequence[Tensor]],
    tolerance: float,
) -> dict[str, str]:
    """The linears whose every input is what a LayerNorm gave, and that are the only ones to read it.

    Args:
        model: as it came.
        norms: name -> LayerNorm that our kernel can compute.
        linears: name -> linear that may be swapped and that nothing else reads.
        examples: what to call it with.
        expected: its outputs on them.
        tolerance: of outputs.

    Returns:
        Name of the LayerNorm -> of the linear; empty if the model computes something else with NaN where the
        LayerNorms' results were.
    """
    flow = _Flow()
    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.enter_context(_Hook(norm.register_forward_hook(flow.gave(name))))
        for name, linear in linears.items():
            stack.enter_context(_Hook(linear.register_forward_pre_hook(flow.got(name))))
        outputs_on(model, examples)
    found = flow.pairs()
    if not found:
        return {}
    poison = _Poison()
    with ExitStack() as stack:
        for name, linear_name in found.items():
            stack.enter_context(_Hook(norms[name].register_forward_hook(poison.gave(name))))
            stack.enter_context(_Hook(linears[linear_name].register_forward_pre_hook(poison.got(name))))
        try:
            same = deviation_of(outputs_on(model, examples), expected, tolerance) is None
        except (ValueError, TypeError):
            same = False
    return found if same else {}


class _Hook:
    """Removes a hook at the end."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        return

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


class _Flow:
    """Which linear took what a LayerNorm gave."""

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}  # what each LayerNorm gave last
        self.calls: dict[str, int] = {}
        self.takers: dict[str, list[str]] = {}
        self.sources: dict[str, list[str | None]] = {}

    def gave(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, y: Any) -> None:
            self.last[name] = y
            self.calls[name] = self.calls.get(name, 0) + 1

        return hook

    def got(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            source = next((norm for norm, y in self.last.items() if args and args[0] is y), None)
            self.sources.setdefault(name, []).append(source)
            if source is not None:
                self.takers.setdefault(source, []).append(name)

        return hook

    def pairs(self) -> dict[str, str]:
        found = {}
        for norm, takers in self.takers.items():
            linear = takers[0]
            if takers == [linear] * self.calls[norm] and self.sources[linear] == [norm] * self.calls[norm]:
                found[norm] = linear
        return found


class _Poison:
    """Gives everyone NaN in place of what a LayerNorm computed, but for the linear that takes it."""

    def __init__(self) -> None:
        self.real: dict[str, tuple[Tensor, Tensor]] = {}

    def gave(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            self.real[name] = torch.full_like(y, float("nan")), y
            return self.real[name][0]

        return hook

    def got(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> Any:
            fake, real = self.real[name]
            return (real, *args[1:]) if args[0] is fake else None

        return hook


@dataclass(frozen=True)
class NormedCall:
    """A LayerNorm and the linear after it, in the form that was chosen for that, on random tokens.

    Args:
        norm: the LayerNorm.
        linear: what stands for the linear.
        ours: whether our kernel runs the LayerNorm by itself.
        x: [T, K].
    """

    norm: nn.LayerNorm
    linear: PackedLinear
    ours: bool
    x: Tensor

    @property
    def reason(self) -> str | None:
        """Why one kernel cannot compute both, or None."""
        return reason_against(self.x, self.linear.form(len(self.x)))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the input."""
        return (tuple(self.x.shape),)

    def torch(self) -> Tensor:
        """One after the other."""
        norm = self.norm
        y = layer_norm(self.x, norm.weight, norm.bias, eps=norm.eps) if self.ours else norm(self.x)
        out: Tensor = self.linear(y)
        return out

    def kernel(self) -> Tensor:
        """Both in one kernel."""
        linear, norm = self.linear, (self.norm.weight, self.norm.bias, self.norm.eps)
        return normed_linear(self.x, linear.form(len(self.x)), linear.bias, norm=norm, activation=linear.activation)

    def excess(self) -> float:
        """The kernel's error against float64 over what is allowed: 2x PyTorch's, plus 4 eps of the scale."""
        sample = torch.linspace(0, len(self.x) - 1, min(len(self.x), CHECKED)).long()
        norm, linear = self.norm, self.linear
        tensors = norm.weight, norm.bias, linear.form(len(self.x)).unpack(), linear.bias

        def dense(dtype: torch.dtype) -> Tensor:
            w, b, weight, bias = (None if t is None else t.to(dtype) for t in tensors)
            x = F.layer_norm(self.x[sample].to(dtype), norm.normalized_shape, w, b, norm.eps)
            return apply_activation(F.linear(x, weight, bias), linear.activation).double()  # type: ignore[arg-type]

        exact = dense(torch.float64)
        return excess_over(self.kernel()[sample], dense(self.x.dtype), exact)


def normed_calls(
    found: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    slots: Mapping[str, nn.Module],
    tokens: Mapping[str, Sequence[int]],
    alike: Mapping[str, Hashable],
    ours: Container[str],
) -> dict[str, list[NormedCall]]:
    """What each LayerNorm and its linear would compute in one kernel, as `measure_sites` takes it.

    Args:
        found: name of a LayerNorm -> of the linear, as `find_normed` gives them.
        modules: name -> module of the model, the LayerNorms among them.
        slots: name of a linear -> what stands there.
        tokens: name of a linear -> its token counts.
        alike: name of a linear -> what is equal where its time is; those that are alike share their calls.
        ours: names of the LayerNorms that our kernel runs.

    Returns:
        Name of a LayerNorm -> a call for each token count. Without those whose linear is PyTorch's.
    """
    seen: dict[Hashable, NormedCall] = {}
    calls: dict[str, list[NormedCall]] = {}
    for name, path in found.items():
        norm, linear = modules[name], slots.get(path)
        if not isinstance(norm, nn.LayerNorm) or not isinstance(linear, PackedLinear):
            continue
        calls[name] = []
        for count in tokens[path]:
            key = alike[path], norm.weight is None, norm.bias is None, name in ours, count
            if key not in seen:
                x = torch.randn(count, linear.in_features, generator=torch.Generator().manual_seed(0))
                seen[key] = NormedCall(norm, linear, name in ours, x.to(linear.weight.dtype))
            calls[name].append(seen[key])
    return calls
