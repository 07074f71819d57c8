"""Truncation weighted by the Fisher information of rows or columns."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations.base import MetricFactorization
from lightning_prehab.statistics.sums import LayerStatistics


@dataclass(frozen=True)
class FisherSVD(MetricFactorization):
    """Rows that the loss is sensitive to are kept better (FWSVD, Hsu et al., 2022, https://arxiv.org/abs/2207.00112).

    With ``F`` the squared weight gradients summed over batches, row ``i`` weighs ``d_i^2 = sum_j F_ij``; the cut is the
    truncated SVD of ``diag(d) W``, divided back: the weighted least squares optimum for weights that are equal within a
    row.

    Args:
        axis: ``"rows"`` as in the paper; ``"columns"`` weighs input features instead, ``"both"`` rows and columns.

    Raises:
        ArgumentError: If ``axis`` is none of these.
    """

    axis: Literal["rows", "columns", "both"] = "rows"
    needs_inputs: ClassVar[bool] = True
    needs_weight_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.axis not in ("rows", "columns", "both"):
            raise ArgumentError(f"axis must be 'rows', 'columns' or 'both', got {self.axis!r}.")

    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """Diagonals ``(sum_j F_ij, sum_i F_ij)``, or None for the axis that is not weighed."""
        rows, columns = statistics.fisher()
        return (rows if self.axis != "columns" else None), (columns if self.axis != "rows" else None)
