"""Truncation in the metric of the loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_prehab.factorizations.base import MetricFactorization, check_shrinkage
from lightning_prehab.linalg import shrink
from lightning_prehab.statistics import LayerStatistics


@dataclass(frozen=True)
class KroneckerSVD(MetricFactorization):
    """Smallest increase of the *loss*, to second order, with the curvature ``G (x) C``.

    ``C = E[x x^T]`` is the second moment of the inputs, ``G`` that of the output gradients; their Kronecker product is
    the K-FAC estimate of the Fisher matrix of the layer (Martens and Grosse, 2015, https://arxiv.org/abs/1503.05671).
    The cut is the truncated SVD of ``L^T W R`` with ``L L^T = G``, ``R R^T = C``, mapped back; half the dropped squares
    estimate the loss increase, in the same unit for every layer, so ranks may be traded between layers
    (:class:`~lightning_prehab.ParameterBudget`). Close relatives: GFWSVD (https://arxiv.org/abs/2505.17974), which has
    no shrinkage; OBD-LLM (https://arxiv.org/abs/2604.00821).

    The default of this package, together with that budget: see ``benchmarks/digits_vit.py``. With uniform ranks it is
    about level with :class:`~lightning_prehab.WhitenedSVD` there; what it adds is that layers become comparable.

    Args:
        gradient_shrinkage: In ``[0, 1]``; share of ``(trace G / m) I`` mixed into ``G``. The literature uses 0.3 to 0.7
            for noisy statistics.
        input_shrinkage: In ``[0, 1]``; the same for ``C``. Raise it when there are fewer calibration tokens than about
            four times ``in_features``.
    """

    gradient_shrinkage: float = 1e-4
    input_shrinkage: float = 0.0
    needs_inputs: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_shrinkage("gradient_shrinkage", self.gradient_shrinkage)
        check_shrinkage("input_shrinkage", self.input_shrinkage)

    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(G, C)``, both shrunk."""
        gradient = shrink(statistics.gradient_second_moment(), self.gradient_shrinkage)
        return gradient, shrink(statistics.input_second_moment(), self.input_shrinkage)
