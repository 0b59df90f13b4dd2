"""`rmtkern demo`: the whole way on a real ViT and real images."""

import argparse
from dataclasses import replace
from pathlib import Path

from rmtkern.cli.outputs import print_json
from rmtkern.cli.verb import Verb

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo-output"), help="folder for the picture and the JSON"
    )
    parser.add_argument("--images", type=int, help="score only so many of the 10,000 test images")
    parser.add_argument(
        "--quick", action="store_true", help="a few images and short timings: a check, not a measurement"
    )


def _run(args: argparse.Namespace) -> int:
    from rmtkern.demo.run import FULL, QUICK, run_demo

    effort = QUICK if args.quick else FULL
    if args.images is not None:
        effort = replace(effort, images=args.images)
    say = (lambda text: None) if args.json else (lambda text: print(text + "\n", flush=True))
    results = run_demo(args.output, say, effort=effort)
    if args.json:
        print_json(results)
    return 0


VERB = Verb("demo", "analyse, prune, pack and time a real ViT on real images", _options, _run)
