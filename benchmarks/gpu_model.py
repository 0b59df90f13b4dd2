"""The model level on a GPU: packed models against dense bfloat16, compiled, under CUDA graphs, and torch's 2:4.

It measures one case of cases.py and returns its rows; gpu.py adds what they have in common. Weights are random, so
that nothing is downloaded.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from benchmarks.cases import ModelCase, Pruned
from benchmarks.contenders import Unavailable
from benchmarks.timing import quantiles
from rmtkern.api import prune_
from rmtkern.comparison import allowed_error, relative_error
from rmtkern.packing import pack_
from rmtkern.packing.events import interleaved
from rmtkern.pruning.pattern import parse_pattern

if TYPE_CHECKING:
    from benchmarks.gpu import Gpu

__all__ = ["KEYS", "SHOWN", "measure", "semi_structured_"]

KEYS = ("model", "batch", "form", "launch", "gpu", "triton", "torch")
"""Columns that identify a row."""
SHOWN = ("form", "launch", "p50_ms", "vs_compile", "vs_dense_graph", "vs_torch_2_4", "vs_strongest", "strongest",
         "max_rel_err", "pack_seconds")  # fmt: skip
"""Columns that are printed."""
BUDGET_MS = 4000.0
"""Time of the device for the calls of one case."""
PACK_MS = 60.0
"""Of pack_ for each distinct measurement; five times as much for the whole model."""
PLAIN, COMPILED, TWO_OF_FOUR = "torch bf16", "compile bf16", "torch 2:4"
EAGER, GRAPH = "eager", "graph"

Say = Callable[[str], None]
Call = Callable[[], Tensor]


def semi_structured_(model: nn.Module) -> int:
    """Give every linear whose shape they take PyTorch's 2:4 weights; how many. The model is on the device."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            try:
                module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
                count += 1
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, NotImplementedError):  # a shape, dtype or device that it does not take
                continue
    return count


class _Contest:
    """The calls of one case, checked, and the columns of each that do not depend on time."""

    def __init__(self, case: ModelCase, model: nn.Module, images: Tensor, say: Say) -> None:
        self.case, self.say, self.images = case, say, images
        self.dense = model  # on the CPU, where it is pruned
        self.narrow = images.bfloat16()
        self.calls: dict[str, Call] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def _accept(self, name: str, call: Call, exact: Tensor, allowed: float, **columns: Any) -> None:
        """Check an output and let the call take part."""
        error = relative_error(call(), exact)
        if not error <= allowed:
            raise RuntimeError(f"{name}: relative error {error:.2g}, allowed {allowed:.2g}")
        self.calls[name] = call
        empty = {"pattern": None, "sparsity": 0.0, "pack_seconds": None, "forms": None, "notes": None}
        self.facts[name] = {**empty, "max_rel_err": error, **columns}

    def _narrow(self, wide: nn.Module) -> tuple[nn.Module, Tensor, float]:
        """A model in bfloat16 on the device, the float32 model's output, and what error is allowed."""
        wide = copy.deepcopy(wide).to(self.images.device)
        exact = wide(self.images)
        allowed = allowed_error("bfloat16", wide, self.images, exact)
        return wide.bfloat16(), exact, allowed

    def add_dense(self, compiled: bool = True) -> None:
        """The dense model as it is and compiled."""
        model, exact, allowed = self._narrow(self.dense)
        self._accept(PLAIN, lambda: model(self.narrow), exact, allowed)
        if compiled:
            torch._dynamo.reset()
            fast = torch.compile(copy.deepcopy(model), dynamic=False)
            self._accept(COMPILED, lambda: fast(self.narrow), exact, allowed)

    def add_two_of_four(self) -> None:
        """PyTorch's semi-structured sparsity in every linear that takes it; a line if none does."""
        model = self._pruned(Pruned("bfloat16", "2:4", 0.5))
        narrow, exact, allowed = self._narrow(model)
        count = semi_structured_(narrow)
        if not count:
            self.say(f"skip {TWO_OF_FOUR}: PyTorch takes no linear of this model here")
            return
        columns = {"pattern": "2:4", "sparsity": 0.5, "forms": f"2:4 x{count}"}
        try:
            self._accept(TWO_OF_FOUR, lambda: narrow(self.narrow), exact, allowed, **columns)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as reason:
            self.say(f"skip {TWO_OF_FOUR}: {str(reason).partition(chr(10))[0]}")

    def add_packed(self, pruned: Pruned) -> None:
        """Prune, pack and check one model; a line if this library cannot."""
        try:
            wide = self._pruned(pruned)
        except Unavailable as reason:
            self.say(f"skip {reason}")
            return
        model, exact, allowed = self._narrow(wide)
        start = time.perf_counter()
        report = pack_(model, self.narrow, budget_ms=PACK_MS, show_progress=False)
        seconds = time.perf_counter() - start
        forms = Counter(layer.form for layer in report.layers)
        self._accept(
            pruned.name,
            lambda: model(self.narrow),
            exact,
            allowed,
            pattern=pruned.pattern,
            sparsity=pruned.sparsity,
            pack_seconds=seconds,
            forms="; ".join(f"{form} x{count}" for form, count in forms.most_common()),
            notes="; ".join(report.notes),
        )

    def _pruned(self, pruned: Pruned) -> nn.Module:
        model = copy.deepcopy(self.dense)
        if pruned.pattern != "dense":
            try:
                parse_pattern(pruned.pattern)
            except ValueError as error:
                raise Unavailable(f"{pruned.name}: {error}") from error
            prune_(model, pruned.sparsity, "uniform", pruned.pattern, show_progress=False)
        return model

    def graphs(self, gpu: "Gpu") -> dict[str, Call]:
        """Each call as a CUDA graph: all in one memory pool, or one by one if that fails; a line about each failure."""
        try:
            return gpu.clock.capture(self.calls)
        except RuntimeError:
            found = {}
            for name, call in self.calls.items():
                try:
                    found |= gpu.clock.capture({name: call})
                except RuntimeError as error:
                    self.say(f"skip {name} as a graph: {str(error).partition(chr(10))[0]}")
            return found


