"""The public names: importing this module imports all of the package, and torch and lightning with it."""

from lightning_prehab.callbacks import CompressionCallback, FactorTraining, PaperPrehab, PrehabCallback, RehabSchedule
from lightning_prehab.compress import apply_plan_, compress_, make_plan
from lightning_prehab.errors import PrehabError
from lightning_prehab.factorizations import SVD, ActivationSVD, FisherSVD, KroneckerSVD, LowRankPlusSparse, WhitenedSVD
from lightning_prehab.files.checkpoints import LowRankCheckpointMixin, load_from_checkpoint
from lightning_prehab.files.folders import load_compressed, save_compressed
from lightning_prehab.integrations.metrics import EffectiveRankMetric, StableRankMetric
from lightning_prehab.integrations.own_samples import own_samples
from lightning_prehab.larger_than_memory import compress_folder
from lightning_prehab.layers.attention import LowRankMultiheadAttention
from lightning_prehab.layers.blocks import LowRankBlocks
from lightning_prehab.layers.conv import LowRankConv1d, LowRankConv2d
from lightning_prehab.layers.linear import LowRankLinear, LowRankPlusSparseLinear
from lightning_prehab.layers.pivot import PivotConv1d, PivotConv2d, PivotLinear
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.rank_policies import (
    CalibratedBudget,
    EnergyThreshold,
    ParameterBudget,
    ProbeBudget,
    RankRatio,
    ZeroSum,
)
from lightning_prehab.refinement.refine import refine_
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.regularizers import (
    EffectiveRank,
    NuclearNorm,
    SpectralWeightDecay,
    StableRank,
    TailEnergy,
    TailShrinkage,
)
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.extent import print_compression
from lightning_prehab.statistics.calibration import collect_statistics
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.surgery.layouts import to_factors_, to_pivot_
from lightning_prehab.surgery.structure import to_dense_
from lightning_prehab.targets.find import find_targets

__all__ = [
    "SVD",
    "ActivationSVD",
    "CalibratedBudget",
    "CompressionCallback",
    "CompressionPlan",
    "CompressionReport",
    "EffectiveRank",
    "EffectiveRankMetric",
    "EnergyThreshold",
    "FactorTraining",
    "FisherSVD",
    "KroneckerSVD",
    "LayerPlan",
    "LayerStatistics",
    "LowRankBlocks",
    "LowRankCheckpointMixin",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankPlusSparse",
    "LowRankPlusSparseLinear",
    "NuclearNorm",
    "PaperPrehab",
    "ParameterBudget",
    "PivotConv1d",
    "PivotConv2d",
    "PivotLinear",
    "PrehabCallback",
    "PrehabError",
    "ProbeBudget",
    "RankRatio",
    "Recipe",
    "Refinement",
    "RehabSchedule",
    "SpectralWeightDecay",
    "StableRank",
    "StableRankMetric",
    "TailEnergy",
    "TailShrinkage",
    "WhitenedSVD",
    "ZeroSum",
    "apply_plan_",
    "collect_statistics",
    "compress_",
    "compress_folder",
    "find_targets",
    "load_compressed",
    "load_from_checkpoint",
    "make_plan",
    "own_samples",
    "print_compression",
    "refine_",
    "save_compressed",
    "to_dense_",
    "to_factors_",
    "to_pivot_",
]
