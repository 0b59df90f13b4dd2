"""What was asked and what was decided: PruneConfig, LayerPlan, PrunePlan. Pure data, JSON, and a table.

It knows the names of budgets, scores and patterns, and computes none of them.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor, nn

from rmtkern.models import ROLES, PrunableWeight, block_name, prunable_weights
from rmtkern.pruning.budget import BUDGETS, MEASURED, SPECTRAL
from rmtkern.pruning.pattern import SPIKES, parse_pattern, pattern_name, unit_of
from rmtkern.pruning.presets import AUTO, AUTO_CALIBRATED, AUTO_NM, BEST, HYBRID_UNTIL, PRESETS, RESTORES, Preset
from rmtkern.pruning.repair import CALIBRATED_REPAIRS, REPAIRS
from rmtkern.pruning.score import CALIBRATED, GROUPED, LAYERWISE, SCORES
from rmtkern.pruning.target import Target, Trial
from rmtkern.spectrum.fit import SpectralFit, SpectralFits
from rmtkern.tables import Table, Tabulated

__all__ = [
    "GIVEN", "PRIORS", "THETAS", "Count", "LayerPlan", "PruneConfig", "PrunePlan", "mask_hash", "sparsity_grid",
]  # fmt: skip

THETAS = ("haar", "legacy")
"""Units of the thresholds on singular vectors in budget "cycle"."""

PRIORS = tuple(
    name
    for name, preset in PRESETS.items()
    if preset.score not in LAYERWISE and preset.budget not in MEASURED and preset.restore == "none"
)
"""The methods whose mask can be a prior: known before any layer is pruned, and without labels."""

GIVEN = "given"
"""The prior of a config whose mask was passed to prune_ as tensors."""


BLOCKS = "blocks"
"""What `permute` is where channels change places inside blocks only."""


def _one_of(name: str, value: Any, valid: Iterable[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(valid)}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


@dataclass(frozen=True)
class PruneConfig:
    """What to prune, how much and how; every field has a default and is checked.

    Args:
        sparsity: fraction of the selected weights that is zero afterwards, over all layers together; [0, 1).
        method: a preset (a key of PRESETS); "auto": the best preset for what is at hand; or "hybrid": "magnitude" to
            20 % and "ser" above.
        budget: key of BUDGETS, how the sparsity is shared over layers; "best": of presets.BEST_OF the one that changes
            the model's outputs least on an eighth of the calibration images, held out for that; None: the method's.
        score: key of SCORES, which entries matter; None: the method's.
        repair: key of REPAIRS, what becomes of the entries that stay; None: the method's.
        permute: first let channels change places where the model allows it, so that mini-blocks hold what costs alike
            and n:m groups do not (see permute.permute_, and residual.permute_stream_ for those that all blocks share,
            which "blocks" leaves where they are); for all patterns but "unstructured", with calibration images.
            None: "blocks" for mini-blocks where method "auto" has images.
        pattern: "unstructured"; n:m such as "2:4", which takes only sparsity 1 - n / m; n:mxr such as "2:4x4": the
            same for r outputs that share their inputs; or rxc such as "4x1": mini-blocks of 4 outputs x 1 input that go
            or stay whole (the sparsity is then met to one mini-block), or larger blocks such as "32x32". Several of
            them: each weight gets the one, and the share of zeros, at which all lose least for the time that they take
            (see mixing.choose_patterns), by times that `prune_` is given; with calibration images.
            Or "spectral": each nn.Linear becomes a SpectralLinear, factors of its spikes plus a rest, and only the rest
            is pruned, without a pattern; the sparsity is of the rests, and images are needed (pruning/spikes.py).
        spikes: for pattern "spectral", the share of the spikes above the edge, the largest first, that become factors,
            (0, 1]; at least one where there is any.
        linear_speedup: with several patterns, how many times as fast as dense the selected weights shall be by those
            times, >= 1; `sparsity` is then what came of it. None: the sparsity says how far it goes.
        targets: roles, groups or globs (see models.prunable_weights); None: attention and MLP projections.
        ignore: roles, groups or globs to leave out.
        haar: z of the singular-vector step before pruning (docs/math.md (17)), in Haar deviations; 0: no such step.
        alpha_regime: budget "edge" at s <= 0.20 uses the Hill exponents as published, instead of plain magnitude.
        theta: unit of the thresholds on singular vectors in budget "cycle": "haar" (scale-free) or "legacy"
            (theta grows with N K, as published).
        soft_threshold: after each cycle of budget "cycle" the weights that stay shrink by this many times the published
            amount (docs/math.md (23)), >= 0; none of them to zero. 0: no such step; 1: as published.
        legacy: spectra, thresholds and, with `soft_threshold`, the shrinking of each cycle as the published code has
            them, defects included: fits with `legacy` (see spectrum.fit.fit_spectrum), `theta` "legacy", and the stage
            of AdamW entry by entry (spectrum.denoise.legacy_stage) instead of one soft threshold.
        seed: of score "random", and of the order of the images with `restore`.
        restore: one of RESTORES, by what entries come back after 3 % more than asked were removed: "movement" (training
            these alone) or "gradient" (|g W|); both need calibration images with labels. None: the method's.
        prior: for score "cast", whose mask the pattern stays close to: one of PRIORS (its unstructured mask of the same
            sparsity) or "given" (the zeros of tensors that prune_ gets); None: no prior.
        alpha: how close: what an entry that differs from the prior costs, in mean costs of the group's patterns;
            finite, >= 0. Without a prior it has no effect.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range or an unknown name; the message lists the valid ones.
    """

    sparsity: float = 0.5
    method: str = "auto"
    budget: str | None = None
    score: str | None = None
    pattern: str | tuple[str, ...] = "unstructured"
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    haar: float = 0.0
    alpha_regime: bool = False
    theta: str = "haar"
    seed: int = 0
    repair: str | None = None
    restore: str | None = None
    permute: bool | str | None = None
    prior: str | None = None
    alpha: float = 0.5
    soft_threshold: float = 0.0
    linear_speedup: float | None = None
    spikes: float = 1.0
    legacy: bool = False

    def __post_init__(self) -> None:
        _number("sparsity", self.sparsity)
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity: expected a fraction in [0, 1), got {self.sparsity}")
        _one_of("method", self.method, ("auto", "hybrid", *PRESETS))
        if self.budget is not None:
            _one_of("budget", self.budget, (*BUDGETS, BEST))
        if self.score is not None:
            _one_of("score", self.score, SCORES)
        if self.repair is not None:
            _one_of("repair", self.repair, REPAIRS)
        if self.restore is not None:
            _one_of("restore", self.restore, RESTORES)
        params = self._check_patterns()
        for name in ("targets", "ignore"):
            words = getattr(self, name)
            if words is None and name == "targets":
                continue
            if not isinstance(words, Iterable):
                raise TypeError(f"{name}: expected strings (roles, groups or globs), got {type(words).__name__}")
            words = (words,) if isinstance(words, str) else tuple(words)
            if not all(isinstance(word, str) for word in words):
                raise TypeError(f"{name}: expected strings (roles, groups or globs), got {words!r}")
            object.__setattr__(self, name, words)
        if self.targets == ():
            raise ValueError("targets: expected at least one role, group or glob; None selects the default")
        _number("haar", self.haar)
        if not (math.isfinite(self.haar) and self.haar >= 0):
            raise ValueError(f"haar: expected a finite number >= 0, got {self.haar}")
        for name in ("alpha_regime", "legacy"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.permute, bool | str | None):
            raise TypeError(f"permute: expected a bool, {BLOCKS!r} or None, got {type(self.permute).__name__}")
        if isinstance(self.permute, str) and self.permute != BLOCKS:
            raise ValueError(f"permute: expected True, False, {BLOCKS!r} or None, got {self.permute!r}")
        if self.permute and not params:
            raise ValueError(
                f"permute: pattern {self.pattern!r} has no mini-blocks and no groups to fill; take '4x1', '2:4' or the "
                "like, or no permute"
            )
        if self.prior is not None:
            _one_of("prior", self.prior, (*PRIORS, GIVEN))
        if self.prior == GIVEN and self.permute:
            raise ValueError(
                "permute: channels change places, and a prior that is given as tensors does not; take prior= a method "
                "or no permute"
            )
        _number("alpha", self.alpha)
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha: expected a finite number >= 0, got {self.alpha}")
        _number("soft_threshold", self.soft_threshold)
        if not (math.isfinite(self.soft_threshold) and self.soft_threshold >= 0):
            raise ValueError(f"soft_threshold: expected a finite number >= 0, got {self.soft_threshold}")
        _one_of("theta", self.theta, THETAS)
        _number("spikes", self.spikes)
        if not 0 < self.spikes <= 1:
            raise ValueError(f"spikes: expected a share in (0, 1], got {self.spikes}")
        if self.spikes != 1 and self.pattern != SPIKES:
            raise ValueError(f"spikes: goes with pattern {SPIKES!r}, got pattern {self.pattern!r}; pass one or neither")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: expected an int, got {type(self.seed).__name__}")

    def _check_patterns(self) -> list[dict[str, int]]:
        """The parameters of each pattern that has some."""
        if not isinstance(self.pattern, str) and isinstance(self.pattern, Iterable):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        params = [parse_pattern(pattern)[1] for pattern in self.patterns]
        if not params or len(set(self.patterns)) < len(params):
            raise ValueError(f"pattern: expected a pattern, or several that differ, got {self.pattern!r}")
        if self.one_sparsity:
            only = 1 - params[0]["n"] / params[0]["m"]
            if not math.isclose(self.sparsity, only, abs_tol=1e-12):
                raise ValueError(f"pattern {self.pattern!r} takes only sparsity {only:g}, got {self.sparsity:g}")
        if self.linear_speedup is not None:
            _number("linear_speedup", self.linear_speedup)
            if not 1 <= self.linear_speedup < math.inf:
                raise ValueError(f"linear_speedup: expected a finite number >= 1, got {self.linear_speedup}")
            if not self.mixed:
                raise ValueError(
                    f"linear_speedup: goes with several patterns to choose among, got {self.pattern!r}; pass "
                    "pattern= a list such as ['unstructured', '4x2']"
                )
        return [one for one in params if one]

    @property
    def mixed(self) -> bool:
        """Whether each weight gets one of several patterns."""
        return not isinstance(self.pattern, str)

    @property
    def patterns(self) -> tuple[str, ...]:
        """In what shapes entries go: the pattern, or those to choose among; of "spectral" those of the rest."""
        if self.pattern == SPIKES:
            return ("unstructured",)
        return (self.pattern,) if not isinstance(self.pattern, tuple) else self.pattern

    @property
    def one_sparsity(self) -> bool:
        """Whether the pattern is n:m, which takes one sparsity only and leaves a budget no choice."""
        return isinstance(self.pattern, str) and ":" in self.pattern

    def resolve(self, calibrated: bool) -> Self:
        """The same request with method, budget, score, repair, restore and permute named.

        Args:
            calibrated: whether calibration images are at hand.

        Raises:
            ValueError: the score, the repair, the restore or the budget needs calibration images and there are none; or
                entries shall come back where a score is known only layer by layer, or an n:m pattern says itself how
                many go; or the score needs an n:m pattern, or the prior another score.
        """
        method, permute = self.method, self.permute or False
        if method == "auto":
            if self.permute is None and calibrated and not self.one_sparsity:
                mini_blocks = any(unit_of(parse_pattern(one)[1]) != (1, 1) for one in self.patterns)
                permute = BLOCKS if mini_blocks else False
            method = AUTO_CALIBRATED if calibrated or self.mixed else AUTO_NM if self.one_sparsity else AUTO
        elif method == "hybrid":
            method = "magnitude" if self.sparsity <= HYBRID_UNTIL else "ser"
        preset = PRESETS[method]
        resolved = replace(
            self,
            method=method,
            budget=self.budget or preset.budget,
            score=self.score or preset.score,
            repair=self.repair or preset.repair,
            restore=self.restore or preset.restore,
            permute=permute,
        )
        if self.mixed and (resolved.budget != "sensitivity" or resolved.score in GROUPED or resolved.haar > 0):
            raise ValueError(
                f"pattern: several are chosen among by measured losses, got budget {resolved.budget!r}, score "
                f"{resolved.score!r} and haar {resolved.haar:g}; take method='sensitivity', or one pattern"
            )
        if resolved.restore != "none" and (self.one_sparsity or self.mixed or resolved.score in LAYERWISE):
            raise ValueError(
                f"restore {resolved.restore!r}: expected a pattern without n:m and a score that is known before any "
                f"layer is pruned, got pattern {self.pattern!r} and score {resolved.score!r}; take restore='none'"
            )
        if resolved.budget == BEST and self.one_sparsity:
            raise ValueError(
                f"budget {BEST!r}: pattern {self.pattern!r} says itself how much goes from each layer; take budget=None"
            )
        if resolved.score in GROUPED and not self.one_sparsity:
            raise ValueError(
                f"score {resolved.score!r} compares whole n:m groups, got pattern {self.pattern!r}; take pattern='2:4' "
                "or another n:m, or another method"
            )
        if self.prior is not None and resolved.score not in GROUPED:
            raise ValueError(
                f"prior {self.prior!r}: score {resolved.score!r} takes no prior; take score='cast' or prior=None"
            )
        if resolved.pattern == SPIKES and not calibrated:
            raise ValueError(
                f"pattern {SPIKES!r} needs images, at least to see that the model computes the same; pass calibration="
            )
        if resolved.needs_calibration and not calibrated:
            what = "permute=True" if resolved.permute else f"restore {resolved.restore!r}"
            if resolved.score in CALIBRATED:
                what = f"score {resolved.score!r}"
            elif resolved.budget in (*MEASURED, BEST):
                what = f"budget {resolved.budget!r}"
            elif resolved.repair in CALIBRATED_REPAIRS:
                what = f"repair {resolved.repair!r}"
            without = [name for name, preset in PRESETS.items() if not _uses_images(preset)]
            raise ValueError(
                f"method {method!r} with {what} needs images; pass calibration=, or take a method "
                f"without: {', '.join(without)}"
            )
        return resolved

    @property
    def needs_calibration(self) -> bool:
        """Whether a resolved config needs calibration images."""
        return _uses_images(self) or bool(self.permute) or self.pattern == SPIKES

    @property
    def needs_labels(self) -> bool:
        """Whether a resolved config needs calibration images with labels."""
        return self.restore not in (None, "none")

    @property
    def measured(self) -> bool:
        """Whether the budget of a resolved config goes by what the weights cost the model; n:m leaves it no choice."""
        return self.budget in (*MEASURED, BEST) and not self.one_sparsity

    @property
    def layerwise(self) -> bool:
        """Whether a resolved config is carried out layer by layer on the pruned prefix."""
        return self.score in LAYERWISE or self.repair in CALIBRATED_REPAIRS

    @property
    def needs_fits(self) -> bool:
        """Whether a resolved config needs the layers' spectra."""
        return self.budget in SPECTRAL or self.haar > 0


