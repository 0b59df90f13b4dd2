"""`rmtkern analyze`: the Marchenko-Pastur law fitted to every weight matrix of a model."""

import argparse
from pathlib import Path

from rmtkern.api import analyze
from rmtkern.cli.inputs import check_output, model_of
from rmtkern.cli.options import model_options
from rmtkern.cli.verb import Verb

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--targets", nargs="+", default=["all"], help="roles, groups or globs; default: all")
    parser.add_argument("--split-qkv", action="store_true", help="fit q, k and v of a fused projection one by one")
    parser.add_argument("--legacy", action="store_true", help="the published code's numbers, defects included")
    parser.add_argument("--format", choices=("text", "csv", "markdown"), default="text")
    parser.add_argument("-o", "--output", type=Path, help="write there instead of to stdout")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output)
    model = model_of(args)
    fits = analyze(model, targets=args.targets, split_qkv=args.split_qkv, legacy=args.legacy)
    formats = {"text": fits.__str__, "csv": fits.to_csv, "markdown": fits.to_markdown}
    text = fits.to_json() if args.json else formats[args.format]()
    if args.output is None:
        print(text.rstrip("\n"))
    else:
        args.output.write_text(text.rstrip("\n") + "\n")
    return 0


VERB = Verb("analyze", "fit the Marchenko-Pastur law to every weight matrix of a model", _options, _run)
