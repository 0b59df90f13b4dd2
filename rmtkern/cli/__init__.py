"""The command line: rmtkern VERB; `rmtkern --help` lists the verbs. It parses, calls public functions and prints."""

import argparse
import copy
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmtkern.advice import PATTERNS, advise
from rmtkern.api import analyze, prune_
from rmtkern.certificates import certify
from rmtkern.comparison import DEFAULT, ENGINES, check_engines, compare
from rmtkern.environment import environment, environment_line, version
from rmtkern.errors import PackedModelError
from rmtkern.evaluation import Evaluation, evaluate, folder_batches, preprocessing_of
from rmtkern.files import save
from rmtkern.gradual import CYCLE, DROP_THRESHOLD, GRID, prune_gradually_
from rmtkern.loading import SHRUNK, input_size_of, load_model, load_plan, save_dense
from rmtkern.ops import available
from rmtkern.packing import pack_
from rmtkern.packing.report import PackReport
from rmtkern.pruning.budget import BUDGETS
from rmtkern.pruning.plan import PRIORS, PruneConfig, PrunePlan
from rmtkern.pruning.presets import PRESETS, RESTORES
from rmtkern.pruning.repair import REPAIRS
from rmtkern.pruning.score import SCORES
from rmtkern.report import write_report
from rmtkern.report.source import load_checkpoint
from rmtkern.shards import read_metadata
from rmtkern.shrink_plan import ShrinkPlan
from rmtkern.shrinking import shrink_
from rmtkern.speed import prune_to_speed_
from rmtkern.sweep import PACK, sweep
from rmtkern.tables import Table
from rmtkern.token_merging import merge_tokens_
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

__all__ = ["main"]

SLOWER = 0.97
"""A packed model under this share of the dense speed counts as slower; closer than that is the noise of timing."""

