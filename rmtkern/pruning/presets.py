"""The named methods: a budget, a score and a repair each. Nothing else is decided here."""

from dataclasses import dataclass

__all__ = ["AUTO", "AUTO_CALIBRATED", "AUTO_NM", "PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A budget (key of BUDGETS), a score (key of SCORES) and a repair (key of REPAIRS)."""

    budget: str
    score: str
    repair: str = "none"


PRESETS: dict[str, Preset] = {
    "magnitude": Preset("global", "magnitude"),
    "uniform": Preset("uniform", "magnitude"),
    "row": Preset("row", "magnitude"),
    "random": Preset("uniform", "random"),
    "seb": Preset("edge", "magnitude"),
    "rmt": Preset("cycle", "magnitude"),
    "wanda": Preset("row", "activation"),
    "obs": Preset("uniform", "obs", "obs"),
    "admm": Preset("uniform", "admm", "obs"),
}
"""Method -> preset."""

# Chosen on 500 training images (benchmarks/results/accuracy-vits14-imagenette-choice.csv): "row" was best of the
# data-free presets, closely followed by "uniform" and "rmt" (within the error of so few images).
AUTO = "row"
"""What method="auto" means without calibration images."""

AUTO_CALIBRATED = "admm"
"""What method="auto" means with calibration images."""

AUTO_NM = "magnitude"
"""What method="auto" means for an n:m pattern without calibration images: it leaves a budget nothing to decide."""
