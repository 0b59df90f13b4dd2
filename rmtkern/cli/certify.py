"""`rmtkern certify`: bounds of what pruning did."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkern.certificates import certify
from rmtkern.cli.inputs import metadata_of, model_of, read_json
from rmtkern.cli.options import model_options
from rmtkern.cli.verb import Verb
from rmtkern.evaluation import folder_batches, preprocessing_of
from rmtkern.loading import load_plan
from rmtkern.pruning.plan import PrunePlan

__all__ = ["VERB"]

PLAN = "the JSON of a plan, or a checkpoint that holds one"


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pruned", type=Path, help="checkpoint of the pruned model; the model itself is the dense one")
    which.add_argument("--plan", type=Path, help="plan of prune without --calibration, to repeat on the dense model: "
                       "the JSON that prune --json printed, or a checkpoint that holds one")  # fmt: skip
    parser.add_argument("--images", type=Path, required=True, help="folder of a few hundred images in sub-folders")
    parser.add_argument("--limit", type=int, help="use only so many of them, evenly over the sub-folders")
    parser.add_argument("--no-labels", action="store_true", help="the sub-folders are not the classes of the model")
    parser.add_argument("--l2", type=float, default=0.0, help="weight of the sum of squares in the objective")
    parser.add_argument("--l1", type=float, default=0.0, help="weight of the sum of absolute values in the objective")
    parser.add_argument("--restore", action="store_true", help="also measure the model with each weight restored")
    parser.add_argument("--local", action="store_true", help="also estimate each step from gradients")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="run both models in it; default: in their own")
    parser.add_argument("--batch", type=int, default=32, help="images at a time")


def _run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if args.pruned is not None and args.random_weights and args.checkpoint is None and ":" not in args.model:
        raise ValueError(
            "--random-weights draws other weights than those that were pruned; give --checkpoint FILE with the dense "
            "ones, or --plan"
        )
    dense = model_of(args)
    reference: nn.Module | PrunePlan = dense
    model = dense
    if args.pruned is not None:
        model = model_of(args, args.pruned)
        if metadata_of(args.pruned, "rmtkern") is not None:
            load_plan(args.pruned).verify(model)
    else:
        reference = (
            load_plan(args.plan) if args.plan.suffix == ".safetensors" else read_json(args.plan, _plan_of_json, PLAN)
        )
    images: Iterable[Any] = folder_batches(
        args.images, preprocessing_of(dense), batch_size=args.batch, limit=args.limit
    )
    found = certify(
        model,
        reference,
        (x for x, _ in images) if args.no_labels else images,
        l2=args.l2,
        l1=args.l1,
        restore=args.restore,
        local=args.local,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        batch_size=args.batch,
        show_progress=False if args.json else None,
    )
    print(found.to_json() if args.json else found)
    return 0


def _plan_of_json(text: str) -> PrunePlan:
    """The plan in what PrunePlan.to_json gave or `rmtkern prune --json` printed."""
    record = json.loads(text)
    if isinstance(record, dict) and isinstance(record.get("plan"), dict):
        text = json.dumps(record["plan"])
    return PrunePlan.from_json(text)


VERB = Verb(
    "certify", "bound what pruning did to logits, labels and loss, and say what each bound is worth", _options, _run
)