EXIT_CODES = """exit codes:
  0  done
  1  the work failed, or bench found the packed model slower than the strongest dense form
  2  bad usage or bad input (an unknown name, a damaged file, an impossible sparsity); nothing was written
  130  interrupted
"""


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a timm model name, module:function, or demo")
    parser.add_argument("--checkpoint", type=Path, help="safetensors (or weights-only torch) file to load into it")
    parser.add_argument(
        "--random-weights", action="store_true", help="do not ask a model hub for a timm model's weights"
    )
    parser.add_argument(
        "--merge-tokens",
        type=int,
        metavar="R",
        help="let every block merge its R most similar tokens; dense files do not say so: ask again wherever it counts",
    )


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sparsity", type=float, help="fraction of the selected weights removed, [0, 1); default 0.5")
    parser.add_argument("--method", default="auto", help=f"auto, hybrid, {', '.join(PRESETS)}")
    parser.add_argument(
        "--pattern",
        default="unstructured",
        help="unstructured, n:m such as 2:4 or 2:4x4, or blocks such as 4x1 or 32x32",
    )
    parser.add_argument("--targets", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    parser.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs to leave out")


HOW = {"budget": list(BUDGETS), "score": list(SCORES), "repair": list(REPAIRS), "restore": list(RESTORES)}
"""The parts of a method that `rmtkern prune` lets replace -> their names."""

PLAN = "the JSON of a plan, or a checkpoint that holds one"

SETTINGS = {field.name: field for field in fields(FinetuneConfig)}
"""Field -> what the dataclass says of it; each is an option of `rmtkern finetune`."""


def _settings_arguments(parser: argparse.ArgumentParser, defaults: FinetuneConfig) -> None:
    kinds = {"int": int, "float": float, "str": str}
    for name, field in SETTINGS.items():
        kind = kinds[str(getattr(field.type, "__name__", field.type)).partition(" ")[0]]
        value = getattr(defaults, name)
        shown = "none" if value is None else value
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"default: {shown}")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train", type=Path, required=True, help="folder of images, a sub-folder per class; held in memory"
    )
    parser.add_argument("--train-images", type=int, help="at most so many of them, evenly over the classes")
    parser.add_argument("--teacher", type=Path, help="safetensors of the dense model to distil from")
    parser.add_argument("--evaluate", type=Path, help="folder of images to score before and after")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmtkern",
        description="Prune Vision Transformers with random matrix theory and run the pruned model fast.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    names = "{demo,analyze,advise,shrink,prune,sweep,certify,finetune,gradual,bench,report,info}"
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=names)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=text,
            description=text,
            parents=[common],
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = verb("demo", "analyse, prune, pack and time a real ViT on real images")
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("demo-output"), help="folder for the picture and the JSON"
    )
    demo.add_argument("--images", type=int, help="score only so many of the 10,000 test images")
    demo.add_argument("--quick", action="store_true", help="a few images and short timings: a check, not a measurement")

    fit = verb("analyze", "fit the Marchenko-Pastur law to every weight matrix of a model")
    _model_arguments(fit)
    fit.add_argument("--targets", nargs="+", default=["all"], help="roles, groups or globs; default: all")
    fit.add_argument("--split-qkv", action="store_true", help="fit q, k and v of a fused projection one by one")
    fit.add_argument("--legacy", action="store_true", help="the published code's numbers, defects included")
    fit.add_argument("--format", choices=("text", "csv", "markdown"), default="text")
    fit.add_argument("-o", "--output", type=Path, help="write there instead of to stdout")

    advice = verb("advise", "measure which dtype and pattern would make a model how much faster on this machine")
    _model_arguments(advice)
    advice.add_argument("--batch", type=int, default=8, help="batch size")
    advice.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="fractions of zeros")
    advice.add_argument("--pattern", nargs="+", default=list(PATTERNS), help="as prune takes them")

    shrink = verb("shrink", "remove hidden features and attention heads of a model and write what is left")
    _model_arguments(shrink)
    shrink.add_argument("--mlp", type=float, default=0.0, help="share of the hidden features of each MLP, [0, 1)")
    shrink.add_argument("--heads", type=float, default=0.0, help="share of the heads of each attention, [0, 1)")
    shrink.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs whose blocks stay whole")
    shrink.add_argument("--calibration", type=Path, help="folder of images; without one, norms choose")
    shrink.add_argument("--calibration-images", type=int, default=128, help="how many of them")
    shrink.add_argument("--evaluate", type=Path, help="folder of images to score before and after")
    shrink.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")

    prune = verb("prune", "prune a model and write it as dense safetensors under its original keys")
    _model_arguments(prune)
    _prune_arguments(prune)
    prune.add_argument(
        "--calibration", type=Path, help="folder of images (a sub-folder per class) for calibrated methods"
    )
    prune.add_argument("--calibration-images", type=int, default=128, help="how many of them")
    for name, choices in HOW.items():
        prune.add_argument(f"--{name}", choices=choices, help="default: the method's")
    prune.add_argument("--prior", choices=PRIORS, help="method cast: a mask to stay close to, by this method")
    prune.add_argument("--alpha", type=float, default=0.5, help="how close, >= 0; default 0.5")
    prune.add_argument(
        "--permute",
        action=argparse.BooleanOptionalAction,
        help="let channels change places first (patterns, calibration); default: for mini-blocks with method auto",
    )
    prune.add_argument(
        "--max-drop", type=float, help="find the highest sparsity that loses at most so much top-1; 0.01 is one point"
    )
    prune.add_argument(
        "--speedup", type=float, help="find the lowest sparsity whose packed model is so much faster than dense here"
    )
    prune.add_argument("--batch", type=int, default=8, help="batch size for --speedup")
    prune.add_argument("--images", type=Path, help="folder of held-out images (a sub-folder per class) for --max-drop")
    prune.add_argument("--evaluate", type=Path, help="folder of images to score before and after")
    prune.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")

    many = verb("sweep", "prune copies of a model by several methods and score (and time) them, as CSV and pictures")
    _model_arguments(many)
    many.add_argument("--images", type=Path, required=True, help="folder of images (a sub-folder per class) to score")
    many.add_argument("--limit", type=int, help="score only so many of them")
    many.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="each [0, 1)")
    many.add_argument("--methods", nargs="+", default=["magnitude", "row", "seb"], help=f"of {', '.join(PRESETS)}")
    many.add_argument("--patterns", nargs="+", default=["unstructured"], help="as --pattern of prune")
    many.add_argument("--targets", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    many.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs to leave out")
    many.add_argument("--calibration", type=Path, help="folder of images for the methods that use them")
    many.add_argument("--calibration-images", type=int, default=128, help="how many of them")
    many.add_argument("--pack", choices=tuple(PACK), help="also pack each point in it, score and time it against dense")
    many.add_argument("--batch", type=int, default=8, help="batch size for --pack")
    many.add_argument("--picture", type=Path, help="draw accuracy against sparsity there (png, pdf or svg)")
    many.add_argument("--speed-picture", type=Path, help="with --pack, draw accuracy against measured speed-up there")
    many.add_argument("-o", "--output", type=Path, required=True, help="the CSV; its rows are not computed again")

    proof = verb("certify", "bound what pruning did to logits, labels and loss, and say what each bound is worth")
    _model_arguments(proof)
    which = proof.add_mutually_exclusive_group(required=True)
    which.add_argument("--pruned", type=Path, help="checkpoint of the pruned model; the model itself is the dense one")
    which.add_argument("--plan", type=Path, help="plan of prune without --calibration, to repeat on the dense model: "
                       "the JSON that prune --json printed, or a checkpoint that holds one")  # fmt: skip
    proof.add_argument("--images", type=Path, required=True, help="folder of a few hundred images in sub-folders")
    proof.add_argument("--limit", type=int, help="use only so many of them, evenly over the sub-folders")
    proof.add_argument("--no-labels", action="store_true", help="the sub-folders are not the classes of the model")
    proof.add_argument("--l2", type=float, default=0.0, help="weight of the sum of squares in the objective")
    proof.add_argument("--l1", type=float, default=0.0, help="weight of the sum of absolute values in the objective")
    proof.add_argument("--restore", action="store_true", help="also measure the model with each weight restored")
    proof.add_argument("--local", action="store_true", help="also estimate each step from gradients")
    proof.add_argument("--dtype", choices=("float32", "float64"), help="run both models in it; default: in their own")
    proof.add_argument("--batch", type=int, default=32, help="images at a time")

    tune = verb("finetune", "train the surviving weights of a pruned model; the zeros of its checkpoint stay zero")
    _model_arguments(tune)
    _train_arguments(tune)
    tune.add_argument("--run", type=Path, help="safetensors file with the whole run after every epoch; gone on from")
    _settings_arguments(tune, FinetuneConfig())
    tune.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")

    steps = verb("gradual", "prune to one sparsity after another and fine-tune after each")
    _model_arguments(steps)
    _train_arguments(steps)
    steps.add_argument("--held-out", type=Path, help="folder of further training images that score every cycle")
    steps.add_argument("--sparsities", type=float, nargs="+", default=list(GRID), help="rising, each [0, 1)")
    steps.add_argument(
        "--method", default="hybrid", help=f"hybrid, {DROP_THRESHOLD} (needs --held-out), {', '.join(PRESETS)}"
    )
    steps.add_argument("--drop", type=float, default=0.007, help=f"top-1 that {DROP_THRESHOLD} lets magnitude lose")
    steps.add_argument("--pattern", default="unstructured", help="unstructured, or mini-blocks such as 4x1")
    steps.add_argument("--targets", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    steps.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs to leave out")
    _settings_arguments(steps, CYCLE)
    steps.add_argument("-o", "--output", type=Path, required=True, help="the new safetensors file")

    bench = verb("bench", "pack a pruned model and time it against the strongest dense form")
    _model_arguments(bench)
    _prune_arguments(bench)
    bench.add_argument("--keep-zeros", action="store_true", help="do not prune: take the zeros of the checkpoint")
    bench.add_argument("--batch", type=int, nargs="+", default=[8], help="batch sizes")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="both sides run in it")
    bench.add_argument(
        "--compare", nargs="?", const=",".join(DEFAULT), help=f"also time other engines: a list of {', '.join(ENGINES)}"
    )
    bench.add_argument("--decisions", type=Path, help="JSON file of measured times to use again and to complete")
    bench.add_argument("-o", "--output", type=Path, help="also write the packed model, for rmtkern.load")

    page = verb("report", "write one HTML page about a checkpoint: zeros, spectra, and what was measured of it")
    page.add_argument("checkpoint", type=Path, help="safetensors file, dense or packed")
    page.add_argument("--model", help="what the checkpoint loads into; needed if packed, else names tell the layers")
    page.add_argument("--packing", type=Path, help="what bench --json printed: what runs each layer, and its times")
    page.add_argument("--decisions", type=Path, help="JSON file of measured times, as bench --decisions keeps it")
    page.add_argument("--sweep", type=Path, nargs="+", default=[], help="CSV of sweep: accuracy and latency curves")
    page.add_argument("--evaluate", type=Path, help="folder of images to score the model on; needs --model")
    page.add_argument("--title", help="of the page; default: the name of the file")
    page.add_argument("-o", "--output", type=Path, required=True, help="the page, such as report.html")

    verb("info", "versions, this CPU, and which layouts run here and why not the others")
    return parser


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _demo(args: argparse.Namespace) -> int:
    from rmtkern.demo.run import FULL, QUICK, run_demo

    effort = QUICK if args.quick else FULL
    if args.images is not None:
        effort = replace(effort, images=args.images)
    say = (lambda text: None) if args.json else (lambda text: print(text + "\n", flush=True))
    results = run_demo(args.output, say, effort=effort)
    if args.json:
        _print_json(results)
    return 0


def _analyze(args: argparse.Namespace) -> int:
    model = _load(args)
    fits = analyze(model, targets=args.targets, split_qkv=args.split_qkv, legacy=args.legacy)
    formats = {"text": fits.__str__, "csv": fits.to_csv, "markdown": fits.to_markdown}
    text = fits.to_json() if args.json else formats[args.format]()
    if args.output is None:
        print(text.rstrip("\n"))
    else:
        args.output.write_text(text.rstrip("\n") + "\n")
    return 0


def _advise(args: argparse.Namespace) -> int:
    _check_batch(args.batch)
    model = _load(args)
    example = _example(model, args.batch)
    advice = advise(model, example, patterns=args.pattern, sparsities=args.sparsity)
    if args.json:
        _print_json({"environment": environment(), **json.loads(advice.to_json())})
    else:
        print(f"{environment_line()}\n\n{advice}")
    return 0


def _load(args: argparse.Namespace, checkpoint: Path | None = None) -> nn.Module:
    """The model that a verb's arguments name, or the same with another checkpoint."""
    model = load_model(args.model, checkpoint=checkpoint or args.checkpoint, random_weights=args.random_weights)
    if args.merge_tokens is not None:
        merge_tokens_(model, args.merge_tokens)
    return model


def _example(model: nn.Module, batch: int) -> Tensor:
    """Random images to time a model on."""
    return torch.randn(input_size_of(model, batch), generator=torch.Generator().manual_seed(0))


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")


def _check_folder(output: Path | None) -> None:
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"{output.parent}: no such folder to write {output.name} into; create it first")


