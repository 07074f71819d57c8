"""The modules that take the place of dense layers, one file per kind of layer."""

from lightning_prehab.layers.attention import LowRankMultiheadAttention
from lightning_prehab.layers.blocks import LowRankBlocks
from lightning_prehab.layers.conv import LowRankConv1d, LowRankConv2d
from lightning_prehab.layers.linear import LowRankLayer, LowRankLinear, LowRankPlusSparseLinear
from lightning_prehab.layers.packing import packed, unpacked
from lightning_prehab.layers.pivot import PivotConv1d, PivotConv2d, PivotLayer, PivotLinear

__all__ = [
    "LowRankBlocks",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankPlusSparseLinear",
    "PivotConv1d",
    "PivotConv2d",
    "PivotLayer",
    "PivotLinear",
    "packed",
    "unpacked",
]
