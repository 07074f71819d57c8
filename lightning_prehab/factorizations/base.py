"""What every factorization has in common: from (weight, rank, statistics) to factors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.linalg import singular_values, weighted_low_rank, weighted_singular_values
from lightning_prehab.statistics import LayerStatistics


class Factors(NamedTuple):
    """``W ~ B A``, and what to add to the bias.

    Attributes:
        A: Shape ``(rank, in_features)``.
        B: Shape ``(out_features, rank)``.
        bias_shift: Shape ``(out_features,)``, or None when the bias stays as it is.
    """

    A: Tensor
    B: Tensor
    bias_shift: Tensor | None = None


class Factorization(ABC):
    """Turns one weight matrix into two factors. Subclasses are frozen dataclasses that check their own fields.

    A new method needs only ``__call__``; set the class variables if it reads statistics, and override :meth:`spectrum`
    if rank policies should see more than the plain singular values.

    Attributes:
        needs_inputs: The method reads input statistics.
        needs_gradients: The method reads output-gradient statistics.
        comparable: Squares in :meth:`spectrum` mean the same in every layer, so ranks may be traded between layers.
    """

    needs_inputs: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    comparable: ClassVar[bool] = False

    @property
    def adds_bias(self) -> bool:
        """Whether the factors come with a bias shift."""
        return False

    @abstractmethod
    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """Factors of ``weight`` (shape ``(m, n)``) at ``rank``; ``statistics`` is None for methods that need none."""

    def spectrum(self, weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
        """Singular values for rank policies: shape ``(min(m, n),)``, descending; by default those of the weight."""
        return singular_values(weight)

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data is needed at all."""
        return self.needs_inputs or self.needs_gradients


@dataclass(frozen=True)
class MetricFactorization(Factorization):
    """Best approximation in the metric ``trace(G D C D^T)``, ``D = W - B A``; a subclass says what G and C are."""

    @abstractmethod
    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(G, C)`` of shapes ``(m, m)`` and ``(n, n)``; None stands for the identity."""

    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """The truncated SVD of ``L^T W R`` with ``L L^T = G``, ``R R^T = C``, mapped back."""
        return Factors(*weighted_low_rank(weight, rank, *self.metric(self._checked(weight, statistics))))

    def spectrum(self, weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
        """Singular values of ``L^T W R``: the squares beyond the rank sum to the squared error in the metric."""
        return weighted_singular_values(weight, *self.metric(self._checked(weight, statistics)))

    def _checked(self, weight: Tensor, statistics: LayerStatistics | None) -> LayerStatistics:
        if statistics is None:
            raise StatisticsError(f"{type(self).__name__} needs calibration statistics; pass batches, or use SVD().")
        if (statistics.out_features, statistics.in_features) != tuple(weight.shape):
            raise StatisticsError(f"{statistics!r} does not belong to a weight of shape {tuple(weight.shape)}.")
        return statistics


def check_shrinkage(name: str, value: float) -> None:
    """Raises :class:`ArgumentError` unless ``0 <= value <= 1``."""
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{name} must lie in [0, 1], got {value}.")
