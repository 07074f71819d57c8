"""Truncation of the whitened weight: optimal for the output of the layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_prehab.factorizations.base import MetricFactorization, check_shrinkage
from lightning_prehab.linalg.decomposition import WeightedSVD
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import shrink, to_float64
from lightning_prehab.linalg.products import Product, ProductSVD
from lightning_prehab.statistics.sums import LayerStatistics


@dataclass(frozen=True)
class WhitenedSVD(MetricFactorization):
    """Smallest error of the layer's *output* over the calibration data: ``min E |W x - W_r x|^2``.

    With ``C = E[x x^T] = S S^T`` this is the truncated SVD of ``W S``, mapped back (SVD-LLM, Wang et al., 2024,
    https://arxiv.org/abs/2403.07378). No Cholesky factor is taken, so rank-deficient statistics are fine.

    Args:
        centered: Minimize over the bias too: ``C`` becomes the covariance ``C - mu mu^T`` and the bias moves by
            ``(W - W_r) mu``. A layer without a bias gets one. The covariance is a difference of float32 sums: means of
            more than some hundred standard deviations drown it.
        shrinkage: In ``[0, 1]``; share of ``(trace C / n) I`` mixed into ``C``. Raise it when there are fewer
            calibration tokens than about four times ``in_features``.
    """

    centered: bool = False
    shrinkage: float = 0.0
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_shrinkage("shrinkage", self.shrinkage)

    @property
    def adds_bias(self) -> bool:
        """True if ``centered``."""
        return self.centered

    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(None, C)``."""
        moment = to_float64(statistics.input_second_moment())
        if self.centered:
            mean = to_float64(statistics.input_mean())
            moment = moment - mean[:, None] * mean[None, :]
        return None, shrink(moment, self.shrinkage)

    def at_rank(
        self, svd: WeightedSVD | ProductSVD, weight: Tensor | Product, statistics: LayerStatistics
    ) -> Callable[[int], Factors]:
        """Factors with a bias shift if ``centered``."""
        if not self.centered:
            return super().at_rank(svd, weight, statistics)
        like, mean = svd.low_rank(1)[0], statistics.input_mean()
        through = weight.detach().to(like) @ mean.to(like)  # the weight may be a whole one that is there for a moment

        def factors(rank: int) -> Factors:
            a, b = svd.low_rank(rank)
            return Factors(a, b, through.to(a) - b @ (a @ mean.to(a)))

        return factors
