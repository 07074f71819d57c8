"""Truncation in the metric of the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_prehab.documents.checks import check_real
from lightning_prehab.documents.settings import later, settings_of
from lightning_prehab.errors import StatisticsError
from lightning_prehab.factorizations.base import MetricFactorization, check_shrinkage
from lightning_prehab.linalg.matrices import shrink, shrinkage_intensity
from lightning_prehab.statistics.sums import LayerStatistics, Wanted

#: Enough to make ``G`` invertible; more made no difference on MiniLM and a small GPT.
GRADIENT_SHRINKAGE = 1e-4


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
            for noisy statistics. ``"auto"``: as much as the difference between every other batch and the rest suggests
            (:func:`~lightning_prehab.linalg.matrices.shrinkage_intensity`), but never below the default.
        input_shrinkage: In ``[0, 1]``, or ``"auto"``; the same for ``C``. Raise it when there are fewer calibration
            tokens than about four times ``in_features``.
        gradient_trim: In ``[0, 0.5)``; share of each sequence that is left out of ``G`` at its begin and at its end,
            as LEMS does (ICML 2026, there 0.125). For outputs of shape ``(batch, positions, m)``; padding is no part of
            a sequence, and where the batch has ``position_ids`` that begin anew, so does the sequence.
        gradient_clip: Positive; gradients of tokens that are longer than so many times the median one of their batch
            are made that long before they are summed to ``G`` (LEMS). None leaves them as they are.

    Raises:
        ArgumentError: If a value is out of range.
    """

    gradient_shrinkage: float | Literal["auto"] = GRADIENT_SHRINKAGE
    input_shrinkage: float | Literal["auto"] = 0.0
    gradient_trim: float = later(0.0)
    gradient_clip: float | None = later(None)
    needs_inputs: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_shrinkage("gradient_shrinkage", self.gradient_shrinkage)
        check_shrinkage("input_shrinkage", self.input_shrinkage)
        check_real("gradient_trim", self.gradient_trim, "[0, 0.5)")
        check_real("gradient_clip", self.gradient_clip, "(0, inf)", optional=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings_of(self).items())})"

    @property
    def wanted(self) -> Wanted:
        """As for any method, with what is to be done to the gradients."""
        return super().wanted._replace(gradient_trim=self.gradient_trim, gradient_clip=self.gradient_clip)

    @property
    def needs_halves(self) -> bool:
        """True if a shrinkage is ``"auto"``."""
        return "auto" in (self.gradient_shrinkage, self.input_shrinkage)

    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(G, C)``, both shrunk."""
        g, c = statistics.gradient_second_moment(), statistics.input_second_moment()
        for_g: float | str = self.gradient_shrinkage
        for_c: float | str = self.input_shrinkage
        if isinstance(for_g, str):
            noise = self._intensity(g, statistics, LayerStatistics.gradient_second_moment, "samples")
            for_g = max(GRADIENT_SHRINKAGE, noise)
        if isinstance(for_c, str):
            for_c = self._intensity(c, statistics, LayerStatistics.input_second_moment, "tokens")
        return shrink(g, for_g), shrink(c, for_c)

    @staticmethod
    def _intensity(
        whole: Tensor, statistics: LayerStatistics, moment: Callable[[LayerStatistics], Tensor], count: str
    ) -> float:
        if statistics.half is None:
            raise StatisticsError(
                "Shrinkage 'auto' compares every other batch with the rest, but they were not kept apart; collect "
                "statistics with wanted=factorization.wanted."
            )
        share = int(getattr(statistics.half, count)) / max(int(getattr(statistics, count)), 1)
        if not 0.0 < share < 1.0:
            raise StatisticsError("Shrinkage 'auto' compares every other batch with the rest: it needs two or more.")
        first = moment(statistics.half)
        return shrinkage_intensity(first, (whole - share * first) / (1.0 - share), share)