def _stored(checkpoint: Path | None, key: str) -> str | None:
    """What travels with a checkpoint under a name, if anything."""
    if checkpoint is None or checkpoint.suffix != ".safetensors":
        return None
    return read_metadata(checkpoint).get(key)


def _shrink(args: argparse.Namespace) -> int:
    _check_folder(args.output)
    if _stored(args.checkpoint, SHRUNK) is not None:
        raise ValueError(f"{args.checkpoint}: it was made smaller already; shrink the model that it came from")
    model = _load(args)
    calibration = _calibration(args, model)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    plan = shrink_(model, args.mlp, args.heads, calibration, ignore=tuple(args.ignore))
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, None, plan.to_json())
    _report(args, "plan", plan, before, after)
    return 0


def _report(
    args: argparse.Namespace, name: str, made: Any, before: Evaluation | None, after: Evaluation | None
) -> None:
    """Print what was made of a model, its scores and the file."""
    if args.json:
        _print_json(
            {
                "output": str(args.output),
                "before": before.to_dict() if before else None,
                "after": after.to_dict() if after else None,
                name: json.loads(made.to_json()),
            }
        )
        return
    print(made)
    if before and after:
        print(f"before: {before}\nafter:  {after}")
    print(f"wrote {args.output}")


def _prune(args: argparse.Namespace) -> int:
    _check_folder(args.output)
    if args.speedup is not None and (args.sparsity, args.max_drop) != (None, None):
        raise ValueError("--speedup finds the sparsity: give it no --sparsity and no --max-drop")
    _check_batch(args.batch)
    if args.max_drop is not None and (args.sparsity is not None or args.images is None):
        raise ValueError("--max-drop finds the sparsity: give it --images FOLDER, and no --sparsity")
    if args.images is not None and args.max_drop is None:
        raise ValueError("--images are for --max-drop; to score a model before and after, use --evaluate FOLDER")
    model = _load(args)
    calibration = _calibration(args, model)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    targets, ignore = tuple(args.targets) if args.targets else None, tuple(args.ignore)
    how: dict[str, Any] = {name: getattr(args, name) for name in (*HOW, "prior", "alpha", "permute")}
    if args.speedup is not None:
        example = _example(model, args.batch)
        asked = PruneConfig(method=args.method, pattern=args.pattern, targets=targets, ignore=ignore, **how)
        found = prune_to_speed_(model, args.speedup, example, asked, calibration)
        plan = found.plan
        if not args.json:
            print(found)
    else:
        plan = prune_(
            model,
            args.sparsity,
            args.method,
            args.pattern,
            targets,
            ignore,
            calibration,
            max_drop=args.max_drop,
            evaluate=args.images,
            **how,
        )
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, plan.to_json(), _stored(args.checkpoint, SHRUNK))
    _report(args, "plan", plan, before, after)
    return 0


