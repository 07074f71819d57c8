"""Regularizers that prepare weights for the cut, one file per variant."""

from lightning_prehab.regularizers.base import Memory, Penalty, Shrinkage
from lightning_prehab.regularizers.effective_rank import EffectiveRank
from lightning_prehab.regularizers.metric import IDENTITY, Metric
from lightning_prehab.regularizers.nuclear_norm import NuclearNorm
from lightning_prehab.regularizers.spectral_weight_decay import SpectralWeightDecay
from lightning_prehab.regularizers.stable_rank import StableRank
from lightning_prehab.regularizers.strength import GradientRatio, strength_for_share
from lightning_prehab.regularizers.tail_energy import TailEnergy
from lightning_prehab.regularizers.tail_shrinkage import TailShrinkage

__all__ = [
    "IDENTITY",
    "EffectiveRank",
    "GradientRatio",
    "Memory",
    "Metric",
    "NuclearNorm",
    "Penalty",
    "Shrinkage",
    "SpectralWeightDecay",
    "StableRank",
    "TailEnergy",
    "TailShrinkage",
    "strength_for_share",
]
