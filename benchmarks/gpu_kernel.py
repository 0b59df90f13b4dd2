"""The kernel level on a GPU: every layout against cuBLAS, torch.compile and torch's 2:4, interleaved, correct first.

It measures one case of cases.py and returns its rows; gpu.py adds what they have in common.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from benchmarks import contenders
from benchmarks.cases import LAYERS, KernelCase
from benchmarks.contenders import Contender, Unavailable
from benchmarks.kernel import ACTIVATIONS, CHECKED, relative_error
from benchmarks.timing import quantiles
from rmtkern.errors import KernelUnavailable
from rmtkern.layouts.base import PackedWeight
from rmtkern.ops import KERNELS, linear, load_kernels
from rmtkern.packing.events import EventTimer
from rmtkern.testing import accuracy_excess

if TYPE_CHECKING:
    from benchmarks.gpu import Gpu

__all__ = ["KEYS", "SHOWN", "measure"]

KEYS = ("layer", "T", "dtype", "activation", "form", "gpu", "triton", "torch")
"""Columns that identify a row."""
SHOWN = ("form", "launch", "p50_ms", "vs_cublas", "vs_strongest", "strongest", "vs_torch_2_4", "gflops", "max_rel_err")
"""Columns that are printed."""
BUDGET_MS = 1500.0
"""Time of the device for the calls of one case."""
DENSE = ("dense torch", "dense compile")
"""The forms that compute the dense layer by PyTorch."""
TWO_OF_FOUR = "torch 2:4"


@functools.lru_cache(maxsize=64)
def _packed(
    name: str, n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, PackedWeight]:
    """A contender's weight [N, K] and the same in its layout, on the device; kept for the other batches."""
    torch.manual_seed(0)
    weight, packed = contenders.build(contenders.parse(name), n_rows, n_cols, dtype)
    return weight.to(device), packed.to(device)


