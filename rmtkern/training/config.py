"""What was asked of fine-tuning: FinetuneConfig. Pure data, checked, JSON; it runs nothing."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rmtkern.training.loss import REGULARISERS

__all__ = ["AUTOCAST", "OPTIMIZERS", "FinetuneConfig"]

OPTIMIZERS = ("adamw", "sgd")
AUTOCAST = ("bfloat16",)

_WHOLE = {"epochs": 1, "batch_size": 1, "accumulate": 1, "patience": 1, "seed": 0}
"""Field -> smallest int."""

_NUMBERS: dict[str, tuple[float, float, str]] = {
    "lr": (0.0, math.inf, "a finite number > 0"),
    "momentum": (0.0, 1.0, "a number in [0, 1)"),
    "weight_decay": (0.0, math.inf, "a finite number >= 0"),
    "clip": (0.0, math.inf, "a finite number > 0, or None for no clipping"),
    "warmup": (0.0, 1.0, "a fraction in [0, 1)"),
    "floor": (0.0, 1.0, "a fraction in [0, 1]"),
    "label_smoothing": (0.0, 1.0, "a fraction in [0, 1)"),
    "distill": (0.0, 1.0, "a fraction in [0, 1]"),
    "temperature": (0.0, math.inf, "a finite number > 0"),
    "strength": (0.0, math.inf, "a finite number >= 0"),
    "ema": (0.0, 1.0, "a decay in [0, 1); 0 means no average"),
    "holdout": (0.0, 1.0, "a fraction in [0, 1)"),
}
"""Field -> low, high and the words for the range; the words say whether an end belongs to it."""

_NAMES = {"optimizer": OPTIMIZERS, "regulariser": tuple(REGULARISERS), "autocast": AUTOCAST}
_MAY_BE_NONE = ("patience", "clip", "regulariser", "autocast")


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune; every field has a default and is checked.

    Args:
        epochs: passes over the training data, >= 1.
        lr: peak learning rate, > 0.
        optimizer: "adamw" (betas 0.9 and 0.999) or "sgd" (with `momentum`).
        momentum: of "sgd", [0, 1).
        weight_decay: of Linear, Conv2d and attention weights alone, >= 0: norms, biases, embeddings, position and
            class tokens are never decayed.
        batch_size: images per batch where the data are tensors; a loader has its own.
        accumulate: batches whose gradients make one step, >= 1.
        clip: largest length of the gradient of the surviving weights; None: not clipped.
        warmup: fraction of all steps with a rising learning rate, [0, 1).
        floor: fraction of `lr` that the cosine falls to, [0, 1].
        label_smoothing: share of the target spread over all classes, [0, 1).
        distill: share of the loss that is distillation, [0, 1], if there is a teacher.
        temperature: of the distillation, > 0.
        regulariser: "l1", "l2" or "group-lasso" on the weights that `weight_decay` is for (see loss.REGULARISERS);
            None: none.
        strength: factor of the regulariser, >= 0.
        ema: decay of a moving average of the weights, which is then evaluated and kept; 0: none.
        autocast: "bfloat16" runs forward and loss in bf16 autocast; None: in the model's dtype.
        holdout: fraction of the training data held out to choose the best state, [0, 1); 0: the last state is kept.
        patience: stop after so many epochs without a better held-out loss; None: run them all.
        seed: of the split, the order of the data, and dropout.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range or an unknown name; the message lists the valid ones.
    """

    epochs: int = 2
    lr: float = 2e-5
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    batch_size: int = 32
    accumulate: int = 1
    clip: float | None = 1.0
    warmup: float = 0.1
    floor: float = 0.0
    label_smoothing: float = 0.1
    distill: float = 0.5
    temperature: float = 2.0
    regulariser: str | None = None
    strength: float = 0.0
    ema: float = 0.0
    autocast: str | None = None
    holdout: float = 0.05
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if name in _WHOLE:
                _check_whole(name, value, _WHOLE[name])
            elif name in _NUMBERS:
                _check_number(name, value, *_NUMBERS[name])
            else:
                _check_name(name, value, _NAMES[name])
        if (self.regulariser is None) != (self.strength == 0):
            raise ValueError(
                f"regulariser {self.regulariser!r} with strength {self.strength:g}: expected both or neither; give "
                f"regulariser= one of {', '.join(REGULARISERS)} and strength= a number > 0"
            )
        if self.patience is not None and self.epochs <= self.patience:
            raise ValueError(f"patience: expected less than epochs = {self.epochs}, got {self.patience}")

    def to_json(self) -> str:
        """Every field, as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not the JSON of a config.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of a FinetuneConfig ({error}); expected what to_json wrote") from error


def _check_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def _check_number(name: str, value: Any, low: float, high: float, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    above = value > low or (value == low and "> 0" not in words)
    below = value < high or (value == high and "1]" in words)
    if not (above and below):
        raise ValueError(f"{name}: expected {words}, got {value}")


def _check_name(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(valid)}")
