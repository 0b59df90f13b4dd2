"""`rmtkern prune`: prune a model and write it as dense safetensors."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkern.api import prune_
from rmtkern.cli.inputs import calibration_of, check_batch, check_output, metadata_of, model_of
from rmtkern.cli.options import SPECTRAL, model_options, prune_options, spectral_options
from rmtkern.cli.outputs import print_made
from rmtkern.cli.verb import Verb
from rmtkern.evaluation import evaluate
from rmtkern.loading import SHRUNK, random_input, save_dense
from rmtkern.pattern_timing import time_patterns
from rmtkern.pruning.budget import BUDGETS
from rmtkern.pruning.plan import PRIORS, PruneConfig
from rmtkern.pruning.presets import BEST, RESTORES
from rmtkern.pruning.repair import REPAIRS
from rmtkern.pruning.score import SCORES
from rmtkern.pruning.times import PatternTimes
from rmtkern.shards import SUFFIX
from rmtkern.speed import prune_to_speed_

__all__ = ["VERB"]

HOW = {"budget": [*BUDGETS, BEST], "score": list(SCORES), "repair": list(REPAIRS), "restore": list(RESTORES)}
"""The parts of a method that `rmtkern prune` lets replace -> their names."""

FIELDS = (*SPECTRAL, "prior", "alpha", "permute", "seed", "spikes")
"""The other fields of a PruneConfig that it has options for."""


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    prune_options(parser)
    parser.add_argument(
        "--calibration", type=Path, help="folder of images (a sub-folder per class) for calibrated methods"
    )
    parser.add_argument("--calibration-images", type=int, default=128, help="how many of them")
    for name, choices in HOW.items():
        parser.add_argument(f"--{name}", choices=choices, help="default: the method's")
    parser.add_argument("--prior", choices=PRIORS, help="method cast: a mask to stay close to, by this method")
    parser.add_argument("--alpha", type=float, default=0.5, help="how close, >= 0; default 0.5")
    spectral_options(parser)
    parser.add_argument(
        "--spikes", type=float, default=1.0, help="pattern spectral: share of the spikes that become factors, (0, 1]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of score random and of the order of images in ser")
    parser.add_argument(
        "--permute",
        action=argparse.BooleanOptionalAction,
        help="let channels change places first, also those of the residual stream (patterns, calibration); default: "
        "inside blocks only, for mini-blocks with method auto",
    )
    parser.add_argument(
        "--max-drop", type=float, help="find the highest sparsity that loses at most so much top-1; 0.01 is one point"
    )
    parser.add_argument(
        "--speedup", type=float, help="find the lowest sparsity whose packed model is so much faster than dense here"
    )
    parser.add_argument(
        "--linear-speedup",
        type=float,
        help="with several patterns: prune until the linears are so many times as fast as dense by their times",
    )
    parser.add_argument(
        "--times",
        type=Path,
        help="with several patterns: JSON of their times; measured, and written there if not there",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="that the times are measured in"
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size for --speedup and for the times of patterns")
    parser.add_argument("--images", type=Path, help="folder of held-out images (a sub-folder per class) for --max-drop")
    parser.add_argument("--evaluate", type=Path, help="folder of images to score before and after")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")


def _timings(args: argparse.Namespace, model: nn.Module, patterns: Sequence[str]) -> PatternTimes:
    """The times of patterns: those of a file if it is there, else measured, and written there if it is named."""
    if args.times is not None and args.times.exists():
        return PatternTimes.load(args.times)
    found = time_patterns(model, random_input(model, args.batch), patterns, dtype=getattr(torch, args.dtype))
    if args.times is not None:
        found.save(args.times)
    return found


def _run(args: argparse.Namespace) -> int:
    check_output(args.output, SUFFIX)
    if args.speedup is not None and (args.sparsity, args.max_drop) != (None, None):
        raise ValueError("--speedup finds the sparsity: give it no --sparsity and no --max-drop")
    check_batch(args.batch)
    if args.max_drop is not None and (args.sparsity is not None or args.images is None):
        raise ValueError("--max-drop finds the sparsity: give it --images FOLDER, and no --sparsity")
    if args.images is not None and args.max_drop is None:
        raise ValueError("--images are for --max-drop; to score a model before and after, use --evaluate FOLDER")
    pattern = args.pattern[0] if len(args.pattern) == 1 else tuple(args.pattern)
    if args.times is not None and isinstance(pattern, str):
        raise ValueError("--times are for choosing among several patterns: give --pattern two or more")
    if args.speedup is not None and not isinstance(pattern, str):
        raise ValueError("--speedup takes one --pattern; with several, use --linear-speedup")
    if args.linear_speedup is not None and (args.sparsity, args.max_drop, args.speedup) != (None, None, None):
        raise ValueError("--linear-speedup finds the sparsity: give it no --sparsity, --max-drop or --speedup")
    check_output(args.times)
    sparsity = PruneConfig().sparsity if args.sparsity is None else args.sparsity
    targets, ignore = tuple(args.targets) if args.targets else None, tuple(args.ignore)
    how: dict[str, Any] = {name: getattr(args, name) for name in (*HOW, *FIELDS)}
    asked = PruneConfig(
        sparsity,
        args.method,
        pattern=pattern,
        targets=targets,
        ignore=ignore,
        linear_speedup=args.linear_speedup,
        **how,
    )
    asked.resolve(args.calibration is not None)  # refuses what it can before images are read and models timed
    model = model_of(args)
    calibration = calibration_of(args, model)
    timings = None if isinstance(pattern, str) else _timings(args, model, pattern)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    if args.speedup is not None:
        example = random_input(model, args.batch)
        found = prune_to_speed_(model, args.speedup, example, asked, calibration)
        plan = found.plan
        if not args.json:
            print(found)
    else:
        plan = prune_(
            model, asked, calibration=calibration, timings=timings, max_drop=args.max_drop, evaluate=args.images
        )
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, plan.to_json(), metadata_of(args.checkpoint, SHRUNK))
    print_made(args, "plan", plan, before, after)
    return 0


VERB = Verb("prune", "prune a model and write it as dense safetensors under its original keys", _options, _run)
