"""Regularizers that prepare weights for the cut, one file per variant."""

from lightning_prehab.regularizers.base import Memory, Penalty
from lightning_prehab.regularizers.stable_rank import StableRank
from lightning_prehab.regularizers.tail_energy import TailEnergy

__all__ = ["Memory", "Penalty", "StableRank", "TailEnergy"]
