"""What every factorization has in common: from (weight, rank, statistics) to factors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor

from lightning_prehab.documents.checks import check_real
from lightning_prehab.errors import StatisticsError
from lightning_prehab.linalg.decomposition import BATCH_ENTRIES, WeightedSVD, decompose_many
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import singular_values, working_dtype
from lightning_prehab.linalg.products import Product, ProductSVD, decompose_product
from lightning_prehab.progress import counted, tell
from lightning_prehab.statistics.sums import LayerStatistics, Wanted


class Decomposition(NamedTuple):
    """One weight, decomposed once for all ranks.

    Attributes:
        singular_values: Spectrum for rank policies: shape ``(min(m, n),)``, descending.
        factors: Factors at a rank.
        compact: Frees what only ranks above the given one need, or None if nothing can be freed.
    """

    singular_values: Tensor
    factors: Callable[[int], Factors]
    compact: Callable[[int], None] | None = None


class Factorization(ABC):
    """Turns one weight matrix into two factors. Subclasses are frozen dataclasses that check their own fields.

    A new method needs only ``__call__``; set the class variables if it reads statistics, and override :meth:`spectrum`
    if rank policies should see more than the plain singular values.

    Attributes:
        needs_inputs: The method reads input statistics.
        needs_gradients: The method reads output-gradient statistics.
        needs_weight_gradients: The method reads statistics of weight gradients.
        needs_magnitudes: The method reads mean absolute inputs.
        comparable: Squares in :meth:`spectrum` mean the same in every layer, so ranks may be traded between layers.
    """

    needs_inputs: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_weight_gradients: ClassVar[bool] = False
    needs_magnitudes: ClassVar[bool] = False
    comparable: ClassVar[bool] = False

    @property
    def adds_bias(self) -> bool:
        """Whether the factors come with a bias shift."""
        return False

    @property
    def rounds(self) -> int:
        """So many eigenproblems of a weight stand behind its spectrum and its factors: what says how long they take."""
        return 1

    def is_nested(self, out_features: int, in_features: int) -> bool:
        """Whether the factors of a rank are the first ones of those of a higher rank, with nothing beside them."""
        return not self.adds_bias and self.nonzeros(out_features, in_features) == 0

    @property
    def needs_halves(self) -> bool:
        """Whether the method reads the statistics of every other batch alone, to see how noisy they are."""
        return False

    @property
    def wanted(self) -> Wanted:
        """What calibration has to collect for this method."""
        return Wanted(
            inputs=self.needs_inputs,
            gradients=self.needs_gradients,
            weight_gradients=self.needs_weight_gradients,
            halves=self.needs_halves,
            magnitudes=self.needs_magnitudes,
        )

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data is needed at all."""
        return any(self.wanted)

    def nonzeros(self, out_features: int, in_features: int) -> int:
        """Entries of the sparse part that a weight of this shape gets beside its factors, whatever the rank."""
        return 0

    @abstractmethod
    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """Factors of ``weight`` (shape ``(m, n)``) at ``rank``; ``statistics`` is None for methods that need none."""

    def spectrum(self, weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
        """Singular values for rank policies: shape ``(min(m, n),)``, descending; by default those of the weight."""
        return singular_values(weight)

    def decompose(self, items: Sequence[tuple[Tensor, LayerStatistics | None]]) -> list[Decomposition]:
        """Decomposes many weights; methods that can do it faster at once, or for all ranks at once, override this."""
        return [
            Decomposition(
                self.spectrum(weight, statistics),
                lambda rank, weight=weight, statistics=statistics: self(weight, rank, statistics),  # type: ignore[misc]
            )
            for weight, statistics in counted(items, "decompose")
        ]

    def decompose_product(self, product: Product, statistics: LayerStatistics | None) -> Decomposition:
        """Decomposes a weight that is a product of factors; methods that need not multiply it out override this."""
        return self.decompose([(product.dense(), statistics)])[0]


@dataclass(frozen=True)
class MetricFactorization(Factorization):
    """Best approximation in the metric ``trace(G D C D^T)``, ``D = W - B A``; a subclass says what G and C are."""

    @abstractmethod
    def metric(self, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
        """``(G, C)`` of shapes ``(m, m)`` and ``(n, n)``; a vector is a diagonal, None stands for the identity."""

    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """The truncated SVD of ``L^T W R`` with ``L L^T = G``, ``R R^T = C``, mapped back."""
        return self._solve([(weight, statistics)])[0].factors(rank)

    def spectrum(self, weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
        """Singular values of ``L^T W R``: the squares beyond the rank sum to the squared error in the metric."""
        return self._solve([(weight, statistics)])[0].singular_values

    def decompose(self, items: Sequence[tuple[Tensor, LayerStatistics | None]]) -> list[Decomposition]:
        """One eigenproblem for each weight, those of one size batched."""
        if self._goes_its_own_way():
            return super().decompose(items)
        return self._solve(items, tell)

    def decompose_product(self, product: Product, statistics: LayerStatistics | None) -> Decomposition:
        """Solves a problem of the size of the inner side of the factors."""
        if self._goes_its_own_way():
            return super().decompose_product(product, statistics)
        known = self.checked(product, statistics)
        svd = decompose_product(product, *self.metric(known))
        compact = partial(svd.compact_, dtype=working_dtype(product.dtype))
        return Decomposition(svd.singular_values, self.at_rank(svd, product, known), compact)

    def _goes_its_own_way(self) -> bool:
        """Whether a subclass decomposes otherwise than by its metric alone."""
        own = type(self)
        return own.__call__ is not MetricFactorization.__call__ or own.spectrum is not MetricFactorization.spectrum

    def at_rank(
        self, svd: WeightedSVD | ProductSVD, weight: Tensor | Product, statistics: LayerStatistics
    ) -> Callable[[int], Factors]:
        """Rank -> factors; it should hold on to no more of the statistics than it needs."""
        return lambda rank: Factors(*svd.low_rank(rank))

    def _solve(
        self,
        items: Sequence[tuple[Tensor, LayerStatistics | None]],
        tell: Callable[[str, int, int], None] = lambda *_: None,
    ) -> list[Decomposition]:
        checked = [(weight, self.checked(weight, statistics)) for weight, statistics in items]
        found: list[Decomposition] = []
        tell("decompose", 0, len(checked))
        for part in _bounded(checked):
            solved = decompose_many([(weight, *self.metric(statistics)) for weight, statistics in part])
            found += [
                Decomposition(
                    svd.singular_values,
                    self.at_rank(svd, weight, statistics),
                    partial(svd.compact_, dtype=working_dtype(weight.dtype)),
                )
                for svd, (weight, statistics) in zip(solved, part, strict=True)
            ]
            tell("decompose", len(found), len(checked))
        return found

    def checked(self, weight: Tensor | Product, statistics: LayerStatistics | None) -> LayerStatistics:
        """The statistics, which must be there if they are needed, and belong to a weight of this shape."""
        if not self.needs_statistics:
            return LayerStatistics(weight.shape[1], weight.shape[0], device="meta")  # nothing of it is read
        if statistics is None:
            raise StatisticsError(f"{type(self).__name__} needs calibration statistics; pass batches, or use SVD().")
        if (statistics.out_features, statistics.in_features) != tuple(weight.shape):
            raise StatisticsError(f"{statistics!r} does not belong to a weight of shape {tuple(weight.shape)}.")
        return statistics


def _bounded(items: Sequence[tuple[Tensor, LayerStatistics]]) -> Iterator[list[tuple[Tensor, LayerStatistics]]]:
    """Parts whose metrics together are not too large, or single items."""
    part: list[tuple[Tensor, LayerStatistics]] = []
    entries = 0
    for weight, statistics in items:
        size = weight.shape[0] ** 2 + weight.shape[1] ** 2
        if part and entries + size > BATCH_ENTRIES:
            yield part
            part, entries = [], 0
        part.append((weight, statistics))
        entries += size
    if part:
        yield part


def check_shrinkage(name: str, value: object) -> None:
    """Raises :class:`ArgumentError` unless ``0 <= value <= 1`` or ``value`` is ``"auto"``."""
    if value != "auto":
        check_real(name, value, "[0, 1]")
