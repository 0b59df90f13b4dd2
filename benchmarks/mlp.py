"""The MLP level: two linears with a GELU between in one kernel against the same two kernels one after the other.

It measures one case of cases.py and returns its rows; run.py writes them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from benchmarks import contenders
from benchmarks.cases import LAYERS, KernelCase
from benchmarks.contenders import Unavailable
from benchmarks.fused import Contest
from rmtkern.mlp import mlp, reason_against
from rmtkern.ops import linear

__all__ = ["KEYS", "SHOWN", "measure"]

KEYS = ("layer", "T", "dtype", "activation", "form", "threads", "isa")
"""Columns that identify a row."""
SHOWN = ("form", "p50_ms", "separate_ms", "vs_separate", "vs_torch", "max_rel_err")
"""Columns that run.py prints."""


class _Mlp(Contest):
    """Each contender in one kernel, against the same in two and against PyTorch's dense MLP."""

    def __init__(self, case: KernelCase, say: Callable[[str], None]) -> None:
        (hidden, k), (n, _) = (LAYERS[f"{case.layer.partition('.')[0]}.{role}"] for role in ("fc1", "fc2"))
        head = {"layer": case.layer, "T": case.tokens, "K": k, "hidden": hidden, "N": n, "dtype": case.dtype}
        head["activation"] = case.activation
        super().__init__(case, 4.0 * case.tokens * hidden * k, head, say)
        self.shape = (hidden, k, n)
        self.x, self.biases = self.random(case.tokens, k), (self.random(hidden), self.random(n))
        self.dense = self.random(hidden, k) / k**0.5, self.random(n, hidden) / hidden**0.5
        self.contend(self._contend)

    def _torch(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        b1, b2 = (bias.to(x.dtype) for bias in self.biases)
        return F.linear(F.gelu(F.linear(x, first.to(x.dtype), b1)), second.to(x.dtype), b2)

    def _contend(self, name: str) -> None:
        contender, (hidden, k, n) = contenders.parse(name), self.shape
        (w1, first), (w2, second) = self.weight(contender, hidden, k), self.weight(contender, n, hidden)
        if reason := reason_against(self.x, first, second):
            raise Unavailable(f"{name}: {reason}")
        b1, b2 = self.biases

        def one() -> Tensor:
            return mlp(self.x, first, second, first_bias=b1, second_bias=b2)

        def two() -> Tensor:
            return linear(linear(self.x, first, b1, activation="gelu"), second, b2)

        x = self.x[self.sample]
        self.add(
            name,
            one,
            one()[self.sample],
            self._torch(x, w1, w2),
            self._torch(x.double(), w1, w2),
            layout=contender.layout,
            pattern=contender.pattern,
            sparsity=1 - float(w1.count_nonzero() + w2.count_nonzero()) / (hidden * (k + n)),
            weight_bytes=first.nbytes + second.nbytes,
        )
        self.against("separate", name, {f"{name} separate": two})
        self.against("torch", name, {"dense torch": lambda: self._torch(self.x, *self.dense)})


def measure(case: KernelCase, rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time and describe one case: a row for each form; empty if no contender is there."""
    return _Mlp(case, say).rows(rounds)
