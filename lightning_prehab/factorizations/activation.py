"""Truncation with input features scaled by how strongly they are used."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_prehab.documents.checks import check_real
from lightning_prehab.factorizations.base import MetricFactorization
from lightning_prehab.statistics.sums import LayerStatistics


@dataclass(frozen=True)
class ActivationSVD(MetricFactorization):
    """Input features with large activations are kept better (ASVD, Yuan et al., 2023, https://arxiv.org/abs/2312.05821).

    The truncated SVD of ``W diag(s)`` with ``s_j = E[|x_j|]^alpha``, divided back.
    :class:`~lightning_prehab.WhitenedSVD` does the same with the whole second moment instead of a diagonal, and is
    optimal for the layer's output.

    Args:
        alpha: Exponent, at least 0; 0 is plain :class:`~lightning_prehab.SVD`. The paper uses 0.5.

    Raises:
        ArgumentError: If ``alpha`` is negative or not finite.
    """

    alpha: float = 0.5
    needs_inputs: ClassVar[bool] = True
    needs_magnitudes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real("alpha", self.alpha, "[0, inf)")

    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(None, s^2)``."""
        return None, statistics.input_mean_absolute().pow(2.0 * self.alpha)
