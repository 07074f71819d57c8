"""Rank policies: spectra of all targets -> rank for each, one file per policy."""

from lightning_prehab.rank_policies.base import BudgetPolicy, LayerChoices, Probe, RankPolicy
from lightning_prehab.rank_policies.calibrated_budget import CalibratedBudget
from lightning_prehab.rank_policies.energy_threshold import EnergyThreshold
from lightning_prehab.rank_policies.parameter_budget import ParameterBudget
from lightning_prehab.rank_policies.probe_budget import ProbeBudget
from lightning_prehab.rank_policies.rank_ratio import RankRatio
from lightning_prehab.rank_policies.zero_sum import ZeroSum

__all__ = [
    "BudgetPolicy",
    "CalibratedBudget",
    "EnergyThreshold",
    "LayerChoices",
    "ParameterBudget",
    "Probe",
    "ProbeBudget",
    "RankPolicy",
    "RankRatio",
    "ZeroSum",
]
