"""`rmtkern report`: one HTML page about a checkpoint."""

import argparse
from pathlib import Path

from torch import nn

from rmtkern.certificates import Certificate
from rmtkern.cli.inputs import check_output, read_json
from rmtkern.cli.verb import Verb
from rmtkern.evaluation import evaluate
from rmtkern.packing import PackReport
from rmtkern.report import write_report
from rmtkern.report.source import load_checkpoint

__all__ = ["VERB"]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="safetensors file, index of shards or their folder; dense or packed"
    )
    parser.add_argument("--model", help="what the checkpoint loads into; needed if packed, else names tell the layers")
    parser.add_argument("--packing", type=Path, help="what bench --json printed: what runs each layer, and its times")
    parser.add_argument("--decisions", type=Path, help="JSON file of measured times, as bench --decisions keeps it")
    parser.add_argument("--certificate", type=Path, help="what certify --json printed: bounds of what pruning did")
    parser.add_argument("--sweep", type=Path, nargs="+", default=[], help="CSV of sweep: accuracy and latency curves")
    parser.add_argument("--evaluate", type=Path, help="folder of images to score the model on; needs --model")
    parser.add_argument("--title", help="of the page; default: the name of the file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page, such as report.html")


def _run(args: argparse.Namespace) -> int:
    check_output(args.output, ".html", ".htm")
    if args.evaluate is not None and args.model is None:
        raise ValueError("--evaluate needs a model to run: give --model NAME too")
    printed = "what rmtkern bench --json printed"
    packing = None if args.packing is None else read_json(args.packing, PackReport.from_json, printed)
    proven = None
    if args.certificate is not None:
        proven = read_json(args.certificate, Certificate.from_json, "what rmtkern certify --json printed")
    model: nn.Module | Path = args.checkpoint
    scores = {}
    if args.model is not None:
        model = load_checkpoint(args.model, args.checkpoint)
        if args.evaluate is not None:
            scores[f"on {args.evaluate.name}"] = evaluate(model, args.evaluate)
    written = write_report(
        model,
        args.output,
        checkpoint=args.checkpoint,
        packing=packing,
        decisions=args.decisions,
        sweeps=args.sweep,
        scores=scores,
        certificate=proven,
        title=args.title,
    )
    print(written.to_json() if args.json else written)
    return 0


VERB = Verb(
    "report", "write one HTML page about a checkpoint: zeros, spectra, and what was measured of it", _options, _run
)
