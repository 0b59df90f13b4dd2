"""What to remove: budgets, scores and patterns, and the plan that records the decision."""

from rmtkern.pruning.plan import Count, LayerPlan, PruneConfig, PrunePlan
from rmtkern.pruning.presets import PRESETS

__all__ = ["PRESETS", "Count", "LayerPlan", "PruneConfig", "PrunePlan"]
