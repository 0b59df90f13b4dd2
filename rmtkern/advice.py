"""advise: which dtype and pattern would make a model how much faster on this machine, before anything is pruned.

It measures every distinct linear of the model in every pattern and adds the times up; what a pattern costs in accuracy
it cannot know. It changes nothing of the model.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.activations import apply_activation
from rmtkern.api import prune_
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.ops import linear
from rmtkern.packing.dtype import DTYPES, cast_
from rmtkern.packing.timing import Timer, interleaved_ms
from rmtkern.packing.watch import reason_to_leave, watch
from rmtkern.progress import progress
from rmtkern.pruning.pattern import parse_pattern
from rmtkern.tables import Table, Tabulated

__all__ = ["PATTERNS", "Advice", "AdviceRow", "advise"]

PATTERNS = ("unstructured", "2:4", "2:4x4", "1x2", "2x1", "4x1", "8x1", "4x2")
"""What is tried by default, roughly from what costs least accuracy to what costs most."""


@dataclass(frozen=True, slots=True)
class AdviceRow:
    """One dtype and pattern.

    Args:
        dtype: "float32" or "bfloat16".
        pattern: as `prune_` takes it.
        sparsity: of every linear that the pattern divides.
        ms: the whole model: measured linears in their fastest form, and the measured rest.
        speedup: the model with every linear in its fastest dense form, in the same dtype, over `ms`.
        speedup_now: the model as it came over `ms`.
        layers: how many linears a sparse form would run.
    """

    dtype: str
    pattern: str
    sparsity: float
    ms: float
    speedup: float
    speedup_now: float
    layers: int


@dataclass(frozen=True, slots=True)
class Advice(Tabulated):
    """What `advise` found; prints as a table, the fastest last.

    Args:
        rows: one for each dtype, pattern and sparsity.
        original_ms: the model as it came [ms].
        threads: of torch during the measurement.
        notes: what could not be tried, in words.
    """

    rows: tuple[AdviceRow, ...]
    original_ms: float
    threads: int
    notes: tuple[str, ...] = ()

    def best(self, sparsity: float, dtype: str | None = None) -> AdviceRow | None:
        """The fastest row of a sparsity, and of a dtype if given; None if there is none."""
        fitting = [row for row in self.rows if row.sparsity == sparsity and dtype in (None, row.dtype)]
        return min(fitting, key=lambda row: row.ms, default=None)

    def table(self) -> Table:
        """One row per dtype, pattern and sparsity."""
        columns = ("dtype", "pattern", "sparsity", "ms", "x dense of this dtype", "x as it is", "layers")
        lines = [
            f"as it is: {self.original_ms:.4g} ms on {self.threads} thread(s). Sums of measured linears and the"
            " measured rest of the model, with PyTorch's attention; pack_ measures the whole.",
            "Patterns cost accuracy in about this order, least first: " + ", ".join(PATTERNS),
            *self.notes,
        ]
        for sparsity in sorted({row.sparsity for row in self.rows}):
            best = self.best(sparsity)
            if best is not None and best.layers:
                lines.append(
                    f"fastest at {sparsity:.0%}: {best.dtype} {best.pattern}, {best.speedup_now:.2f}x as it is"
                )
        return Table(columns, [tuple(asdict(row).values()) for row in self.rows], lines)

    def to_json(self) -> str:
        """Everything as one JSON object."""
        return json.dumps(asdict(self), indent=1)


@dataclass
class _Kind:
    """Linears of one shape, bias, activation and token counts, and their times in one dtype."""

    first: nn.Linear
    activation: str | None
    tokens: tuple[int, ...]
    count: int = 0
    plain_ms: float = 0.0  # as nn.Linear and activation
    dense_ms: float = 0.0  # fastest dense form
    sparse_ms: dict[tuple[str, float], float] | None = None


def advise(
    model: nn.Module,
    example: Tensor,
    *,
    patterns: Sequence[str] = PATTERNS,
    sparsities: Sequence[float] = (0.5, 0.7, 0.9),
    dtypes: Sequence[torch.dtype] = DTYPES,
    budget_ms: float = 600.0,
    timer: Timer | None = None,
    show_progress: bool | None = None,
) -> Advice:
    """Measure how much faster each dtype and pattern would make a model here.

    Every distinct linear is pruned to each pattern by magnitude and timed in every layout that takes it, on the token
    counts of the example, beside its dense forms, in one interleaved run. The rest of the model is what is left of its
    measured time.

    Args:
        model: float32, in eval mode, on the CPU; not changed.
        example: what the model is called with.
        patterns: as `prune_` takes them; n:m has one sparsity of its own.
        sparsities: for the patterns without one, [0, 1).
        dtypes: of torch.float32 and torch.bfloat16.
        budget_ms: time spent on each distinct linear and dtype [ms].
        timer: (name -> call, budget_ms) -> (name -> ms); default `interleaved_ms`.
        show_progress: show a bar; default, only on a terminal.

    Returns:
        What was found.

    Raises:
        TypeError: `model` is not a module or `example` no tensor.
        ValueError: an unknown pattern or dtype, a sparsity out of range, a model that is not float32, not on the CPU or
            without a linear that could be packed, or an example that it cannot run.
    """
    _check(model, example, patterns, sparsities, dtypes)
    time_calls = timer or interleaved_ms
    wanted = _wanted(patterns, sparsities)
    rows: list[AdviceRow] = []
    notes: list[str] = []
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        raise ValueError(f"example: the model cannot run it: {error}; pass what you would call it with") from error
    original_ms = _model_ms(model, example, budget_ms, time_calls)
    for dtype in dtypes:
        whole = copy.deepcopy(model)
        if dtype != torch.float32:
            cast_(whole, dtype)
        kinds = _kinds(whole, example)
        for kind in progress(kinds, f"timing {str(dtype).removeprefix('torch.')}", show=show_progress):
            _measure(kind, wanted, budget_ms, time_calls, notes)
        total_ms = _model_ms(whole, example, budget_ms, time_calls) if dtype != torch.float32 else original_ms
        rest_ms = max(0.0, total_ms - sum(kind.count * kind.plain_ms for kind in kinds))
        dense_ms = rest_ms + sum(kind.count * kind.dense_ms for kind in kinds)
        for key in wanted:
            faster = [kind for kind in kinds if (kind.sparse_ms or {}).get(key, kind.dense_ms) < kind.dense_ms]
            ms = dense_ms - sum(kind.count * (kind.dense_ms - (kind.sparse_ms or {})[key]) for kind in faster)
            name = str(dtype).removeprefix("torch.")
            layers = sum(kind.count for kind in faster)
            rows.append(AdviceRow(name, *key, ms, dense_ms / ms, original_ms / ms, layers))
    return Advice(tuple(rows), original_ms, torch.get_num_threads(), tuple(dict.fromkeys(notes)))


def _check(
    model: Any, example: Any, patterns: Sequence[str], sparsities: Sequence[float], dtypes: Sequence[torch.dtype]
) -> None:
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


def _wanted(patterns: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
    found = []
    for pattern in patterns:
        _, params = parse_pattern(pattern)
        own = [1 - params["n"] / params["m"]] if "n" in params else sparsities
        found += [(pattern, float(sparsity)) for sparsity in own]
    return list(dict.fromkeys(found))


def _model_ms(model: nn.Module, example: Tensor, budget_ms: float, time_calls: Timer) -> float:
    with torch.no_grad():
        return dict(time_calls({"original": lambda: model(example)}, budget_ms))["original"]


def _kinds(model: nn.Module, example: Tensor) -> list[_Kind]:
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and reason_to_leave(model, name, module, DTYPES) is None
    }
    with watch(model, linears) as watched, torch.no_grad():
        model(example)
    kinds: dict[tuple[Any, ...], _Kind] = {}
    for name, module in linears.items():
        seen = watched[name]
        if seen.reason is not None:
            continue
        tokens = tuple(seen.tokens)
        key = (module.weight.shape, module.bias is not None, seen.activation, tokens)
        kinds.setdefault(key, _Kind(module, seen.activation, tokens)).count += 1
    if not kinds:
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear that could be packed")
    return list(kinds.values())


def _forms(weight: Tensor, tokens: int) -> dict[str, PackedWeight]:
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


def _measure(
    kind: _Kind, wanted: Sequence[tuple[str, float]], budget_ms: float, time_calls: Timer, notes: list[str]
) -> None:
    module = kind.first
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    forms = _forms(weight, kind.tokens[0])
    keys: dict[str, tuple[str, float]] = {}
    for pattern, sparsity in wanted:
        pruned = _pruned(module, pattern, sparsity)
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
    for tokens in kind.tokens:
        x = torch.randn(tokens, module.in_features, generator=generator).to(weight.dtype)
        calls = _calls(module, forms, x, bias, kind.activation, notes)
        with torch.no_grad():
            times: Mapping[str, float] = time_calls(calls, budget_ms / len(kind.tokens))
        ms = {label: ms.get(label, 0.0) + value for label, value in times.items()}
    kind.plain_ms = ms["dense/torch"]
    kind.dense_ms = min(value for label, value in ms.items() if label not in keys)
    kind.sparse_ms = {}
    for label, key in keys.items():
        if label in ms:
            kind.sparse_ms[key] = min(ms[label], kind.sparse_ms.get(key, ms[label]))


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
