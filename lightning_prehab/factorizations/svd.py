"""Plain truncated SVD."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prehab.decomposition import WeightedSVD, decompose_many
from lightning_prehab.factorizations.base import Decomposition, Factorization, Factors
from lightning_prehab.statistics import LayerStatistics


@dataclass(frozen=True)
class SVD(Factorization):
    """Closest matrix of the given rank in the Frobenius norm (Eckart and Young, 1936, https://doi.org/10.1007/BF02288367).

    Needs no data. It treats all input directions as equally likely, which they are not: with data,
    :class:`~lightning_prehab.WhitenedSVD` and :class:`~lightning_prehab.KroneckerSVD` cut the same layer at a smaller
    loss.

    >>> import torch
    >>> factors = SVD()(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    >>> (factors.B @ factors.A).diagonal().round(decimals=6).tolist()
    [3.0, 2.0, 0.0]
    """

    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """Factors of ``weight`` at ``rank``; statistics are ignored."""
        return self.decompose([(weight, statistics)])[0].factors(rank)

    def decompose(self, items: Sequence[tuple[Tensor, LayerStatistics | None]]) -> list[Decomposition]:
        """One eigenproblem for each weight, those of one size batched."""

        def decomposition(svd: WeightedSVD) -> Decomposition:
            return Decomposition(svd.singular_values, lambda rank: Factors(*svd.low_rank(rank)))

        return [decomposition(svd) for svd in decompose_many([(weight, None, None) for weight, _ in items])]
