"""Runs the papers' experiments and stores what they found.

    python -m benchmarks.paper [C1 T5 ...] [--seeds 5] [--data FOLDER] [--out benchmarks/results/paper.csv]

One row per number and seed. It exits with 1 if a number does not confirm its claim. C4 needs the images, and is not run
without them unless it is asked for. C3 and C5 are in benchmarks.paper.fully_connected.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.paper import certificates, outer_scale, regression, spectra, structured, theory
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
ON_IMAGES: dict[str, Callable[[int, Path], Iterator[Finding]]] = {"C4": outer_scale.c4}
"""Those that need the folder of Fashion-MNIST."""
KEYS = ("experiment", "quantity", "setting", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and store."""
    known = [*EXPERIMENTS, *ON_IMAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="ID", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. n - 1")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="four idx files")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.experiments if name not in known]:
        parser.error(f"unknown experiment {unknown[0]!r}; known: {', '.join(known)}")
    rows = []
    for name in args.experiments or (known if args.data.is_dir() else EXPERIMENTS):
        for seed in range(args.seeds):
            found = ON_IMAGES[name](seed, args.data) if name in ON_IMAGES else EXPERIMENTS[name](seed)
            rows += [{"seed": seed, **finding.row()} for finding in found]
        if args.out:
            write_rows(args.out, [stamped(row) for row in rows], KEYS)
    shown = ("experiment", "seed", "quantity", "setting", "measured", "low", "high", "published", "holds")
    print(Table(shown, [[row[key] for key in shown] for row in rows]).to_text())
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
