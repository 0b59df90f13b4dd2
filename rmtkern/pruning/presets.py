"""The named methods: a budget, a score, a repair and what may come back. Nothing else is decided here."""

from dataclasses import dataclass

__all__ = [
    "AUTO", "AUTO_CALIBRATED", "AUTO_NM", "AUTO_NO_GRADIENTS", "BEST", "BEST_OF", "HYBRID_UNTIL", "PRESETS", "RESTORES",
    "Preset",
]  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A budget (key of BUDGETS), a score (of SCORES), a repair (of REPAIRS) and a restore (of RESTORES)."""

    budget: str
    score: str
    repair: str = "none"
    restore: str = "none"


PRESETS: dict[str, Preset] = {
    "magnitude": Preset("global", "magnitude"),
    "uniform": Preset("uniform", "magnitude"),
    "row": Preset("row", "magnitude"),
    "random": Preset("uniform", "random"),
    "seb": Preset("edge", "magnitude"),
    "rmt": Preset("cycle", "magnitude"),
    "alphapruning": Preset("alphapruning", "magnitude"),
    "wanda": Preset("row", "activation"),
    "ser": Preset("edge", "magnitude", restore="movement"),
    "ser-gradient": Preset("edge", "magnitude", restore="gradient"),
    "obs": Preset("uniform", "obs", "obs"),
    "admm": Preset("uniform", "admm", "obs"),
    "cast": Preset("uniform", "cast"),
    "sensitivity": Preset("sensitivity", "admm", "obs"),
    "edge-sensitivity": Preset("edge-sensitivity", "admm", "obs"),
}
"""Method -> preset."""

RESTORES = ("none", "movement", "gradient")
"""Which entries come back after 3 % more than asked were removed; see training/reallocate.py."""

BEST = "best"
"""In the place of a budget: that of BEST_OF which changes the model's outputs least on held-out calibration images."""

BEST_OF = ("edge", "sensitivity", "edge-sensitivity")
"""The budgets that "best" tries: by the Marchenko-Pastur edge, by measured losses, by both."""

HYBRID_UNTIL = 0.20
"""Highest sparsity at which method "hybrid" is "magnitude"; above, it is "ser" (arXiv 2606.02608)."""

# Chosen on 500 training images (benchmarks/results/accuracy-vits14-imagenette-choice.csv): "row" was best of the
# data-free presets, closely followed by "uniform" and "rmt" (within the error of so few images).
AUTO = "row"
"""What method="auto" means without calibration images."""

AUTO_CALIBRATED = "sensitivity"
"""What method="auto" means with calibration images (docs/calibrated.md has what it was chosen by)."""

AUTO_NO_GRADIENTS = "admm"
"""What it means for a model that cannot run backward."""

AUTO_NM = "magnitude"
"""What method="auto" means for an n:m pattern without calibration images: it leaves a budget nothing to decide."""
