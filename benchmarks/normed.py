"""The normed level: LayerNorm and the linear after it in one kernel against the two one after the other.

It measures one case of cases.py and returns its rows; run.py writes them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from benchmarks import contenders
from benchmarks.cases import LAYERS, KernelCase
from benchmarks.contenders import Unavailable
from benchmarks.fused import Call, Contest
from benchmarks.kernel import ACTIVATIONS, dense_linears
from rmtkern.layer_norm import layer_norm
from rmtkern.mlp import normed_linear, reason_against
from rmtkern.ops import linear

__all__ = ["KEYS", "SHOWN", "measure"]

KEYS = ("layer", "T", "dtype", "activation", "form", "threads", "isa")
"""Columns that identify a row."""
SHOWN = ("form", "p50_ms", "vs_separate", "separate_by", "vs_dense", "dense_by", "max_rel_err")
"""Columns that run.py prints."""
EPS = 1e-6


class _Normed(Contest):
    """Each contender in one kernel, against LayerNorm and the same kernel, and against LayerNorm and a dense linear.

    Apart, LayerNorm is PyTorch's or ours, whichever is faster before that linear.
    """

    def __init__(self, case: KernelCase, say: Callable[[str], None]) -> None:
        n, k = LAYERS[case.layer]
        head = {"layer": case.layer, "T": case.tokens, "K": k, "N": n, "dtype": case.dtype}
        super().__init__(case, 2.0 * case.tokens * n * k, head | {"activation": case.activation}, say)
        self.shape = (n, k)
        self.x, self.bias = self.random(case.tokens, k), self.random(n)
        self.norm = 1 + self.random(k) / 8, self.random(k) / 8
        self.norms: dict[str, Call] = {
            "torch norm": lambda: F.layer_norm(self.x, (k,), *self.norm, EPS),
            "our norm": lambda: layer_norm(self.x, *self.norm, eps=EPS),
        }
        dense = dense_linears(self.random(n, k) / k**0.5, self.bias, case.activation, case.tokens)
        self.dense = {f"{norm}, {name}": self._after(norm, run) for norm in self.norms for name, run in dense.items()}
        self.contend(self._contend)

    def _after(self, norm: str, run: Callable[[Tensor], Tensor]) -> Call:
        normed = self.norms[norm]
        return lambda: run(normed())

    def _torch(self, x: Tensor, weight: Tensor) -> Tensor:
        weight, bias, scale, shift = (t.to(x.dtype) for t in (weight, self.bias, *self.norm))
        y = F.linear(F.layer_norm(x, x.shape[-1:], scale, shift, EPS), weight, bias)
        return ACTIVATIONS[self.case.activation][0](y)

    def _contend(self, name: str) -> None:
        contender, activation = contenders.parse(name), self.case.activation
        weight, packed = self.weight(contender, *self.shape)
        if reason := reason_against(self.x, packed):
            raise Unavailable(f"{name}: {reason}")

        def one() -> Tensor:
            return normed_linear(self.x, packed, self.bias, norm=(*self.norm, EPS), activation=activation)

        x = self.x[self.sample]
        self.add(
            name,
            one,
            one()[self.sample],
            self._torch(x, weight),
            self._torch(x.double(), weight),
            layout=contender.layout,
            pattern=contender.pattern,
            sparsity=1 - float(weight.count_nonzero()) / weight.numel(),
            weight_bytes=packed.nbytes,
        )
        second = partial(linear, w=packed, bias=self.bias, activation=activation)
        self.against("separate", name, {f"{norm}, {name}": self._after(norm, second) for norm in self.norms})
        self.against("dense", name, self.dense)


def measure(case: KernelCase, rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time and describe one case: a row for each form; empty if no contender is there."""
    return _Normed(case, say).rows(rounds)
