"""What to remove: budgets, scores and patterns, and the plan that records the decision."""

from .plan import Count, LayerPlan, PruneConfig, PrunePlan
from .presets import PRESETS

__all__ = ["PRESETS", "Count", "LayerPlan", "PruneConfig", "PrunePlan"]
