"""How long each distinct linear of a model takes in each pattern on this machine, in its fastest form.

It prunes copies of single weights by magnitude to time them, and changes nothing of the model; what a pattern costs in
accuracy it does not know.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.activations import apply_activation
from rmtkern.api import prune_
from rmtkern.environment import cpu_model
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.ops import linear
from rmtkern.packing.dtype import DTYPES, cast_
from rmtkern.packing.multihead import find_multiheads, linears_of
from rmtkern.packing.timing import Timer, interleaved_ms
from rmtkern.packing.watch import reason_to_leave, watch
from rmtkern.progress import progress
from rmtkern.pruning.pattern import parse_pattern
from rmtkern.pruning.times import LayerTimes, PatternTimes

__all__ = ["PATTERNS", "Kind", "check_input", "find_kinds", "time_patterns", "wanted_shares"]

PATTERNS = ("unstructured", "2:4", "2:4x4", "1x2", "2x1", "4x1", "8x1", "4x2")
"""What is tried by default, roughly from what costs least accuracy to what costs most."""

MIXED = ("unstructured", "1x2", "4x2")
"""What is timed by default to choose among."""


@dataclass
class Kind:
    """Linears of one shape, bias, activation and token counts, and their times in one dtype.

    Args:
        first: one of them.
        activation: name of the activation that follows each, or None.
        tokens: T of every call.
        names: of all of them in the model.
        plain_ms: one as nn.Linear and activation.
        dense_ms: one in its fastest dense form.
        sparse_ms: (pattern, sparsity) -> one in its fastest sparse form; what no form holds is missing.
    """

    first: nn.Linear
    activation: str | None
    tokens: tuple[int, ...]
    names: list[str] = field(default_factory=list)
    plain_ms: float = 0.0
    dense_ms: float = 0.0
    sparse_ms: dict[tuple[str, float], float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)

    def measure(
        self, wanted: Sequence[tuple[str, float]], budget_ms: float, time_calls: Timer, notes: list[str]
    ) -> None:
        """Time one of them in every dense form, and in every sparse one of each pattern and sparsity.

        Args:
            wanted: from `wanted_shares`.
            budget_ms: time spent [ms].
            time_calls: as `interleaved_ms`.
            notes: gets what could not be tried, in words.
        """
        weight, bias = self.first.weight.detach(), None if self.first.bias is None else self.first.bias.detach()
        forms = _dense_forms(weight, self.tokens[0])
        keys: dict[str, tuple[str, float]] = {}
        for pattern, sparsity in wanted:
            pruned = _pruned(self.first, pattern, sparsity)
            if pruned is None:
                notes.append(f"{pattern} does not divide {weight.shape[0]}x{weight.shape[1]}: such layers stay dense")
                continue
            for layout in LAYOUTS:
                for params in LAYOUTS[layout].variants(pruned) if layout not in ("dense", "lowrank") else ():
                    form = LAYOUTS[layout].pack(pruned, **params)
                    if form.nbytes < weight.nbytes:
                        label = f"{pattern} {sparsity} {form.label}"
                        forms[label], keys[label] = form, (pattern, sparsity)
        generator = torch.Generator().manual_seed(0)
        ms: dict[str, float] = {}
        for tokens in self.tokens:
            x = torch.randn(tokens, self.first.in_features, generator=generator).to(weight.dtype)
            calls = _calls(self.first, forms, x, bias, self.activation, notes)
            with torch.no_grad():
                times: Mapping[str, float] = time_calls(calls, budget_ms / len(self.tokens))
            ms = {label: ms.get(label, 0.0) + value for label, value in times.items()}
        self.plain_ms = ms["dense/torch"]
        self.dense_ms = min(value for label, value in ms.items() if label not in keys)
        for label, key in keys.items():
            if label in ms:
                self.sparse_ms[key] = min(ms[label], self.sparse_ms.get(key, ms[label]))


def time_patterns(
    model: nn.Module,
    example: Tensor,
    patterns: Sequence[str] = MIXED,
    *,
    sparsities: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    dtype: torch.dtype = torch.float32,
    budget_ms: float = 600.0,
    timer: Timer | None = None,
    show_progress: bool | None = None,
) -> PatternTimes:
    """Measure how long each linear of a model takes in each of several patterns here, for `prune_(timings=)`.

    Every distinct linear is pruned to each pattern by magnitude and timed in every layout that takes it, on the token
    counts of the example, beside its dense forms, in one interleaved run. `PatternTimes.save` keeps the times.

    Args:
        model: float32, in eval mode, on the CPU; not changed.
        example: what the model is called with.
        patterns: as `prune_` takes them; n:m has one sparsity of its own.
        sparsities: for the patterns without one, [0, 1). Between two of them times are read off a straight line, and
            no layer gets more zeros than the highest.
        dtype: torch.float32 or torch.bfloat16: what the packed model will run in.
        budget_ms: time spent on each distinct linear [ms].
        timer: (name -> call, budget_ms) -> (name -> ms); default `interleaved_ms`.
        show_progress: show a bar; default, only on a terminal.

    Returns:
        The times, by the names of the weights; a pattern that does not divide a weight has none there. Linears that
        cannot be packed are left out.

    Raises:
        TypeError: `model` is not a module or `example` no tensor.
        ValueError: an unknown pattern or dtype, a sparsity out of range, a model that is not float32, not on the CPU or
            without a linear that could be packed, or an example that it cannot run.
    """
    check_input(model, example, patterns, sparsities, (dtype,))
    whole = copy.deepcopy(model)
    if dtype != torch.float32:
        cast_(whole, dtype)
    multiheads = find_multiheads(whole).apart
    for name, apart in multiheads.items():
        whole.set_submodule(name, apart)
    fused = {linears_of(name)[0]: f"{name}.in_proj_weight" for name in multiheads}
    kinds = find_kinds(whole, example)
    for kind in progress(kinds, "timing patterns", show=show_progress):
        kind.measure(wanted_shares(patterns, sparsities), budget_ms, timer or interleaved_ms, [])
    return PatternTimes(
        tuple(
            LayerTimes(
                names=tuple(fused.get(name, f"{name}.weight") for name in kind.names),
                shape=(kind.first.out_features, kind.first.in_features),
                dense_ms=kind.dense_ms,
                ms={
                    pattern: {share: ms for (one, share), ms in kind.sparse_ms.items() if one == pattern}
                    for pattern in patterns
                    if any(one == pattern for one, _ in kind.sparse_ms)
                },
            )
            for kind in kinds
        ),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        cpu=cpu_model(),
    )


def check_input(
    model: Any, example: Any, patterns: Sequence[str], sparsities: Sequence[float], dtypes: Sequence[torch.dtype]
) -> None:
    """Refuse what cannot be timed.

    Raises:
        TypeError: `model` is not a module or `example` no tensor.
        ValueError: no or an unknown pattern or dtype, a sparsity out of range, a model that is not float32 or not on
            the CPU, or an example that it cannot run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor that the model is called with, got {type(example).__name__}")
    for pattern in patterns:
        parse_pattern(pattern)
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsities: expected 0 <= sparsity < 1, got {sparsity}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes: expected {' or '.join(map(str, DTYPES))}, got {dtype!r}")
    if other := sorted({str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}):
        raise ValueError(f"model: expected float32 parameters, got {', '.join(other)}; call model.float() first")
    if other := sorted({str(p.device) for p in model.parameters() if p.device.type != "cpu"}):
        raise ValueError(f"model: expected parameters on the cpu, got {', '.join(other)}; call model.cpu() first")
    if not patterns or not dtypes:
        raise ValueError("patterns and dtypes: expected at least one of each, got none")
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        raise ValueError(f"example: the model cannot run it: {error}; pass what you would call it with") from error


