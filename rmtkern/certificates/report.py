"""The certificate as data: what was measured, what follows, and in words which numbers are proofs. Prints as tables.

It runs no model; the numbers come from walk.py and the inequalities from statements.py.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from rmtkern.tables import Table, Tabulated

__all__ = ["Bound", "Certificate", "Measured", "StepCertificate"]

THESE, EVERY, ESTIMATE = "proof for these images", "proof for every input", "estimate, no proof"


@dataclass(frozen=True)
class Measured:
    """What the two models did on the images.

    Args:
        logit: mean over images of ||dz||_inf. logit_max: the largest.
        kept: share of images whose predicted label stayed, [0, 1].
        loss: mean |change of the cross-entropy| over images [nats]; None without labels, as the next three.
        loss_change: change of the mean cross-entropy [nats].
        accuracy: top-1 of the dense model. accuracy_pruned: of the pruned one.
    """

    logit: float
    logit_max: float
    kept: float
    loss: float | None
    loss_change: float | None
    accuracy: float | None
    accuracy_pruned: float | None


@dataclass(frozen=True)
class Bound:
    """One way to bound what pruning did, and how far above the truth it is.

    Args:
        name: the method.
        holds: "proof for these images", "proof for every input" or "estimate, no proof".
        logit: mean over images of the bound on ||dz||_inf (on osc(dz) for the sharp ones).
        slack: `logit` over what was measured; 1 is exact. None: nothing moved.
        slack_least: the same for the image where it is smallest; a proof never falls below 1 (but for rounding).
        loss: bound on the change of the mean cross-entropy [nats]. loss_slack: over the measured mean |change|; None
            without labels.
        certified: share of images whose predicted label provably stays, [0, 1].
        accuracy: bound on the change of the accuracy, up or down, [0, 1]; None without labels.
        objective: bound on the change of J = CE + sum l2 A^2 + sum l1 |A|; < 0 is a certified decrease. None: neither
            l1 nor l2 was given.
    """

    name: str
    holds: str
    logit: float
    slack: float | None
    slack_least: float | None
    loss: float
    loss_slack: float | None
    certified: float
    accuracy: float | None
    objective: float | None


@dataclass(frozen=True)
class StepCertificate:
    """One weight's step from dense to pruned, in the network where the weights before it are pruned already.

    Means are over images. R is what the step takes away.

    Args:
        name: of the parameter. role: one of models.ROLES. shape: (N, K); None for the rest of the parameters.
        mask: whether R is nonzero only where the pruned weight is zero (then the mask forms hold; else the additive).
        removed_l2: ||R||_F. removed_l1: ||R||_1, sum of |R|.
        logit: mean ||dz||_inf of this step. budget: B = 2 x that, by which the mean cross-entropy can move.
        change: mean ||R psi||_inf, exact; psi are the weight's inputs. None: its products could not be seen.
        v1: mean ||R||_inf ||psi||_inf. v2: mean max row norm x ||psi||_2. v3: mean ||R||_2 ||psi||_2.
        slack: mean min(v1, v2) over `change`.
        any_input: bound on ||R psi||_inf for every input of the model; None where no LayerNorm feeds the weight.
        lipschitz: L, l_inf bound from the weight's output to the logits, for every input; None: none known.
        a_priori: mean L ||R psi||_inf, a bound on ||dz||_inf; None without L.
        a_priori_norms: mean L min(v1, v2).
        local: mean of the gradient's row sum x ||R psi||_inf: an estimate of ||dz||_inf. None: not asked.
        proxy: ||R||_2 x mean ||psi||_inf, the papers' audit: no bound.
        penalty: by which the step lowers sum l2 A^2 + sum l1 |A|.
        restoring_saves: B(all) - B(all but this weight), measured; None: not asked.
        restoring_helps: whether that exceeds the penalty of restoring it.
    """

    name: str
    role: str
    shape: tuple[int, int] | None
    mask: bool
    removed_l2: float
    removed_l1: float
    logit: float
    budget: float
    change: float | None
    v1: float | None
    v2: float | None
    v3: float | None
    slack: float | None
    any_input: float | None
    lipschitz: float | None
    a_priori: float | None
    a_priori_norms: float | None
    local: float | None
    proxy: float | None
    penalty: float
    restoring_saves: float | None
    restoring_helps: bool | None


@dataclass(frozen=True)
class Certificate(Tabulated):
    """What can be guaranteed about a pruned model, and what only seems so; prints as tables with words.

    Args:
        images: seen. classes: logits. dtype: both models ran in it.
        measured: the truth on the images.
        bounds: from the tightest proof to the loosest, then the estimates.
        steps: one for each weight that differs, in the order in which the model uses them.
        proxy: sum of the steps' proxies (papers' audit).
        objective_change: measured change of J; None without labels or without l1 and l2.
    """

    images: int
    classes: int
    dtype: str
    measured: Measured
    bounds: tuple[Bound, ...]
    steps: tuple[StepCertificate, ...]
    proxy: float | None
    objective_change: float | None

    def table(self) -> Table:
        """The bounds, and in words what each kind of number is worth."""
        columns = ["bound", "holds", "logit change <=", "slack", "least", "loss change <=", "loss slack",
                   "labels certified %", "accuracy change <= %"]  # fmt: skip
        rows: list[tuple[Any, ...]] = [
            (b.name, b.holds, b.logit, b.slack, b.slack_least, b.loss, b.loss_slack, round(100 * b.certified, 2),
             None if b.accuracy is None else round(100 * b.accuracy, 2)) for b in self.bounds
        ]  # fmt: skip
        if self.bounds and self.bounds[0].objective is not None:
            columns.append("objective change <=")
            rows = [(*row, b.objective) for row, b in zip(rows, self.bounds, strict=True)]
        return Table(columns, rows, self._words())

    def step_table(self) -> Table:
        """One row per step."""
        columns = ["step", "logit change", "budget", "R psi", "norm bound / R psi", "any input", "L", "L R psi",
                   "local estimate", "proxy"]  # fmt: skip
        rows: list[tuple[Any, ...]] = [
            (s.name, s.logit, s.budget, s.change, s.slack, s.any_input, s.lipschitz, s.a_priori, s.local, s.proxy)
            for s in self.steps
        ]  # fmt: skip
        notes: list[str] = []
        if any(step.restoring_saves is not None for step in self.steps):
            columns += ["restoring saves", "worth it"]
            rows = [(*row, s.restoring_saves, s.restoring_helps) for row, s in zip(rows, self.steps, strict=True)]
            notes = ["worth it: restoring the weight lowers the bound on the objective by more than its penalty"]
        return Table(columns, rows, notes)

    def _words(self) -> list[str]:
        m = self.measured
        lines = [
            f"{self.images} images, {self.classes} classes, both models in {self.dtype}; slack: the bound over what "
            "was measured (mean), least: for the image where it is smallest",
            f"measured: logits moved by {m.logit:.4g} on average, {m.logit_max:.4g} at most; "
            f"{m.kept:.2%} of the labels stayed",
        ]
        if m.accuracy is not None and m.accuracy_pruned is not None and m.loss_change is not None:
            lines.append(
                f"measured: top-1 {m.accuracy:.2%} -> {m.accuracy_pruned:.2%}, loss {m.loss_change:+.4g}"
                + ("" if self.objective_change is None else f", objective {self.objective_change:+.4g}")
            )
        lines.append(
            f"{THESE}: exact inequalities on measured logits (or on R psi in float64); they say nothing about other "
            "images"
        )
        weights = [step for step in self.steps if step.shape is not None]
        known = sum(step.lipschitz is not None for step in weights)
        anywhere = sum(step.any_input is not None for step in weights)
        lines.append(
            f"{EVERY}: the norms of R, the Lipschitz bounds L ({known} of {len(weights)} weights have one; softmax "
            f"attention and LayerNorm have none) and `any input` ({anywhere} weights, fed by a LayerNorm), as long as "
            "the model's operations are those of the first image"
        )
        lines.append(
            f"{ESTIMATE}: the local estimate (gradients at the dense weights) and the proxy "
            f"(||R||_2 x mean ||psi||_inf{'' if self.proxy is None else f', sum {self.proxy:.4g}'}), which may lie on "
            "either side of the truth"
        )
        return lines

    def __str__(self) -> str:
        return f"{self.table().to_text()}\n\n{self.step_table().to_text()}"

    def _repr_html_(self) -> str:
        return f"{self.table().to_html()}\n{self.step_table().to_html()}"

    def to_json(self) -> str:
        """Everything, as a JSON object; what is infinite or unknown is null."""
        return json.dumps(_finite(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; what it wrote as null because it was infinite is None.

        Raises:
            ValueError: not the JSON of a certificate.
        """
        try:
            data = json.loads(text)
            data["measured"] = Measured(**data["measured"])
            data["bounds"] = tuple(Bound(**bound) for bound in data["bounds"])
            for step in data["steps"]:
                step["shape"] = None if step["shape"] is None else tuple(step["shape"])
            return cls(**{**data, "steps": tuple(StepCertificate(**step) for step in data["steps"])})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of a Certificate ({error!r}); expected what to_json wrote") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ratio(bound: float, truth: float) -> float | None:
    """`bound` over `truth`; None where the truth is 0."""
    return bound / truth if truth > 0 else None


def least(ratios: Sequence[float]) -> float | None:
    """The smallest; None of nothing."""
    return min(ratios, default=None)
