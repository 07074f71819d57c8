"""The three acts as Lightning callbacks."""

from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.callbacks.factor_training import FactorTraining
from lightning_prehab.callbacks.paper_prehab import PaperPrehab
from lightning_prehab.callbacks.prehab import PrehabCallback
from lightning_prehab.callbacks.rehab import RehabSchedule

__all__ = ["CompressionCallback", "FactorTraining", "PaperPrehab", "PrehabCallback", "RehabSchedule"]
