"""What the levels of fused kernels share: calls that are checked, timed in one interleaved run, and made into rows.

mlp.py, normed.py and attention.py say what is fused and what it is up against.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.cases import AttentionCase, KernelCase
from benchmarks.contenders import Contender, Unavailable
from benchmarks.kernel import CHECKED, ROUND_FLOPS
from benchmarks.record import stamped
from benchmarks.timing import clock_for, interleaved, quantiles
from rmtkern.layouts import cpu
from rmtkern.layouts.base import PackedWeight
from rmtkern.testing import excess_over

__all__ = ["Contest"]

Call = Callable[[], Tensor]


class Contest:
    """The calls of one case: kernels that do several steps in one, and what does the same steps otherwise.

    Args:
        case: sets torch's thread count and the seed.
        flops: of one call, were it dense.
        head: the columns that all rows begin with.
        say: gets a line about each contender that is not there.
    """

    def __init__(
        self, case: KernelCase | AttentionCase, flops: float, head: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        self.case, self.flops, self.head, self.say = case, flops, head, say
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.sample = torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED)).long()
        """Tokens that are checked against float64."""
        self.calls: dict[str, Call] = {}
        self.rivals: dict[str, dict[str, Sequence[str]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def random(self, *shape: int) -> Tensor:
        """Normal numbers in the case's dtype."""
        return torch.randn(*shape).to(self.dtype)

    def contend(self, one: Callable[[str], None]) -> None:
        """Set up each contender by `one(name)`; a line about each that raises Unavailable."""
        for name in self.case.contenders:
            try:
                one(name)
            except Unavailable as reason:
                self.say(f"skip {reason}")

    def weight(self, contender: Contender, n_rows: int, n_cols: int) -> tuple[Tensor, PackedWeight]:
        """A random weight [N, K] of the contender's pattern with outputs of variance 1, and the same in its layout."""
        weight = (contenders.random_weight(contender, n_rows, n_cols) / n_cols**0.5).to(self.dtype)
        return weight, contenders.pack(contender, weight)

    def add(self, name: str, call: Call, got: Tensor, dense: Tensor, exact: Tensor, **facts: Any) -> None:
        """Add a contender, if it is as accurate as it must be.

        Args:
            name: of the contender.
            call: what is timed.
            got: its result, all or a part.
            dense: what PyTorch computes for that in the case's dtype.
            exact: the same in float64.
            facts: columns of its row that do not depend on time.

        Raises:
            RuntimeError: it misses the accuracy rule, twice the error of PyTorch's and 4 eps of the output's scale.
        """
        excess = excess_over(got, dense, exact)
        if not excess <= 1:
            raise RuntimeError(f"{self.case.name} {name}: {excess:.2g} times the error that is allowed")
        self.calls[name] = call
        error = float((got.double() - exact).abs().max() / exact.abs().max())
        self.facts[name] = {**facts, "max_rel_err": error}

    def against(self, kind: str, name: str, calls: Mapping[str, Call]) -> None:
        """Let a contender be compared with the fastest of some calls, which several contenders may share."""
        self.calls |= calls
        self.rivals.setdefault(kind, {})[name] = tuple(calls)

    def rows(self, rounds: int) -> list[dict[str, Any]]:
        """Time all calls in one interleaved run.

        Args:
            rounds: that count.

        Returns:
            A row for each contender. For each kind of rival `<kind>_ms`, of the fastest, and `vs_<kind>`, that over
            the contender's time; where there are several, `<kind>_by` names the fastest. Empty without a contender.
        """
        if not self.facts:
            return []
        clock = clock_for(self.case.threads)
        times = interleaved(self.calls, clock, rounds, max(1, int(ROUND_FLOPS / self.flops)))
        p50 = {name: quantiles(samples)["p50_ms"] for name, samples in times.items()}
        rows = []
        for name, facts in self.facts.items():
            row = {**self.head, "form": name, "threads": self.case.threads, "clock": clock.name}
            row |= quantiles(times[name])
            for kind, rivals in self.rivals.items():
                fastest = min(rivals[name], key=p50.__getitem__)
                row |= {f"{kind}_ms": p50[fastest], f"vs_{kind}": p50[fastest] / p50[name]}
                if len(rivals[name]) > 1:
                    row[f"{kind}_by"] = fastest
            rows.append(stamped(row | facts, isa=(cpu.isas() or ["none"])[0]))
        return rows
