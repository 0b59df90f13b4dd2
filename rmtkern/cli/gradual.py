"""`rmtkern gradual`: prune and fine-tune in turn."""

import argparse
from pathlib import Path

from rmtkern.cli.inputs import check_output, images_and_labels, metadata_of, model_of
from rmtkern.cli.options import (
    SPECTRAL,
    model_options,
    settings_of,
    settings_options,
    spectral_options,
    train_options,
)
from rmtkern.cli.outputs import print_made
from rmtkern.cli.verb import Verb
from rmtkern.evaluation import evaluate
from rmtkern.gradual import CYCLE, DROP_THRESHOLD, GRID, prune_gradually_
from rmtkern.loading import SHRUNK, save_dense
from rmtkern.pruning.presets import PRESETS
from rmtkern.shards import SUFFIX

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    train_options(parser)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(GRID), help="rising, each [0, 1)")
    parser.add_argument(
        "--method", default="hybrid", help=f"hybrid, {DROP_THRESHOLD} (needs --held-out), {', '.join(PRESETS)}"
    )
    parser.add_argument("--drop", type=float, default=0.007, help=f"top-1 that {DROP_THRESHOLD} lets magnitude lose")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or mini-blocks such as 4x1")
    parser.add_argument("--targets", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    parser.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs to leave out")
    spectral_options(parser)
    settings_options(parser, CYCLE)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output, SUFFIX)
    config = settings_of(args)
    model = model_of(args)
    data = images_and_labels(args.train, model, args.train_images)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    found = prune_gradually_(
        model,
        data,
        args.sparsities,
        args.method,
        held_out=None if args.held_out is None else images_and_labels(args.held_out, model),
        drop=args.drop,
        pattern=args.pattern,
        targets=tuple(args.targets) if args.targets else None,
        ignore=tuple(args.ignore),
        teacher=args.teacher,
        finetune=config,
        seed=args.seed,
        show_progress=False if args.json else None,
        **{name: getattr(args, name) for name in SPECTRAL},
    )
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, found.plan.to_json(), metadata_of(args.checkpoint, SHRUNK))
    print_made(args, None, found, before, after)
    return 0


VERB = Verb("gradual", "prune to one sparsity after another and fine-tune after each", _options, _run)
