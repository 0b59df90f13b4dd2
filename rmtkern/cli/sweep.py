"""`rmtkern sweep`: one model pruned by several methods, scored and timed."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rmtkern.cli.inputs import calibration_of, check_batch, check_output, model_of
from rmtkern.cli.options import model_options
from rmtkern.cli.outputs import print_json
from rmtkern.cli.verb import Verb
from rmtkern.loading import random_input
from rmtkern.pruning.presets import PRESETS
from rmtkern.sweep import PACK, sweep

__all__ = ["VERB"]

PICTURES = (".png", ".pdf", ".svg")
"""What pictures can be; matplotlib, which draws them, is asked only after the sweep."""


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of images (a sub-folder per class) to score")
    parser.add_argument("--limit", type=int, help="score only so many of them")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="each [0, 1)")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "row", "seb"], help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--patterns", nargs="+", default=["unstructured"], help="as --pattern of prune")
    parser.add_argument("--targets", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    parser.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs to leave out")
    parser.add_argument("--calibration", type=Path, help="folder of images for the methods that use them")
    parser.add_argument("--calibration-images", type=int, default=128, help="how many of them")
    parser.add_argument(
        "--pack", choices=tuple(PACK), help="also pack each point in it, score and time it against dense"
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size for --pack")
    parser.add_argument("--picture", type=Path, help="draw accuracy against sparsity there (png, pdf or svg)")
    parser.add_argument("--speed-picture", type=Path, help="with --pack, draw accuracy against measured speed-up there")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the CSV; its rows are not computed again")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output)
    for picture in (args.picture, args.speed_picture):
        check_output(picture, *PICTURES)
    check_batch(args.batch)
    if args.speed_picture is not None and args.pack is None:
        raise ValueError("--speed-picture needs speeds: give --pack float32 or --pack bfloat16 too")
    model = model_of(args)
    chosen = " ".join([*(args.targets or []), *(f"not {word}" for word in args.ignore)])
    scored = f"{args.images}{'' if args.limit is None else f'[{args.limit}]'}"
    found = sweep(
        model,
        args.images,
        args.output,
        sparsities=args.sparsities,
        methods=args.methods,
        patterns=args.patterns,
        targets=tuple(args.targets) if args.targets else None,
        ignore=tuple(args.ignore),
        calibration=calibration_of(args, model),
        data=f"{scored} ({chosen})" if chosen else scored,
        calibration_data="" if args.calibration is None else f"{args.calibration}[{args.calibration_images}]",
        limit=args.limit,
        pack=args.pack,
        example=None if args.pack is None else random_input(model, args.batch),
    )
    first = found.rows[0]
    if args.picture is not None:
        from rmtkern.plots import accuracy_figure

        accuracy_figure(found.curves, first.images).savefig(args.picture)
    if args.speed_picture is not None:
        from rmtkern.plots import speed_figure

        how = f"{first.pack}, input {first.example}, {first.threads} thread(s), {first.cpu}"
        speed_figure(found.speed_curves, first.images, how).savefig(args.speed_picture)
    if args.json:
        rows = [{**asdict(row), "speedup": row.speedup} for row in found.rows]
        print_json({"rows": rows, "computed": found.computed})
    else:
        written = [str(path) for path in (args.output, args.picture, args.speed_picture) if path is not None]
        print(f"{found}\nwrote {' and '.join(written)}")
    return 0


VERB = Verb(
    "sweep",
    "prune copies of a model by several methods and score (and time) them, as CSV and pictures",
    _options,
    _run,
)
