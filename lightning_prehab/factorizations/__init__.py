"""Factorizations: ``(weight, rank, statistics) -> Factors``, one file per method."""

from lightning_prehab.factorizations.activation import ActivationSVD
from lightning_prehab.factorizations.base import Decomposition, Factorization, MetricFactorization
from lightning_prehab.factorizations.fisher import FisherSVD
from lightning_prehab.factorizations.kronecker import KroneckerSVD
from lightning_prehab.factorizations.low_rank_plus_sparse import LowRankPlusSparse
from lightning_prehab.factorizations.svd import SVD
from lightning_prehab.factorizations.whitened import WhitenedSVD
from lightning_prehab.linalg.factors import Factors

__all__ = [
    "SVD",
    "ActivationSVD",
    "Decomposition",
    "Factorization",
    "Factors",
    "FisherSVD",
    "KroneckerSVD",
    "LowRankPlusSparse",
    "MetricFactorization",
    "WhitenedSVD",
]
