"""Factorizations: ``(weight, rank, statistics) -> Factors``, one file per method."""

from lightning_prehab.factorizations.base import Factorization, Factors, MetricFactorization
from lightning_prehab.factorizations.kronecker import KroneckerSVD
from lightning_prehab.factorizations.svd import SVD
from lightning_prehab.factorizations.whitened import WhitenedSVD

__all__ = ["SVD", "Factorization", "Factors", "KroneckerSVD", "MetricFactorization", "WhitenedSVD"]
