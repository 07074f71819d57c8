"""Truncation of the whitened weight: optimal for the output of the layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_prehab.factorizations.base import Factors, MetricFactorization, check_shrinkage
from lightning_prehab.linalg import shrink, to_float64
from lightning_prehab.statistics import LayerStatistics


@dataclass(frozen=True)
class WhitenedSVD(MetricFactorization):
    """Smallest error of the layer's *output* over the calibration data: ``min E |W x - W_r x|^2``.

    With ``C = E[x x^T] = S S^T`` this is the truncated SVD of ``W S``, mapped back (SVD-LLM, Wang et al., 2024,
    https://arxiv.org/abs/2403.07378). No Cholesky factor is taken, so rank-deficient statistics are fine.

    Args:
        centered: Minimize over the bias too: ``C`` becomes the covariance ``C - mu mu^T`` and the bias moves by
            ``(W - W_r) mu``. A layer without a bias gets one.
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

    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """Factors of ``weight`` at ``rank``, with a bias shift if ``centered``."""
        factors = super().__call__(weight, rank, statistics)
        if not self.centered:
            return factors
        mean = to_float64(self._checked(weight, statistics).input_mean())
        return factors._replace(bias_shift=to_float64(weight) @ mean - factors.B @ (factors.A @ mean))
