"""Rank policies: spectra of all targets -> rank for each, one file per policy."""

from lightning_prehab.rank_policies.base import LayerChoices, Probe, RankPolicy
from lightning_prehab.rank_policies.parameter_budget import ParameterBudget
from lightning_prehab.rank_policies.rank_ratio import RankRatio

__all__ = ["LayerChoices", "ParameterBudget", "Probe", "RankPolicy", "RankRatio"]
