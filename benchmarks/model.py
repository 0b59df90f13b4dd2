"""The model level: a whole pruned and packed model against dense peers, all in one interleaved run, outputs checked.

It measures one case of cases.py and returns its rows; how a peer is set up is in peers.py.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import ModelCase, Pruned
from benchmarks.contenders import Unavailable
from benchmarks.memory import peak_mib
from benchmarks.peak import fma_peak
from benchmarks.record import stamped
from benchmarks.timing import clock_for, interleaved, quantiles, threads_used
from rmtkern.api import prune_
from rmtkern.comparison import allowed_error, relative_error
from rmtkern.environment import version
from rmtkern.layouts.cpu import isas
from rmtkern.packing import pack_
from rmtkern.peers import PEERS, Call, PeerMissing, prepare
from rmtkern.pruning.pattern import parse_pattern

__all__ = ["KEYS", "SHOWN", "measure", "ratio_column"]

KEYS = ("model", "batch", "threads", "form", "isa")
"""Columns that identify a row."""
ONE_THREAD = 1.1
"""CPU time of all threads over that of the busiest one, up to which a peer counts as single-threaded."""
PACKAGES = ("timm", "openvino", "onnxruntime", "nncf")

Say = Callable[[str], None]


def ratio_column(peer: str) -> str:
    """The column that holds time of that peer over time of the row: "vs_openvino_fp32" of "openvino-fp32"."""
    return "vs_" + peer.replace("-", "_")


SHOWN = ("form", "p50_ms", *map(ratio_column, PEERS), "vs_dense", "max_rel_err", "peak_extra_mib", "pack_seconds")
"""Columns that run.py prints."""


class _Work:
    """Flops of the dense model on an example, as a whole and of each linear."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        with FlopCounterMode(display=False) as counter:
            model(images)
        self.total = float(counter.get_total_flops())
        counts = counter.get_flop_counts()
        root = type(model).__name__
        self.linears = {
            name: float(sum(counts.get(f"{root}.{name}", {}).values()))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def executed(self, model: nn.Module) -> float:
        """Flops without those of zero weights of the linears of a pruned model."""
        skipped = 0.0
        for name, flops in self.linears.items():
            weight = model.get_submodule(name).weight
            skipped += flops * (1 - int(weight.count_nonzero()) / weight.numel())
        return self.total - skipped


def _prune(pruned: Pruned, model: nn.Module) -> None:
    """prune_; Unavailable if this library does not have the pattern."""
    if pruned.pattern == "dense":
        return
    try:
        parse_pattern(pruned.pattern)
    except ValueError as error:
        raise Unavailable(f"{pruned.name}: {error}") from error
    prune_(model, pruned.sparsity, "uniform", pruned.pattern, show_progress=False)


class _Contest:
    """The calls of one case, checked, and the columns of each that do not depend on time."""

    def __init__(self, case: ModelCase, with_memory: bool, say: Say) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        self.case, self.say, self.with_memory = case, say, with_memory
        self.dense = timm.create_model(case.model).eval()
        self.images = torch.randn(case.batch, *self.dense.default_cfg["input_size"])
        self.work = _Work(self.dense, self.images)
        self.exact = self.dense(self.images)
        self.calls: dict[str, Call] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.dense_peak: dict[str, float] = {}

    def add_peer(self, name: str) -> None:
        """Set up one peer on the dense model; a line if it is not there."""
        dtype, threads = PEERS[name].dtype, self.case.threads
        try:
            call = prepare(name, self.dense, self.images, threads)
        except PeerMissing as reason:
            self.say(f"skip {reason}")
            return
        error = self._check(name, dtype, call(), self.dense, self.exact)
        used = threads_used(call) if threads == 1 else 1.0
        if used > ONE_THREAD:
            self.say(f"skip peer {name}: it computes on {used:.1f} threads where 1 was asked for")
            return
        self.calls[name] = call
        self.facts[name] = self._columns(dtype, None, 0.0, error, self.work.total)

    def add_packed(self, pruned: Pruned) -> None:
        """Prune, pack and check one model; a line if this library cannot."""
        model = copy.deepcopy(self.dense)
        try:
            _prune(pruned, model)
            exact, executed = model(self.images), self.work.executed(model)
            original = copy.deepcopy(model)
            start = time.perf_counter()
            report = pack_(model, self.images, dtype=getattr(torch, pruned.dtype), show_progress=False)
            seconds = time.perf_counter() - start
        except Unavailable as reason:
            self.say(f"skip {reason}")
            return
        error = self._check(pruned.name, pruned.dtype, model(self.images), original, exact)
        self.calls[pruned.name] = lambda: model(self.images)
        forms = Counter(layer.form for layer in report.layers)
        kernels = {kernel: sum(site.used for site in sites) for kernel, sites in report.sites.items()}
        self.facts[pruned.name] = self._columns(
            pruned.dtype,
            pruned.pattern,
            pruned.sparsity,
            error,
            executed,
            mib_before=report.nbytes_before / 2**20,
            mib_after=report.nbytes_after / 2**20,
            **self._memory(pruned.dtype, model),
            pack_seconds=seconds,
            forms="; ".join(f"{form} x{count}" for form, count in forms.most_common()),
            kernels="; ".join(f"{kernel} x{count}" for kernel, count in kernels.items() if count),
            notes="; ".join(report.notes),
        )

    def _check(self, name: str, dtype: str, got: Tensor, model: nn.Module, exact: Tensor) -> float:
        error, allowed = relative_error(got, exact), allowed_error(dtype, model, self.images, exact)
        if not error <= allowed:
            raise RuntimeError(f"{self.case.name} {name}: relative error {error:.2g}, allowed {allowed:.2g}")
        return error

    def _memory(self, dtype: str, model: nn.Module) -> dict[str, float | None]:
        if not self.with_memory:
            return {}
        kind, threads = getattr(torch, dtype), self.case.threads
        if dtype not in self.dense_peak:
            plain = copy.deepcopy(self.dense).to(kind)
            self.dense_peak[dtype] = peak_mib(plain, self.images.to(kind), threads)
        peak = peak_mib(model, self.images, threads)
        return {"peak_mib": peak, "peak_extra_mib": peak - self.dense_peak[dtype]}

    def _columns(
        self, dtype: str, pattern: str | None, sparsity: float, error: float, flops: float, **packed: Any
    ) -> dict[str, Any]:
        names = ("mib_before", "mib_after", "peak_mib", "peak_extra_mib", "pack_seconds", "forms", "kernels", "notes")
        head = {"dtype": dtype, "pattern": pattern, "sparsity": sparsity, "max_rel_err": error, "flops": flops}
        return head | {name: packed.get(name) for name in names}


def measure(
    case: ModelCase, rounds: int, peers: Sequence[str] = tuple(PEERS), *, with_memory: bool = True, say: Say = print
) -> list[dict[str, Any]]:
    """Set up, check, time and describe one case.

    Args:
        case: of cases.py; all its contenders and the peers are timed in one interleaved run.
        rounds: that count.
        peers: names in PEERS; a missing one is said and left out.
        with_memory: also measure peak memory, in processes of their own.
        say: gets a line about each contender and peer that is not there.

    Returns:
        A row for each peer and each contender; empty if no contender is there.

    Raises:
        RuntimeError: an output is wrong.
    """
    contest = _Contest(case, with_memory, say)
    for pruned in case.contenders:
        contest.add_packed(pruned)
    if not contest.calls:
        return []
    for name in peers:
        contest.add_peer(name)
    clock = clock_for(case.threads, own_threads=True)
    times = interleaved(contest.calls, clock, rounds)
    return [_row(case, name, samples, contest, times, clock.name) for name, samples in times.items()]


def _row(
    case: ModelCase, name: str, samples: Any, contest: _Contest, times: Mapping[str, Any], clock: str
) -> dict[str, Any]:
    facts = dict(contest.facts[name])
    p50 = {form: quantiles(taken)["p50_ms"] for form, taken in times.items()}
    mine, dtype = p50[name], facts.pop("dtype")
    isa = (isas() or ["none"])[0]
    peak = fma_peak(dtype, isa)
    executed = facts.pop("flops") / mine / 1e6
    dense = Pruned(dtype).name
    rivals = [peer for peer in PEERS if peer in p50 and PEERS[peer].dtype == dtype]
    strongest = min(rivals, key=p50.__getitem__) if rivals else None
    row = {
        "model": case.model,
        "batch": case.batch,
        "threads": case.threads,
        "form": name,
        "dtype": dtype,
        "pattern": facts.pop("pattern"),
        "sparsity": facts.pop("sparsity"),
        "clock": clock,
        **quantiles(samples),
        **{ratio_column(peer): p50[peer] / mine if peer in p50 else None for peer in PEERS},
        "vs_dense": p50[dense] / mine if dense in p50 else None,
        "vs_strongest": p50[strongest] / mine if strongest else None,
        "strongest": strongest,
        "max_rel_err": facts.pop("max_rel_err"),
        "gflops": executed,
        "gflops_dense_equivalent": contest.work.total / mine / 1e6,
        "peak_share": executed / peak / case.threads if peak else None,
        **facts,
    }
    versions = {package: version(package) for package in PACKAGES}
    return stamped(row, isa=isa, peak_gflops=peak, **versions)