def _uses_images(asked: PruneConfig | Preset) -> bool:
    named = asked.score in CALIBRATED or asked.repair in CALIBRATED_REPAIRS or asked.budget in (*MEASURED, BEST)
    return named or asked.restore not in (None, "none")


@dataclass(frozen=True)
class Count:
    """Zeros among a number of weights."""

    zeros: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.total if self.total else 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(self.zeros + other.zeros, self.total + other.total)


@dataclass(frozen=True)
class LayerPlan:
    """What was decided for one weight.

    Args:
        name: parameter name.
        role: one of models.ROLES.
        shape: (N, K) of the matrix.
        zeros: pruned entries.
        mask_hash: SHA-256 of the zero pattern; see `mask_hash`.
        params: of the pattern, such as {"n": 2, "m": 4}; {"rank": R} of a SpectralLinear, whose rest this is about.
        ms: predicted time where the pattern was chosen by times [ms], else None.
        dense_ms: in its fastest dense form, by the same times [ms], or None.
    """

    name: str
    role: str
    shape: tuple[int, int]
    zeros: int
    mask_hash: str
    params: Mapping[str, int] = field(default_factory=dict)
    ms: float | None = None
    dense_ms: float | None = None

    @property
    def pattern(self) -> str:
        """The name of its pattern."""
        return pattern_name(self.params)

    @property
    def total(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.total

    def holds(self, weight: PrunableWeight | None) -> bool:
        """Whether a weight has this shape and exactly these zeros."""
        if weight is None or weight.shape != self.shape:
            return False
        return mask_hash(weight.as_matrix() == 0) == self.mask_hash


def mask_hash(mask: Tensor) -> str:
    """SHA-256 of a zero pattern.

    Args:
        mask: bool [N, K], true where the weight is zero; rows in order, 8 entries to a byte, first entry highest. A
            sharded one (DTensor) is gathered first, so that every rank must call this.

    Returns:
        64 hexadecimal digits.
    """
    whole: Tensor = mask.full_tensor() if hasattr(mask, "full_tensor") else mask
    return hashlib.sha256(np.packbits(whole.cpu().numpy()).tobytes()).hexdigest()


class _Counted(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def zeros(self) -> int: ...
    @property
    def total(self) -> int: ...


OUTSIDE = "outside the blocks"
"""Name in `sparsity_grid` of what belongs to no numbered block."""


def sparsity_grid(layers: Iterable[_Counted]) -> dict[str, dict[str, Count]]:
    """Zeros by block and role, as a heat map shows them.

    Args:
        layers: those of a plan, or others with name, role, zeros and total.

    Returns:
        Block -> role -> zeros; blocks in the order of the layers, "outside the blocks" last, roles as in models.ROLES.
    """
    grid: dict[str, dict[str, Count]] = {}
    for layer in layers:
        row = grid.setdefault(block_name(layer.name) or OUTSIDE, {})
        row[layer.role] = row.get(layer.role, Count(0, 0)) + Count(layer.zeros, layer.total)
    if OUTSIDE in grid:
        grid[OUTSIDE] = grid.pop(OUTSIDE)
    return {block: {role: row[role] for role in ROLES if role in row} for block, row in grid.items()}


@dataclass(frozen=True)
class PrunePlan(Tabulated):
    """What was pruned, per layer; travels with the checkpoint as JSON.

    Args:
        config: the request, with method, budget, score and repair named.
        layers: the pruned weights, in the order of the model.
        prunable: all that could be pruned, patch embedding and head included: the paper's accounting.
        parameters: all parameters of the model; zeros are those of the prunable weights.
        fits: the spectra that the budget used, as found before pruning; empty if it used none.
        calibration_images: images that were used; 0 for a data-free method.
        target: what accuracy the sparsity was found for, with every trial; None where the sparsity was given.
        budgets: what each budget that "best" tried changed the outputs by, relative squares on held-out images;
            `config` names the one that was taken. Empty where a budget was given.
    """

    config: PruneConfig
    layers: tuple[LayerPlan, ...]
    prunable: Count
    parameters: Count
    fits: SpectralFits
    calibration_images: int = 0
    target: Target | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> Count:
        """Zeros over the selected weights; the asked sparsity is of these."""
        return Count(sum(layer.zeros for layer in self.layers), sum(layer.total for layer in self.layers))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the selected weights."""
        return self.selected.sparsity

    @property
    def linear_speedup(self) -> float | None:
        """Of the selected weights together, dense over pruned, by the times that patterns were chosen by; else None."""
        if not all(layer.ms and layer.dense_ms for layer in self.layers):
            return None
        return sum(layer.dense_ms or 0.0 for layer in self.layers) / sum(layer.ms or 0.0 for layer in self.layers)

    def _mix(self) -> list[str]:
        """What several patterns came to, in words."""
        if self.linear_speedup is None:
            return []
        counts = Counter("dense" if layer.ms == layer.dense_ms else layer.pattern for layer in self.layers)
        named = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return [f"chosen: {named}; {self.linear_speedup:.2f}x as fast as dense by the times given"]

    def verify(self, model: nn.Module) -> None:
        """Check that a model has exactly the zeros of this plan.

        Raises:
            ValueError: names the weights that are missing, have another shape or other zeros.
        """
        weights = {weight.name: weight for weight in prunable_weights(model, "all")}
        wrong = [layer.name for layer in self.layers if not layer.holds(weights.get(layer.name))]
        if wrong:
            raise ValueError(
                f"the zeros of {', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''} ({len(wrong)} of "
                f"{len(self.layers)} weights) differ from the plan; load the checkpoint that the plan was made for"
            )

    def table(self) -> Table:
        """One row per layer, and the totals in all accountings as notes."""
        config = self.config
        mixed = ("pattern", "ms", "dense ms") if config.mixed else ()
        rows = [(layer.name, layer.role, f"{layer.shape[0]}x{layer.shape[1]}", layer.zeros, layer.total,
                 round(100 * layer.sparsity, 2), *((layer.pattern, layer.ms, layer.dense_ms) if mixed else ()))
                for layer in self.layers]  # fmt: skip
        lines = [("selected weights", self.selected), ("prunable weights with patch embedding and head", self.prunable),
                 ("all parameters", self.parameters)]  # fmt: skip
        notes = [
            f"method {config.method} (budget {config.budget}, score {config.score}, repair {config.repair}"
            f"{f', restore {config.restore}' if config.needs_labels else ''}"
            f"{f', prior {config.prior} x {config.alpha:g}' if config.prior else ''}), "
            f"pattern {' or '.join(config.patterns) if config.mixed else config.pattern}, asked "
            + (f"sparsity {config.sparsity:g}" if config.linear_speedup is None else f"{config.linear_speedup:g}x"),
            *self._mix(),
            *(f"over {what}: {100 * n.sparsity:.2f} % ({n.zeros:,} of {n.total:,})" for what, n in lines),
        ]
        if ranks := [layer.params["rank"] for layer in self.layers if "rank" in layer.params]:
            beside = sum(layer.params.get("rank", 0) * sum(layer.shape) for layer in self.layers)
            notes.append(
                f"{len(ranks)} weights stand beside factors of rank {min(ranks)} to {max(ranks)}: "
                f"{beside:,} numbers more"
            )
        if self.budgets:
            tried = ", ".join(f"{name} {loss:.4g}" for name, loss in self.budgets.items())
            notes.append(f"budgets tried, relative change of the outputs on held-out images: {tried}")
        if self.target is not None:
            target = self.target
            notes.append(
                f"found for a drop of at most {100 * target.max_drop:g} points from {target.accuracy:.2%} on "
                f"{target.images} images, to {target.tolerance:g} in sparsity:"
            )
            for trial in target.trials:
                verdict = "" if target.allows(trial.accuracy) else ", too low"
                notes.append(f"  {trial.sparsity:.4f}: {trial.accuracy:.2%}{verdict}")
        return Table(("weight", "role", "shape", "zeros", "total", "sparsity %", *mixed), rows, notes)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps(
            {
                "config": asdict(self.config),
                "layers": [
                    {**asdict(layer), "sparsity": layer.sparsity, "total": layer.total} for layer in self.layers
                ],
                "selected": asdict(self.selected),
                "prunable": asdict(self.prunable),
                "parameters": asdict(self.parameters),
                "fits": {name: fit.to_dict() for name, fit in self.fits.items()},
                "calibration_images": self.calibration_images,
                "target": None if self.target is None else asdict(self.target),
                "budgets": dict(self.budgets),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not the JSON of a plan; names what is missing.
        """
        try:
            data = json.loads(text)
            names = {one.name for one in fields(LayerPlan)}
            layers = [{key: value for key, value in layer.items() if key in names} for layer in data["layers"]]
            return cls(
                config=PruneConfig(**data["config"]),
                layers=tuple(LayerPlan(**{**layer, "shape": tuple(layer["shape"])}) for layer in layers),
                prunable=Count(**data["prunable"]),
                parameters=Count(**data["parameters"]),
                fits=SpectralFits({name: SpectralFit.from_dict(fit) for name, fit in data["fits"].items()}),
                calibration_images=data["calibration_images"],
                target=None if data.get("target") is None else _target(data["target"]),
                budgets=data.get("budgets", {}),
            )
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of a PrunePlan ({error!r}); expected what to_json wrote") from error


def _target(data: Mapping[str, Any]) -> Target:
    return Target(**{**data, "trials": tuple(Trial(**trial) for trial in data["trials"])})
