"""Plain truncated SVD."""

from dataclasses import dataclass

from torch import Tensor

from lightning_prehab.factorizations.base import MetricFactorization
from lightning_prehab.statistics.sums import LayerStatistics


@dataclass(frozen=True)
class SVD(MetricFactorization):
    """Closest matrix of the given rank in the Frobenius norm (Eckart and Young, 1936, https://doi.org/10.1007/BF02288367).

    Needs no data. It treats all input directions as equally likely, which they are not: with data,
    :class:`~lightning_prehab.WhitenedSVD` and :class:`~lightning_prehab.KroneckerSVD` cut the same layer at a smaller
    loss.

    >>> import torch
    >>> factors = SVD()(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    >>> (factors.B @ factors.A).diagonal().round(decimals=6).tolist()
    [3.0, 2.0, 0.0]
    """

    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(None, None)``."""
        return None, None
