"""Options that several verbs share."""

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from rmtkern.pruning.plan import THETAS
from rmtkern.pruning.presets import PRESETS
from rmtkern.training.config import FinetuneConfig

__all__ = [
    "SPECTRAL", "model_options", "prune_options", "settings_of", "settings_options", "spectral_options",
    "train_options",
]  # fmt: skip

SPECTRAL = ("haar", "alpha_regime", "theta", "soft_threshold", "legacy")
"""The fields of a PruneConfig that `spectral_options` asks for."""

SETTINGS = {field.name: field for field in fields(FinetuneConfig)}
"""Field -> what the dataclass says of it; each is an option of `rmtkern finetune` and `gradual`."""


def model_options(parser: argparse.ArgumentParser) -> None:
    """What model, with which weights, and whether its tokens are merged."""
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


def prune_options(parser: argparse.ArgumentParser) -> None:
    """How much of a model is pruned, by which method, and where."""
    parser.add_argument("--sparsity", type=float, help="fraction of the selected weights removed, [0, 1); default 0.5")
    parser.add_argument("--method", default="auto", help=f"auto, hybrid, {', '.join(PRESETS)}")
    parser.add_argument(
        "--pattern",
        nargs="+",
        default=["unstructured"],
        help="unstructured, n:m such as 2:4 or 2:4x4, blocks such as 4x1 or 32x32, spectral; prune chooses of several",
    )
    parser.add_argument("--targets", nargs="+", help="roles, groups or globs; default: attention and MLP projections")
    parser.add_argument("--ignore", nargs="+", default=[], help="roles, groups or globs to leave out")


def spectral_options(parser: argparse.ArgumentParser) -> None:
    """What the published methods do to singular vectors and weights beside setting weights to zero."""
    parser.add_argument(
        "--haar",
        type=float,
        default=0.0,
        metavar="Z",
        help="first set small coordinates of singular vectors below the edge to zero, by Z deviations of a random "
        "vector's, >= 0; published for method seb: 0.5; default 0: no such step",
    )
    parser.add_argument(
        "--alpha-regime",
        action="store_true",
        help="methods seb and ser: to 20 %% go by Hill exponents, as published, instead of by plain magnitude",
    )
    parser.add_argument("--theta", choices=THETAS, default="haar", help="method rmt: unit of its thresholds")
    parser.add_argument(
        "--soft-threshold",
        type=float,
        default=0.0,
        help="method rmt: shrink what stays after each cycle by so many times the published amount, >= 0; default 0",
    )
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="spectra, thresholds and the shrinking of method rmt as the published code has them, defects included",
    )


def train_options(parser: argparse.ArgumentParser) -> None:
    """Images to train on, a teacher, and images to score before and after."""
    parser.add_argument(
        "--train", type=Path, required=True, help="folder of images, a sub-folder per class; held in memory"
    )
    parser.add_argument("--train-images", type=int, help="at most so many of them, evenly over the classes")
    parser.add_argument("--held-out", type=Path, help="folder of further training images that choose the best state")
    parser.add_argument("--teacher", type=Path, help="safetensors of the dense model to distil from")
    parser.add_argument("--evaluate", type=Path, help="folder of images to score before and after")


def settings_options(parser: argparse.ArgumentParser, defaults: FinetuneConfig) -> None:
    """Every field of FinetuneConfig with what its docstring says of it, and with other defaults."""
    kinds = {"int": int, "float": float, "str": str}
    said = (inspect.getdoc(FinetuneConfig) or "").partition("Args:")[2].partition("Raises:")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", said, re.MULTILINE)
    texts = dict.fromkeys(SETTINGS, "see FinetuneConfig") | {name: " ".join(text.split())[:-1] for name, text in found}
    for name, field in SETTINGS.items():
        kind, _, rest = str(getattr(field.type, "__name__", field.type)).partition(" ")
        value = getattr(defaults, name)
        shown = "none" if value is None else value
        text = f"{texts[name]}; default: {shown}".replace("%", "%%")
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_or_none(kinds[kind]) if rest else kinds[kind], default=value, help=text
        )


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads what `kind` reads, and "none"."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = f"{getattr(kind, '__name__', '')}, or none,"  # as argparse names it where it fails
    return read


def settings_of(args: argparse.Namespace) -> FinetuneConfig:
    """The settings that `settings_options` asked for."""
    return FinetuneConfig(**{name: getattr(args, name) for name in SETTINGS})
