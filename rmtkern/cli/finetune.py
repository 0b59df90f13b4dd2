"""`rmtkern finetune`: train the surviving weights of a pruned model."""

import argparse
from pathlib import Path

from rmtkern.cli.inputs import check_output, images_and_labels, metadata_of, model_of
from rmtkern.cli.options import model_options, settings_of, settings_options, train_options
from rmtkern.cli.outputs import print_made
from rmtkern.cli.verb import Verb
from rmtkern.evaluation import evaluate
from rmtkern.loading import SHRUNK, load_plan, save_dense
from rmtkern.shards import SUFFIX
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    train_options(parser)
    parser.add_argument("--run", type=Path, help="safetensors file with the whole run after every epoch; gone on from")
    settings_options(parser, FinetuneConfig())
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output, SUFFIX)
    check_output(args.run, SUFFIX)
    config = settings_of(args)
    model = model_of(args)
    stored = metadata_of(args.checkpoint, "rmtkern")
    plan = None if stored is None else load_plan(args.checkpoint)
    data = images_and_labels(args.train, model, args.train_images)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    report = finetune_(
        model,
        plan,
        data,
        held_out=None if args.held_out is None else images_and_labels(args.held_out, model),
        teacher=args.teacher,
        config=config,
        checkpoint=args.run,
        resume=args.run is not None,
        show_progress=False if args.json else None,
    )
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, stored, metadata_of(args.checkpoint, SHRUNK))
    print_made(args, "report", report, before, after)
    return 0


VERB = Verb(
    "finetune", "train the surviving weights of a pruned model; the zeros of its checkpoint stay zero", _options, _run
)
