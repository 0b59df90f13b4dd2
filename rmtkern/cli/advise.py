"""`rmtkern advise`: which dtype and pattern would make a model how much faster here."""

import argparse
import json

from rmtkern.advice import advise
from rmtkern.cli.inputs import check_batch, model_of
from rmtkern.cli.options import model_options
from rmtkern.cli.outputs import print_json
from rmtkern.cli.verb import Verb
from rmtkern.environment import environment, environment_line
from rmtkern.loading import random_input
from rmtkern.pattern_timing import PATTERNS

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--batch", type=int, default=8, help="batch size")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="fractions of zeros")
    parser.add_argument("--pattern", nargs="+", default=list(PATTERNS), help="as prune takes them")


def _run(args: argparse.Namespace) -> int:
    check_batch(args.batch)
    model = model_of(args)
    example = random_input(model, args.batch)
    advice = advise(model, example, patterns=args.pattern, sparsities=args.sparsity)
    if args.json:
        print_json({"environment": environment(), **json.loads(advice.to_json())})
    else:
        print(f"{environment_line()}\n\n{advice}")
    return 0


VERB = Verb(
    "advise", "measure which dtype and pattern would make a model how much faster on this machine", _options, _run
)
