"""Runs the benchmarks: selects cases, prints compact tables and stores the rows; what is measured is elsewhere.

    python -m benchmarks.run --level kernel                        # every layer, layout and dtype
    python -m benchmarks.run --level model --batches 8 --threads 1 # whole models against the peers that are installed
    python -m benchmarks.run --level mlp                           # two linears in one kernel against two kernels
    python -m benchmarks.run --level normed                        # LayerNorm and a linear in one kernel against two
    python -m benchmarks.run --level attention                     # against the backends of PyTorch's
    python -m benchmarks.run --level growth
    python -m benchmarks.run --level kernel --base HEAD~1          # this tree against an older revision
    python -m benchmarks.run --level kernel --quick --only "bitmask 0.5"
    python -m benchmarks.run --device cuda                         # both levels on a GPU, in under ten minutes

Rows replace those of the same key in benchmarks/results/<level>-<cpu>.csv, so a part can be run again; --quick stores
nothing. Run it on an idle machine: one thread is measured in CPU time, several in wall time, a GPU by its events.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks import attention, cases, gpu, growth, kernel, mlp, model, normed, revisions
from benchmarks.cases import Case, ModelCase
from benchmarks.peak import fma_peak
from benchmarks.record import read_rows, results_file, revision, write_rows
from rmtkern.environment import cpu_model
from rmtkern.layouts.cpu import isas
from rmtkern.peers import PEERS
from rmtkern.tables import Table

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "kernel": cases.kernel_cases,
    "mlp": cases.mlp_cases,
    "normed": cases.normed_cases,
    "attention": cases.attention_cases,
    "model": cases.model_cases,
    "growth": cases.growth_cases,
}
MEASURE: dict[str, Any] = {"kernel": kernel, "mlp": mlp, "normed": normed, "attention": attention, "growth": growth}
"""Level -> the module whose rows these are, of those that take a case, rounds and `say`."""
ROUNDS = {"kernel": 15, "mlp": 15, "normed": 9, "attention": 15, "model": 7, "growth": 7}
QUICK_ROUNDS = 3

Rows = Sequence[Mapping[str, Any]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=sorted(CASES), help="needed on the CPU; default on a GPU: kernel and model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"on a GPU; default {gpu.BUDGET_S:g}")
    parser.add_argument("--quick", action="store_true", help="the most important cases, few rounds, and no CSV")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SUBSTRING", help='of "<case> <contender>" as printed; one must fit'
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="model level; default all")
    parser.add_argument("--base", metavar="REV", help="kernel level: time this tree against a git revision")
    parser.add_argument("--threads", type=int, nargs="+", help="only cases with these thread counts")
    parser.add_argument("--batches", type=int, nargs="+", help="model level or GPU: only these batch sizes")
    parser.add_argument("--dtype", choices=cases.DTYPES, help="only contenders of this dtype")
    parser.add_argument("--rounds", type=int, help=f"timed rounds; default {ROUNDS}, with --quick {QUICK_ROUNDS}")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        return _check_cuda(parser, args)
    if args.level is None:
        parser.error(f"--level: say which on the CPU: {', '.join(CASES)}")
    if args.budget is not None:
        parser.error("--budget is for --device cuda")
    if args.base and args.level != "kernel":
        parser.error("--base compares kernels: use it with --level kernel")
    if args.batches and args.level != "model":
        parser.error("--batches chooses among models: use it with --level model")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    return args


def _check_cuda(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The options that a run on a GPU has."""
    if args.level not in (None, *gpu.CASES):
        parser.error(f"--level {args.level} is for the CPU; with --device cuda: {' or '.join(gpu.CASES)}")
    for name in ("base", "threads", "dtype", "rounds"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} is for the CPU; a GPU is timed in bfloat16 until --budget is spent")
    args.budget = gpu.BUDGET_S if args.budget is None else args.budget
    if not args.budget > 0:
        parser.error(f"--budget: expected seconds above 0, got {args.budget}")
    return args


def select(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that the options leave."""
    for case in CASES[args.level]():
        dtype = case.contenders[0].dtype if isinstance(case, ModelCase) else case.dtype
        wrong_batch = args.batches and isinstance(case, ModelCase) and case.batch not in args.batches
        wrong_threads = args.threads and case.threads not in args.threads
        if wrong_batch or wrong_threads or (args.quick and not case.quick) or (args.dtype and dtype != args.dtype):
            continue
        left = cases.only(case, args.only)
        if left is not None:
            yield left


class Said:
    """Prints each line once."""

    def __init__(self) -> None:
        self.lines: set[str] = set()

    def __call__(self, line: str) -> None:
        """Print a line that was not printed before."""
        if line not in self.lines:
            print(line, flush=True)
        self.lines.add(line)


def show(title: str, rows: Rows, columns: Sequence[str]) -> None:
    """A titled table of the columns that some row fills."""
    filled = [name for name in columns if any(row[name] is not None for row in rows)]
    print(f"\n{title}\n" + Table(filled, [[row[name] for name in filled] for row in rows]).to_text(), flush=True)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and store; 1 if the options leave no case that can run here, 2 without the device asked for."""
    args = parse_args(argv)
    if args.device == "cuda":
        return gpu.main(args, Said(), show)
    isa = (isas() or ["none"])[0]
    peaks = ", ".join(f"{dtype} {fma_peak(dtype, isa) or 0:.0f}" for dtype in cases.DTYPES)
    print(f"{cpu_model()}, {isa}, revision {revision()}, torch {torch.__version__}; peak GFLOP/s per thread: {peaks}")
    say, done = Said(), 0
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS[args.level])
    path = results_file("revision" if args.base else args.level)
    with ExitStack() as stack:
        tree = stack.enter_context(revisions.built(args.base)) if args.base else None
        for case in select(args):
            level: Any  # the module whose rows these are
            if isinstance(case, ModelCase):
                level, rows = model, model.measure(case, rounds, args.peers, with_memory=not args.quick, say=say)
            elif tree is not None:
                level, rows = revisions, revisions.measure(case, tree, args.base, rounds, say)
            else:
                level = MEASURE[args.level]
                rows = level.measure(case, rounds, say)
            if not rows:
                continue
            done += len(rows)
            show(case.name, rows, level.SHOWN)
            if not args.quick:
                write_rows(path, rows, level.KEYS)
    if args.level == "growth" and done and not args.quick:
        write_rows(path, growth.mark_flat(read_rows(path)))
    if not done:
        print("nothing was measured: no case fits the options, or nothing in them is available here")
    elif not args.quick:
        print(f"\n{done} rows in {path.name}")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
