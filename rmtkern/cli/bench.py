"""`rmtkern bench`: pack a pruned model and time it against the strongest dense form, and against other engines."""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

from rmtkern.api import prune_
from rmtkern.cli.inputs import check_output, metadata_of, model_of
from rmtkern.cli.options import model_options, prune_options
from rmtkern.cli.outputs import print_json
from rmtkern.cli.verb import Verb
from rmtkern.comparison import DEFAULT, ENGINES, check_engines, compare
from rmtkern.environment import environment, environment_line
from rmtkern.files import save
from rmtkern.loading import SHRUNK, random_input
from rmtkern.packing import is_packed, pack_
from rmtkern.shards import target_of
from rmtkern.shrink_plan import ShrinkPlan

__all__ = ["VERB"]

SLOWER = 0.97
"""A packed model under this share of the dense speed counts as slower; closer than that is the noise of timing."""


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    prune_options(parser)
    parser.add_argument("--keep-zeros", action="store_true", help="do not prune: take the zeros of the checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="batch sizes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="both sides run in it")
    parser.add_argument(
        "--compare", nargs="?", const=",".join(DEFAULT), help=f"also time other engines: a list of {', '.join(ENGINES)}"
    )
    parser.add_argument("--decisions", type=Path, help="JSON file of measured times to use again and to complete")
    parser.add_argument("-o", "--output", type=Path, help="also write the packed model, for rmtkern.load")


def _run(args: argparse.Namespace) -> int:
    if min(args.batch) < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if len(args.pattern) > 1:
        raise ValueError("one --pattern at a time: prune with several first, then bench --keep-zeros")
    engines = None if args.compare is None else [name for name in args.compare.split(",") if name]
    check_engines(engines or ())
    if args.keep_zeros and args.sparsity is not None:
        raise ValueError("--keep-zeros takes the zeros of the checkpoint: give it no --sparsity")
    if args.output is not None and not args.output.is_dir():
        target_of(args.output)  # refuses a file without the ending of a checkpoint
        check_output(args.output, args.output.suffix.lower())
    model = model_of(args)
    plan = None
    if not args.keep_zeros:
        targets = tuple(args.targets) if args.targets else None
        plan = prune_(model, args.sparsity, args.method, args.pattern[0], targets, tuple(args.ignore))
    packed = copy.deepcopy(model)
    examples = [random_input(model, batch) for batch in args.batch]
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    report = pack_(packed, examples, dtype=dtype, decisions=args.decisions)
    if worth_saving := args.output is not None and is_packed(packed):
        shrunk = metadata_of(args.checkpoint, SHRUNK)
        save(packed, args.output, plan, None if shrunk is None else ShrinkPlan.from_json(shrunk))
    compared = []
    for example in examples if engines is not None else ():
        compared.append(compare(model, example, engines or (), dtype=dtype or torch.float32, packed=packed))
    if args.json:
        found = {} if engines is None else {"compared": [json.loads(one.to_json()) for one in compared]}
        print_json({"environment": environment(), **json.loads(report.to_json()), **found})
    else:
        print("\n\n".join([environment_line(), str(report), *map(str, compared)]))
    if args.output is not None and not worth_saving:
        print(
            f"rmtkern bench: nothing gained, so every layer stays dense and {args.output} was not written; serve the"
            " model as it is",
            file=sys.stderr,
        )
        return 1
    speedups = [times.speedup for times in report.end_to_end]
    speedups += [one.speedup for one in compared if one.speedup is not None]
    if any(speedup < SLOWER for speedup in speedups):
        print("rmtkern bench: the packed model is slower than the strongest dense form", file=sys.stderr)
        return 1
    return 0


VERB = Verb("bench", "pack a pruned model and time it against the strongest dense form", _options, _run)
