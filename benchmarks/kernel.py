"""The kernel level: every layout against the strongest dense linear of the same precision, interleaved, correct first.

It measures one case of cases.py and returns its rows; run.py writes them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import contenders
from benchmarks.cases import LAYERS, KernelCase
from benchmarks.contenders import Contender, Unavailable
from benchmarks.peak import fma_peak
from benchmarks.record import stamped
from benchmarks.timing import clock_for, interleaved, quantiles
from rmtkern.layouts import cpu
from rmtkern.testing import accuracy_excess

__all__ = ["KEYS", "SHOWN", "Layer", "dense_linears", "measure"]

KEYS = ("layer", "T", "dtype", "activation", "form", "threads", "isa")
"""Columns that identify a row."""
SHOWN = ("form", "p50_ms", "vs_torch", "vs_onednn", "vs_strongest", "gflops", "peak_share", "max_rel_err")
"""Columns that run.py prints."""
CHECKED = 256
"""Tokens of a call, evenly spread, that are checked against float64."""
ROUND_FLOPS = 4e8
"""A round calls short functions until they have done about this much."""

ACTIVATIONS = {None: (lambda y: y, "none", ""), "gelu": (F.gelu, "gelu", "none")}
"""activation -> torch's function, oneDNN's attribute and algorithm, for those of cases.py."""


def dense_linears(
    weight: Tensor, bias: Tensor, activation: str | None, tokens: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every dense form that torch offers for this layer, for x [tokens, K] of the dtype of the weight."""
    function, name, algorithm = ACTIVATIONS[activation]
    forms: dict[str, Callable[[Tensor], Tensor]] = {"dense torch": lambda x: function(F.linear(x, weight, bias))}
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise.default
        prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        forms["dense onednn"] = lambda x: onednn(x, weight, bias, name, [], algorithm)
        forms["dense onednn prepacked"] = lambda x: onednn(x, prepacked, bias, name, [], algorithm)
    return forms


def relative_error(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> float:
    """Largest error against float64, relative to the largest output."""
    exact = ACTIVATIONS[activation][0](F.linear(x.double(), weight.double(), bias.double()))
    return float((got.double() - exact).abs().max() / exact.abs().max())


class Layer:
    """The calls of one case, all checked: the dense forms first, then each contender that there is.

    Args:
        case: of cases.py; sets torch's thread count.
        say: gets a line about each contender that is not there.

    Raises:
        RuntimeError: a kernel misses the accuracy rule of rmtkern.testing.
    """

    def __init__(self, case: KernelCase, say: Callable[[str], None]) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        self.case = case
        n_rows, n_cols = LAYERS[case.layer]
        dtype = getattr(torch, case.dtype)
        self.x, self.bias = torch.randn(case.tokens, n_cols).to(dtype), torch.randn(n_rows).to(dtype)
        weight = torch.randn(n_rows, n_cols).to(dtype)
        self.sample = torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED)).long()
        linears = dense_linears(weight, self.bias, case.activation, case.tokens)
        self.calls: dict[str, Callable[[], Tensor]] = {name: partial(dense, self.x) for name, dense in linears.items()}
        self.baselines = tuple(self.calls)
        self.flops = 2.0 * case.tokens * n_rows * n_cols
        """Of the dense layer."""
        self.facts: dict[str, dict[str, Any]] = {}
        """form -> the columns that do not depend on time."""
        for name, call in self.calls.items():
            self._add(name, call(), weight, weight.nbytes, weight.numel(), layout="dense", pattern=None, sparsity=0.0)
        for name in case.contenders:
            try:
                self._contend(contenders.parse(name), n_rows, n_cols, dtype)
            except Unavailable as reason:
                say(f"skip {reason}")

    def _contend(self, contender: Contender, n_rows: int, n_cols: int, dtype: torch.dtype) -> None:
        x, bias, activation = self.x, self.bias, self.case.activation
        weight, packed = contenders.build(contender, n_rows, n_cols, dtype)
        linear = contenders.kernel_of(packed, x)

        def call() -> Tensor:
            return linear(x, packed, bias, activation, None)

        y = call()
        effective = packed.unpack() if "rank" in contender.numbers else weight
        excess = accuracy_excess(y[self.sample], x[self.sample], effective, bias, activation)
        if not excess <= 1:
            raise RuntimeError(f"{self.case.name} {contender.name}: {excess:.2g} times the error that is allowed")
        self.calls[contender.name] = call
        self._add(
            contender.name,
            y,
            effective,
            packed.nbytes,
            contender.executed(weight),
            layout=contender.layout,
            pattern=contender.pattern,
            sparsity=1 - float(weight.count_nonzero()) / weight.numel(),
        )

    def _add(self, name: str, y: Tensor, weight: Tensor, nbytes: int, products: float, **columns: Any) -> None:
        error = relative_error(y[self.sample], self.x[self.sample], weight, self.bias, self.case.activation)
        self.facts[name] = {
            **columns,
            "max_rel_err": error,
            "weight_bytes": nbytes,
            "flops": 2.0 * self.case.tokens * products,
        }

    @property
    def inner(self) -> int:
        """Calls of one function in a round."""
        return max(1, int(ROUND_FLOPS / self.flops))


def measure(case: KernelCase, rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time and describe one case: a row for each form; empty if no contender is there."""
    layer = Layer(case, say)
    if len(layer.calls) == len(layer.baselines):
        return []
    clock = clock_for(case.threads)
    times = interleaved(layer.calls, clock, rounds, layer.inner)
    isa = (cpu.isas() or ["none"])[0]
    peak = fma_peak(case.dtype, isa)
    p50 = {name: quantiles(samples)["p50_ms"] for name, samples in times.items()}
    strongest = min(layer.baselines, key=p50.__getitem__)
    rows = []
    for name, samples in times.items():
        facts = dict(layer.facts[name])
        flops = facts.pop("flops")
        executed = flops / p50[name] / 1e6
        row = {
            "layer": case.layer,
            "T": case.tokens,
            "N": LAYERS[case.layer][0],
            "K": LAYERS[case.layer][1],
            "dtype": case.dtype,
            "form": name,
            **{column: facts.pop(column) for column in ("layout", "pattern", "sparsity")},
            "activation": case.activation,
            "threads": case.threads,
            "clock": clock.name,
            **quantiles(samples),
            "vs_torch": p50["dense torch"] / p50[name],
            "vs_onednn": p50["dense onednn"] / p50[name] if "dense onednn" in p50 else None,
            "vs_strongest": p50[strongest] / p50[name],
            "strongest": strongest,
            "gflops": executed,
            "gflops_dense_equivalent": layer.flops / p50[name] / 1e6,
            "peak_share": executed / peak / case.threads if peak else None,
            **facts,
        }
        rows.append(stamped(row, isa=isa, peak_gflops=peak))
    return rows