def create(case: ModelCase) -> tuple[nn.Module, tuple[int, ...]]:
    """The model with random weights, and the shape of an image; Unavailable without timm."""
    try:
        import timm
    except ImportError as error:
        raise Unavailable(f"{error}; install the bench extra: pip install 'rmtkern[bench]'") from error
    torch.manual_seed(0)
    model = timm.create_model(case.model).eval()
    return model, tuple(model.default_cfg["input_size"])


def measure(case: ModelCase, gpu: "Gpu", say: Say, *, compiled: bool = True) -> list[dict[str, Any]]:
    """Set up, check, time and describe one case: each contestant kernel by kernel and as a CUDA graph, interleaved.

    Args:
        case: of cases.py.
        gpu: where it runs.
        say: gets a line about each contestant that is not there.
        compiled: whether torch.compile takes part.

    Raises:
        RuntimeError: an output is wrong.
        Unavailable: timm is missing.
    """
    model, size = create(case)
    images = torch.randn(case.batch, *size, device=gpu.device)
    with torch.no_grad():
        contest = _Contest(case, model, images, say)
        contest.add_dense(compiled)
        contest.add_two_of_four()
        for pruned in case.contenders:
            contest.add_packed(pruned)
        calls = {(name, EAGER): call for name, call in contest.calls.items()}
        calls |= {(name, GRAPH): call for name, call in contest.graphs(gpu).items()}
        keyed = {"\t".join(key): call for key, call in calls.items()}
        samples = interleaved(gpu.clock, keyed, BUDGET_MS)
    times = {key: quantiles(np.array(taken)) for key, taken in zip(calls, samples.values(), strict=True)}
    return [_row(case, key, times, contest.facts[key[0]]) for key in times]


def _row(
    case: ModelCase, key: tuple[str, str], times: dict[tuple[str, str], dict[str, float]], facts: dict[str, Any]
) -> dict[str, Any]:
    form, launch = key
    p50 = {other: found["p50_ms"] for other, found in times.items()}
    dense = {name: p50[name, launch] for name in (PLAIN, COMPILED) if (name, launch) in p50}
    strongest = min(dense, key=dense.__getitem__, default=None)

    def against(name: str, how: str) -> float | None:
        return p50[name, how] / p50[key] if (name, how) in p50 else None

    return {
        "model": case.model,
        "batch": case.batch,
        "dtype": "bfloat16",
        "form": form,
        "launch": launch,
        **times[key],
        "images_per_s": 1e3 * case.batch / p50[key],
        "vs_compile": against(COMPILED, launch),
        "vs_dense_graph": against(PLAIN, GRAPH),
        "vs_torch_2_4": against(TWO_OF_FOUR, launch),
        "vs_strongest": None if strongest is None else against(strongest, launch),
        "strongest": strongest,
        **facts,
    }
