"""The MLP level: two linears with a GELU between in one kernel against the same two kernels one after the other.

It measures one case of cases.py and returns its rows; run.py writes them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import contenders
from benchmarks.cases import LAYERS, KernelCase
from benchmarks.contenders import Unavailable
from benchmarks.kernel import CHECKED, ROUND_FLOPS
from benchmarks.record import stamped
from benchmarks.timing import clock_for, interleaved, quantiles
from rmtkern.layouts import cpu
from rmtkern.layouts.base import PackedWeight
from rmtkern.mlp import mlp
from rmtkern.ops import linear
from rmtkern.testing import excess_over

__all__ = ["KEYS", "SHOWN", "measure"]

KEYS = ("layer", "T", "dtype", "activation", "form", "threads", "isa")
"""Columns that identify a row."""
SHOWN = ("form", "p50_ms", "separate_ms", "vs_separate", "vs_torch", "max_rel_err")
"""Columns that run.py prints."""


class _Mlp:
    """The calls of one case, all checked: PyTorch's dense MLP, then each contender in one kernel and in two.

    Raises:
        RuntimeError: one kernel misses the accuracy rule, twice the error of PyTorch's and 4 eps of the output's scale.
    """

    def __init__(self, case: KernelCase, say: Callable[[str], None]) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        self.case = case
        (self.hidden, k), (n, _) = (LAYERS[f"{case.layer.partition('.')[0]}.{role}"] for role in ("fc1", "fc2"))
        self.dtype = getattr(torch, case.dtype)
        self.shape, self.flops = (self.hidden, k, n), 4.0 * case.tokens * self.hidden * k
        self.x, self.biases = self._random(case.tokens, k), (self._random(self.hidden), self._random(n))
        self.sample = torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED)).long()
        dense = self._random(self.hidden, k) / k**0.5, self._random(n, self.hidden) / self.hidden**0.5
        self.calls: dict[str, Callable[[], Tensor]] = {"dense torch": lambda: self._dense(self.x, *dense)}
        self.facts: dict[str, dict[str, Any]] = {}
        for name in case.contenders:
            try:
                self._contend(name)
            except Unavailable as reason:
                say(f"skip {reason}")

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def _dense(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        b1, b2 = (bias.to(x.dtype) for bias in self.biases)
        return F.linear(F.gelu(F.linear(x, first.to(x.dtype), b1)), second.to(x.dtype), b2)

    def _contend(self, name: str) -> None:
        contender, (hidden, k, n) = contenders.parse(name), self.shape
        weights = []
        forms: list[PackedWeight] = []
        for rows, columns in ((hidden, k), (n, hidden)):
            weight = (contenders.random_weight(contender, rows, columns) / columns**0.5).to(self.dtype)
            weights.append(weight)
            forms.append(contenders.pack(contender, weight))
            contenders.kernel_of(forms[-1], self.x)
        first, second = forms
        b1, b2 = self.biases

        def one() -> Tensor:
            return mlp(self.x, first, second, first_bias=b1, second_bias=b2)

        def two() -> Tensor:
            return linear(linear(self.x, first, b1, activation="gelu"), second, b2)

        x = self.x[self.sample]
        exact = self._dense(x.double(), *(weight.double() for weight in weights))
        y = one()[self.sample]
        excess = excess_over(y, self._dense(x, *weights), exact)
        if not excess <= 1:
            raise RuntimeError(f"{self.case.name} {name}: {excess:.2g} times the error that is allowed")
        self.calls |= {name: one, f"{name} separate": two}
        self.facts[name] = {
            "layout": contender.layout,
            "pattern": contender.pattern,
            "sparsity": 1 - sum(float(w.count_nonzero()) for w in weights) / (hidden * (k + n)),
            "max_rel_err": float((y - exact).abs().max() / exact.abs().max()),
            "weight_bytes": first.nbytes + second.nbytes,
        }


def measure(case: KernelCase, rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time and describe one case: a row for each form; empty if no contender is there."""
    layer = _Mlp(case, say)
    if not layer.facts:
        return []
    clock = clock_for(case.threads)
    times = interleaved(layer.calls, clock, rounds, max(1, int(ROUND_FLOPS / layer.flops)))
    p50 = {name: quantiles(samples)["p50_ms"] for name, samples in times.items()}
    hidden, k, n = layer.shape
    rows = []
    for name, facts in layer.facts.items():
        row = {
            "layer": case.layer,
            "T": case.tokens,
            "K": k,
            "hidden": hidden,
            "N": n,
            "dtype": case.dtype,
            "form": name,
            **{column: facts[column] for column in ("layout", "pattern", "sparsity")},
            "activation": case.activation,
            "threads": case.threads,
            "clock": clock.name,
            **quantiles(times[name]),
            "separate_ms": p50[f"{name} separate"],
            "torch_ms": p50["dense torch"],
            "vs_separate": p50[f"{name} separate"] / p50[name],
            "vs_torch": p50["dense torch"] / p50[name],
            "max_rel_err": facts["max_rel_err"],
            "weight_bytes": facts["weight_bytes"],
        }
        rows.append(stamped(row, isa=(cpu.isas() or ["none"])[0]))
    return rows
