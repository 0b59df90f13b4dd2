"""`rmtkern shrink`: remove hidden features and heads and write the smaller dense model."""

import argparse
from pathlib import Path

from rmtkern.cli.inputs import calibration_of, check_output, metadata_of, model_of
from rmtkern.cli.options import model_options
from rmtkern.cli.outputs import print_made
from rmtkern.cli.verb import Verb
from rmtkern.evaluation import evaluate
from rmtkern.loading import SHRUNK, save_dense
from rmtkern.shards import SUFFIX
from rmtkern.shrinking import shrink_

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--mlp", type=float, default=0.0, help="share of the hidden features of each MLP, [0, 1)")
    parser.add_argument("--heads", type=float, default=0.0, help="share of the heads of each attention, [0, 1)")
    parser.add_argument("--multiple", type=int, default=16, help="hidden features stay in multiples of so many")
    parser.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs whose blocks stay whole")
    parser.add_argument("--calibration", type=Path, help="folder of images; without one, norms choose")
    parser.add_argument("--calibration-images", type=int, default=128, help="how many of them")
    parser.add_argument("--evaluate", type=Path, help="folder of images to score before and after")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output, SUFFIX)
    if metadata_of(args.checkpoint, SHRUNK) is not None:
        raise ValueError(f"{args.checkpoint}: it was made smaller already; shrink the model that it came from")
    model = model_of(args)
    calibration = calibration_of(args, model)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    plan = shrink_(model, args.mlp, args.heads, calibration, ignore=tuple(args.ignore), multiple=args.multiple)
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, None, plan.to_json())
    print_made(args, "plan", plan, before, after)
    return 0


VERB = Verb("shrink", "remove hidden features and attention heads of a model and write what is left", _options, _run)