def wanted_shares(patterns: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
    """Pairs (pattern, sparsity) to time: n:m at its own sparsity, the others at each."""
    found = []
    for pattern in patterns:
        _, params = parse_pattern(pattern)
        own = [1 - params["n"] / params["m"]] if "n" in params else sparsities
        found += [(pattern, float(sparsity)) for sparsity in own]
    return list(dict.fromkeys(found))


def find_kinds(model: nn.Module, example: Tensor) -> list[Kind]:
    """The distinct linears of a model that could be packed, in the order of the model.

    Raises:
        ValueError: there is none.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and reason_to_leave(model, name, module, DTYPES) is None
    }
    with watch(model, linears) as watched, torch.no_grad():
        model(example)
    kinds: dict[tuple[Any, ...], Kind] = {}
    for name, module in linears.items():
        seen = watched[name]
        if seen.reason is not None:
            continue
        tokens = tuple(seen.tokens)
        key = (module.weight.shape, module.bias is not None, seen.activation, tokens)
        kinds.setdefault(key, Kind(module, seen.activation, tokens)).names.append(name)
    if not kinds:
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear that could be packed")
    return list(kinds.values())


def _dense_forms(weight: Tensor, tokens: int) -> dict[str, PackedWeight]:
    """The dense forms of a weight, by label."""
    forms = (LAYOUTS["dense"].pack(weight, tokens=tokens, **params) for params in LAYOUTS["dense"].variants(weight))
    return {form.label: form for form in forms}


def _pruned(module: nn.Linear, pattern: str, sparsity: float) -> Tensor | None:
    """The weight in a pattern, or None if the pattern does not divide it."""
    n, k = module.weight.shape
    copied = nn.Linear(k, n, bias=False, device="meta")
    copied.weight = nn.Parameter(module.weight.detach().float().clone())
    holder = nn.Sequential(copied)
    try:
        prune_(holder, sparsity, "uniform", pattern, targets="all", show_progress=False)
    except ValueError:
        return None
    return copied.weight.detach().to(module.weight.dtype)


def _calls(
    module: nn.Linear,
    forms: Mapping[str, PackedWeight],
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    notes: list[str],
) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for label, form in forms.items():
        if label == "dense/torch":
            calls[label] = lambda: apply_activation(module(x), activation)
            continue
        try:
            linear(x[:1], form, bias, activation=activation)
        except KernelUnavailable as error:
            notes.append(str(error))
            continue
        calls[label] = lambda form=form: linear(x, form, bias, activation=activation)  # type: ignore[misc]
    return calls
