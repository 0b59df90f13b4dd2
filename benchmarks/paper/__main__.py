"""Runs the papers' experiments and stores what they found.

    python -m benchmarks.paper [C1 T5 ...] [--seeds 5] [--out benchmarks/results/paper.csv]

One row per number and seed. It exits with 1 if a number does not confirm its claim.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.paper import certificates, regression, spectra, structured, theory
from benchmarks.paper.finding import Finding
from benchmarks.record import stamped, write_rows
from rmtkern.tables import Table

EXPERIMENTS: dict[str, Callable[[int], Iterator[Finding]]] = {
    "C1": spectra.c1,
    "C2": spectra.c2,
    "C2b": spectra.c2b,
    "C6": regression.c6,
    "T5": theory.t5,
    "T6": theory.t6,
    "T7": certificates.t7,
    "T8": theory.t8,
    "T9": theory.t9,
    "T10": theory.t10,
    "T11": structured.t11,
    "T12": structured.t12,
    "T14": theory.t14,
}
KEYS = ("experiment", "quantity", "setting", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="ID", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n - 1")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.experiments if name not in EXPERIMENTS]:
        parser.error(f"unknown experiment {unknown[0]!r}; known: {', '.join(EXPERIMENTS)}")
    rows = []
    for name in args.experiments or EXPERIMENTS:
        for seed in range(args.seeds):
            rows += [{"seed": seed, **finding.row()} for finding in EXPERIMENTS[name](seed)]
        if args.out:
            write_rows(args.out, [stamped(row) for row in rows], KEYS)
    shown = ("experiment", "seed", "quantity", "setting", "measured", "low", "high", "published", "holds")
    print(Table(shown, [[row[key] for key in shown] for row in rows]).to_text())
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