def _calibration(args: argparse.Namespace, model: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
    """Batches (images, labels) of the folder that --calibration names, if any."""
    if args.calibration is None:
        return None
    return list(folder_batches(args.calibration, preprocessing_of(model), limit=args.calibration_images))


def _sweep(args: argparse.Namespace) -> int:
    _check_folder(args.output)
    _check_folder(args.picture)
    _check_folder(args.speed_picture)
    _check_batch(args.batch)
    if args.speed_picture is not None and args.pack is None:
        raise ValueError("--speed-picture needs speeds: give --pack float32 or --pack bfloat16 too")
    model = _load(args)
    chosen = " ".join([*(args.targets or []), *(f"not {word}" for word in args.ignore)])
    scored = f"{args.images.name}{'' if args.limit is None else f'[{args.limit}]'}"
    found = sweep(
        model,
        args.images,
        args.output,
        sparsities=args.sparsities,
        methods=args.methods,
        patterns=args.patterns,
        targets=tuple(args.targets) if args.targets else None,
        ignore=tuple(args.ignore),
        calibration=_calibration(args, model),
        data=f"{scored} ({chosen})" if chosen else scored,
        calibration_data="" if args.calibration is None else f"{args.calibration.name}[{args.calibration_images}]",
        limit=args.limit,
        pack=args.pack,
        example=None if args.pack is None else _example(model, args.batch),
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
        _print_json({"rows": rows, "computed": found.computed})
    else:
        written = [str(path) for path in (args.output, args.picture, args.speed_picture) if path is not None]
        print(f"{found}\nwrote {' and '.join(written)}")
    return 0


def _certify(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if args.pruned is not None and args.random_weights and args.checkpoint is None and ":" not in args.model:
        raise ValueError(
            "--random-weights draws other weights than those that were pruned; give --checkpoint FILE with the dense "
            "ones, or --plan"
        )
    dense = _load(args)
    reference: nn.Module | PrunePlan = dense
    model = dense
    if args.pruned is not None:
        model = _load(args, args.pruned)
        if _stored(args.pruned, "rmtkern") is not None:
            load_plan(args.pruned).verify(model)
    else:
        reference = (
            load_plan(args.plan) if args.plan.suffix == ".safetensors" else _read_json(args.plan, _plan_of_json, PLAN)
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


Made = TypeVar("Made")


def _read_json(path: Path, read: Callable[[str], Made], what: str) -> Made:
    """What a function makes of a JSON file; `what` says what is expected in it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {what}")
    try:
        return read(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected {what}") from error


def _finetune(args: argparse.Namespace) -> int:
    _check_folder(args.output)
    config = FinetuneConfig(**{name: getattr(args, name) for name in SETTINGS})
    model = _load(args)
    stored = _stored(args.checkpoint, "rmtkern")
    plan = None if stored is None else load_plan(args.checkpoint)
    data = _folder(args.train, model, args.train_images)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    report = finetune_(
        model,
        plan,
        data,
        teacher=args.teacher,
        config=config,
        checkpoint=args.run,
        resume=args.run is not None,
        show_progress=False if args.json else None,
    )
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, stored, _stored(args.checkpoint, SHRUNK))
    _report(args, "report", report, before, after)
    return 0


def _folder(folder: Path, model: nn.Module, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of a folder, as the model wants them."""
    batches = folder_batches(folder, preprocessing_of(model), limit=limit)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels


def _gradual(args: argparse.Namespace) -> int:
    _check_folder(args.output)
    config = FinetuneConfig(**{name: getattr(args, name) for name in SETTINGS})
    model = _load(args)
    data = _folder(args.train, model, args.train_images)
    before = evaluate(model, args.evaluate) if args.evaluate is not None else None
    found = prune_gradually_(
        model,
        data,
        args.sparsities,
        args.method,
        held_out=None if args.held_out is None else _folder(args.held_out, model),
        drop=args.drop,
        pattern=args.pattern,
        targets=tuple(args.targets) if args.targets else None,
        ignore=tuple(args.ignore),
        teacher=args.teacher,
        finetune=config,
        seed=args.seed,
        show_progress=False if args.json else None,
    )
    after = evaluate(model, args.evaluate) if args.evaluate is not None else None
    save_dense(model, args.output, found.plan.to_json(), _stored(args.checkpoint, SHRUNK))
    if args.json:
        scores = {"before": before.to_dict() if before else None, "after": after.to_dict() if after else None}
        _print_json({"output": str(args.output), **scores, **json.loads(found.to_json())})
        return 0
    print(found)
    if before and after:
        print(f"before: {before}\nafter:  {after}")
    print(f"wrote {args.output}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    if min(args.batch) < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    engines = None if args.compare is None else [name for name in args.compare.split(",") if name]
    check_engines(engines or ())
    _check_folder(args.output)
    model = _load(args)
    plan = None
    if not args.keep_zeros:
        targets = tuple(args.targets) if args.targets else None
        plan = prune_(model, args.sparsity, args.method, args.pattern, targets, tuple(args.ignore))
    packed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randn(input_size_of(model, batch), generator=generator) for batch in args.batch]
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    report = pack_(packed, examples, dtype=dtype, decisions=args.decisions)
    if args.output is not None:
        shrunk = _stored(args.checkpoint, SHRUNK)
        save(packed, args.output, plan, None if shrunk is None else ShrinkPlan.from_json(shrunk))
    compared = []
    for example in examples if engines is not None else ():
        compared.append(compare(model, example, engines or (), dtype=dtype or torch.float32, packed=packed))
    if args.json:
        found = {} if engines is None else {"compared": [json.loads(one.to_json()) for one in compared]}
        _print_json({"environment": environment(), **json.loads(report.to_json()), **found})
    else:
        print("\n\n".join([environment_line(), str(report), *map(str, compared)]))
    speedups = [times.speedup for times in report.end_to_end]
    speedups += [one.speedup for one in compared if one.speedup is not None]
    if any(speedup < SLOWER for speedup in speedups):
        print("rmtkern bench: the packed model is slower than the strongest dense form", file=sys.stderr)
        return 1
    return 0


def _page(args: argparse.Namespace) -> int:
    _check_folder(args.output)
    if args.evaluate is not None and args.model is None:
        raise ValueError("--evaluate needs a model to run: give --model NAME too")
    printed = "what rmtkern bench --json printed"
    packing = None if args.packing is None else _read_json(args.packing, PackReport.from_json, printed)
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
        title=args.title,
    )
    print(written.to_json() if args.json else written)
    return 0


PACKAGES = {
    "rmtkern": "pip install .",
    "torch": "pip install torch",
    "numpy": "pip install numpy",
    "safetensors": "pip install safetensors",
    "timm": "pip install 'rmtkern[models]'",
    "pillow": "pip install 'rmtkern[models]'",
    "matplotlib": "pip install 'rmtkern[report]'",
    "triton": "comes with torch on Linux with CUDA",
    "cupy-cuda12x": "pip install 'rmtkern[gpu-cuda12]'",
    "cupy-cuda13x": "pip install 'rmtkern[gpu-cuda13]'",
}
"""Distribution -> how to get it."""


def _info(args: argparse.Namespace) -> int:
    versions = {name: version(name) for name in PACKAGES}
    table = available()
    if args.json:
        _print_json(
            {
                "environment": environment(),
                "versions": versions,
                "missing": {name: PACKAGES[name] for name, found in versions.items() if found is None},
                "available": json.loads(table.to_json()),
            }
        )
        return 0
    rows = [[name, found, None if found else PACKAGES[name]] for name, found in versions.items()]
    print(f"{environment_line()}\n\n{Table(('package', 'version', 'how to get it'), rows).to_text()}\n\n{table}")
    return 0


VERBS = {
    "demo": _demo, "analyze": _analyze, "advise": _advise, "shrink": _shrink, "prune": _prune, "sweep": _sweep,
    "certify": _certify, "finetune": _finetune, "gradual": _gradual, "bench": _bench, "report": _page,
    "info": _info,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; default, those of this process.

    Returns:
        The exit code; see EXIT_CODES. Wrong usage raises SystemExit(2), as argparse does.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="rmtkern: %(message)s")
    failure: Exception
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads must be at least 1, got {args.threads}")
            torch.set_num_threads(args.threads)
        return VERBS[args.verb](args)
    except (ValueError, TypeError, ModuleNotFoundError, PackedModelError) as error:
        code, failure = 2, error
    except KeyboardInterrupt:
        print(f"rmtkern {args.verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a user's model function may raise anything
        code, failure = 1, error
    if args.debug:
        traceback.print_exception(failure)
    text = " ".join(str(failure).split())
    print(f"rmtkern {args.verb}: {text or type(failure).__name__}", file=sys.stderr)
    return code
