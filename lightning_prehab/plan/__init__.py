"""From a wish (the recipe) to a rank for each layer (the plan); nothing is changed."""

from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.layer_plan import LayerPlan

__all__ = ["CompressionPlan", "LayerPlan"]