class _Layer:
    """The calls of one case, all checked, and the columns of each that do not depend on time."""

    def __init__(self, case: KernelCase, device: torch.device, say: Callable[[str], None]) -> None:
        torch.manual_seed(0)
        self.case, self.say, self.device = case, say, device
        self.n_rows, self.n_cols = LAYERS[case.layer]
        self.dtype = getattr(torch, case.dtype)
        self.function = ACTIVATIONS[case.activation][0]
        self.x = torch.randn(case.tokens, self.n_cols, device=device, dtype=self.dtype)
        self.bias = torch.randn(self.n_rows, device=device, dtype=self.dtype)
        self.sample = torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED)).long().to(device)
        self.calls: dict[str, Callable[[], Tensor]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def add_dense(self) -> None:
        """PyTorch's own forms of the dense layer; compiled only where there is something to fuse."""
        x, bias, function = self.x, self.bias, self.function
        weight = torch.randn(self.n_rows, self.n_cols, device=self.device, dtype=self.dtype)
        columns = {"layout": "dense", "pattern": None, "sparsity": 0.0, "weight_bytes": weight.nbytes}

        def call() -> Tensor:
            y: Tensor = function(F.linear(x, weight, bias))
            return y

        self._add("dense torch", call, weight, weight.numel(), ours=False, **columns)
        if self.case.activation is not None:
            torch._dynamo.reset()
            self._add(
                "dense compile", torch.compile(call, dynamic=False), weight, weight.numel(), ours=False, **columns
            )

    def add_two_of_four(self) -> None:
        """PyTorch's semi-structured sparsity."""
        weight, _ = _packed("nofm 2:4", self.n_rows, self.n_cols, self.dtype, self.device)
        try:
            sparse = to_sparse_semi_structured(weight)
            x, bias, function = self.x, self.bias, self.function
            columns = {"layout": "torch", "pattern": "2:4", "sparsity": 0.5, "weight_bytes": weight.nbytes * 9 // 16}
            self._add(
                TWO_OF_FOUR,
                lambda: function(F.linear(x, sparse, bias)),
                weight,
                weight.numel() // 2,
                ours=False,
                **columns,
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as reason:
            self.say(f"skip {TWO_OF_FOUR}: {str(reason).partition(chr(10))[0]}")

    def add(self, name: str) -> None:
        """A contender, by each of its kernels if it has several; a line for what is not there."""
        contender = contenders.parse(name)
        backends: tuple[str | None, ...] = (None,)
        if contender.layout == "nofm":
            load_kernels("nofm")
            backends = (None,) if isinstance(KERNELS["nofm"]["cuda"], str) else ("cuda", "triton")
        for backend in backends:
            self._add_packed(name, contender, backend)

    def _add_packed(self, name: str, contender: Contender, backend: str | None) -> None:
        title = name if backend is None else f"{name} {backend}"
        try:
            weight, packed = _packed(name, self.n_rows, self.n_cols, self.dtype, self.device)
            x, bias, activation = self.x, self.bias, self.case.activation
            linear(x[:1], packed, bias, activation=activation, backend=backend)
        except (Unavailable, KernelUnavailable) as reason:
            self.say(f"skip {title}: {reason}")
            return
        effective = packed.unpack() if "rank" in contender.numbers else weight
        self._add(
            title,
            lambda: linear(x, packed, bias, activation=activation, backend=backend),
            effective,
            contender.executed(weight),
            ours=True,
            layout=contender.layout,
            pattern=contender.pattern,
            sparsity=1 - float(weight.count_nonzero()) / weight.numel(),
            weight_bytes=packed.nbytes,
        )

    def _add(
        self, name: str, call: Callable[[], Tensor], weight: Tensor, products: float, *, ours: bool, **columns: Any
    ) -> None:
        y, x, activation = call()[self.sample], self.x[self.sample], self.case.activation
        excess = accuracy_excess(y, x, weight, self.bias, activation)
        if not excess <= 1:
            problem = f"{name}: {excess:.2g} times the error that is allowed"
            if ours:
                raise RuntimeError(problem)
            self.say(f"skip {problem}")
            return
        error = relative_error(y, x, weight, self.bias, activation)
        self.calls[name] = call
        self.facts[name] = {**columns, "max_rel_err": error, "flops": 2.0 * self.case.tokens * products}


def measure(case: KernelCase, gpu: "Gpu", say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Check, time and describe one case.

    Args:
        case: of cases.py.
        gpu: where it runs.
        say: gets a line about each contender that is not there.

    Returns:
        A row for each form.

    Raises:
        RuntimeError: a kernel of ours misses the accuracy rule of rmtkern.testing.
    """
    layer = _Layer(case, gpu.device, say)
    layer.add_dense()
    layer.add_two_of_four()
    for name in case.contenders:
        layer.add(name)
    timer = EventTimer(gpu.clock)
    times = {name: quantiles(np.array(taken)) for name, taken in timer.samples(layer.calls, BUDGET_MS).items()}
    p50 = {name: found["p50_ms"] for name, found in times.items()}
    strongest = min((name for name in DENSE if name in p50), key=p50.__getitem__)
    dense_flops = 2.0 * case.tokens * layer.n_rows * layer.n_cols
    rows = []
    for name, found in times.items():
        facts = dict(layer.facts[name])
        flops = facts.pop("flops")
        rows.append(
            {
                "layer": case.layer,
                "T": case.tokens,
                "N": layer.n_rows,
                "K": layer.n_cols,
                "dtype": case.dtype,
                "activation": case.activation,
                "form": name,
                "launch": timer.how,
                **found,
                "vs_cublas": p50["dense torch"] / p50[name],
                "vs_strongest": p50[strongest] / p50[name],
                "strongest": strongest,
                "vs_torch_2_4": p50[TWO_OF_FOUR] / p50[name] if TWO_OF_FOUR in p50 else None,
                "gflops": flops / p50[name] / 1e6,
                "gflops_dense_equivalent": dense_flops / p50[name] / 1e6,
                **facts,
            }
        )
    return rows
