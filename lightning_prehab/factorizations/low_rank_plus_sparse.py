"""Two factors, and the entries that they cannot express."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_prehab.documents.checks import check_whole
from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations.base import Decomposition, Factorization, MetricFactorization
from lightning_prehab.factorizations.kronecker import KroneckerSVD
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.matrices import break_even_rank, widened
from lightning_prehab.linalg.sparse import Sparse, largest_entries
from lightning_prehab.progress import counted, quiet
from lightning_prehab.statistics.sums import LayerStatistics, Wanted

#: Rounds that fit values and factors in turn once the places are chosen; on synthetic layers in correlated metrics they
#: took 5 to 15 % off the squared error together.
REFITS = 3
#: Entries are chosen with at most so many times the largest weight as value. With fewer tokens than features the
#: factors are free where no token goes, and factors and entries of opposite sign could otherwise grow without bound.
VALUE_LIMIT = 2.0


@dataclass(frozen=True)
class LowRankPlusSparse(Factorization):
    """``W ~ B A + S``: a truncation by another factorization, and ``S`` for the entries that it misses most.

    ``S`` holds ``floor(density m n)`` entries. Truncation of ``W - S`` in the metric of the base and selection of the
    entries with the largest ``(W - B A)_ij^2 G_ii C_jj`` alternate (GoDec, Zhou and Tao, ICML 2011, for the Frobenius
    norm; low rank plus sparse layers: https://arxiv.org/abs/2111.01697). Then the places are fixed, and values and
    factors are fitted in turn. In a metric that is not diagonal the residual is not the best value of an entry, and can
    be far off; the values go along the preconditioned gradient as far as lowers the error most, which in a diagonal
    metric is the residual. The error is never above that of the base at the same rank.

    The values are parameters and are counted as such in plans and budgets; the rank that a budget leaves is smaller.
    The places of the entries cost storage beside them (4 bytes each). It does not run faster: see
    :class:`~lightning_prehab.LowRankPlusSparseLinear`. All of it is deterministic.

    Rank policies see the spectrum of ``W - S`` with the ``S`` of half the break-even rank: an ``S`` for each rank would
    take the whole alternation each time. Predicted errors are therefore estimates, also for a base whose own are exact.
    Planning takes ``steps + 1`` decompositions by the base instead of one, the factors of a layer ``steps + 5`` more;
    the statistics of a layer are held until its factors have been made.

    Measure before using it: at the same number of parameters, on a small MLP for digits that was not trained after the
    cut, it made :class:`~lightning_prehab.SVD` better and :class:`~lightning_prehab.KroneckerSVD` worse, the more so
    the less was kept; rank was worth more there than entries.

    Args:
        density: Share of the entries that ``S`` holds, in ``(0, 1)``. A layer so small that this is less than one entry
            gets the factors of the base alone.
        base: How the low-rank part is computed. One without a metric is used with plain squares of the residual.
        steps: Alternations, at least 1.

    Raises:
        ArgumentError: If a value is out of range.

    >>> from lightning_prehab import SVD
    >>> weight = torch.ones(4, 6).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(3.0))
    >>> factors = LowRankPlusSparse(density=0.05, base=SVD())(weight, rank=1)
    >>> factors.sparse.indices.tolist(), factors.sparse.values.round(decimals=2).tolist()
    ([15], [2.0])
    """

    density: float = 0.05
    base: Factorization = field(default_factory=KroneckerSVD)
    steps: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0.0 < self.density < 1.0:
            raise ArgumentError(
                f"density must lie in (0, 1), got {self.density!r}; without a sparse part use the base alone."
            )
        if not isinstance(self.base, Factorization) or isinstance(self.base, LowRankPlusSparse):
            raise ArgumentError(f"base must be a factorization into two factors, such as SVD(), got {self.base!r}.")
        check_whole("steps", self.steps, 1)

    @property
    def comparable(self) -> bool:  # type: ignore[override]  # a class variable of methods that stand alone
        """As the base."""
        return self.base.comparable

    @property
    def adds_bias(self) -> bool:
        """As the base."""
        return self.base.adds_bias

    @property
    def rounds(self) -> int:
        """For planning, and for the factors."""
        return 2 * self.steps + 6

    @property
    def wanted(self) -> Wanted:
        """As the base."""
        return self.base.wanted

    def nonzeros(self, out_features: int, in_features: int) -> int:
        """``floor(density m n)``; a product that misses an integer by rounding alone counts as that integer."""
        return math.floor(self.density * out_features * in_features + 1e-9)

    def __call__(self, weight: Tensor, rank: int, statistics: LayerStatistics | None = None) -> Factors:
        """Factors and sparse part of ``weight`` at ``rank``."""
        return self.decompose([(weight, statistics)])[0].factors(rank)

    def spectrum(self, weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
        """The spectrum of the base for ``W - S`` at half the break-even rank."""
        return self.decompose([(weight, statistics)])[0].singular_values

    def decompose(self, items: Sequence[tuple[Tensor, LayerStatistics | None]]) -> list[Decomposition]:
        """The alternation at half the break-even rank for all weights together; the one at a rank starts from there."""
        items = [(weight.detach(), statistics) for weight, statistics in items]
        found = self.base.decompose(items)
        scales = [_Metric(self.base, weight, statistics).scales for weight, statistics in items]
        for _ in counted(range(self.steps), "alternate"):
            sparse = [
                self._largest(weight, decomposition.factors(_start_rank(*weight.shape)), scale)
                for (weight, _), decomposition, scale in zip(items, found, scales, strict=True)
            ]
            found = self._without(items, sparse)
        return [
            Decomposition(decomposition.singular_values, partial(self._at_rank, weight, statistics, part))
            for (weight, statistics), decomposition, part in zip(items, found, sparse, strict=True)
        ]

    def _at_rank(self, weight: Tensor, statistics: LayerStatistics | None, sparse: Sparse, rank: int) -> Factors:
        with quiet():
            alone = self.base.decompose([(weight, statistics)])[0].factors(rank)
        if len(sparse.indices) == 0:
            return alone
        metric = _Metric(self.base, weight, statistics)

        def refit() -> Factors:
            with quiet():
                return self._without([(weight, statistics)], [sparse])[0].factors(rank)

        for _ in range(self.steps):
            sparse = self._largest(weight, refit(), metric.scales)
        factors = refit()
        rounding = torch.finfo(sparse.values.dtype).eps * metric.cost(widened(weight))
        if metric.cost(_error(weight, factors, sparse)) > metric.cost(_error(weight, alone)) + rounding:
            factors, sparse = alone, sparse._replace(values=torch.zeros_like(sparse.values))
        for _ in range(REFITS):
            sparse = metric.improved(sparse, _error(weight, factors, sparse))
            factors = refit()
        return factors._replace(sparse=sparse)

    def _largest(self, weight: Tensor, factors: Factors, scales: tuple[Tensor, Tensor]) -> Sparse:
        """The entries that the factors miss most."""
        error = _error(weight, factors)
        rows, columns = scales
        limit = VALUE_LIMIT * float(weight.abs().max())
        score = error.square() * rows[:, None] * columns
        return largest_entries(error.clamp(-limit, limit), score, self.nonzeros(*weight.shape))

    def _without(
        self, items: Sequence[tuple[Tensor, LayerStatistics | None]], sparse: Sequence[Sparse]
    ) -> list[Decomposition]:
        """What the base makes of the weights without their sparse parts."""
        rest = [
            (widened(weight) - part.matrix(*weight.shape), statistics)
            for (weight, statistics), part in zip(items, sparse, strict=True)
        ]
        return self.base.decompose(rest)


class _Metric:
    """``trace(G E C E^T)`` of the base, up to a factor, for weights like a given one; else the sum of squares."""

    def __init__(self, base: Factorization, weight: Tensor, statistics: LayerStatistics | None) -> None:
        grams: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(base, MetricFactorization):
            grams = base.metric(base.checked(weight, statistics))
        like = widened(weight)
        self._left, self._right = (_scaled(gram, size, like) for gram, size in zip(grams, weight.shape, strict=True))

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """The diagonals of ``G`` and ``C``."""
        return _diagonal(self._left), _diagonal(self._right)

    def cost(self, error: Tensor) -> float:
        return float((self._gradient(error) * error).sum())

    def improved(self, sparse: Sparse, error: Tensor) -> Sparse:
        """The values moved along the preconditioned gradient to where the error is least, but not beyond step 1.

        Longer steps would follow rounding where the metric is nearly singular; in a diagonal one 1 is the best.
        """
        rows, columns = self.scales
        gradient = self._gradient(error).flatten()[sparse.indices]
        scale = (rows[:, None] * columns).flatten()[sparse.indices]
        change = torch.where(scale > 0, gradient / scale, torch.zeros_like(scale))
        curvature = self.cost(Sparse(sparse.indices, change).matrix(*error.shape))
        slope = float((gradient * change).sum())
        return sparse._replace(values=sparse.values + change * (slope / curvature if slope < curvature else 1.0))

    def _gradient(self, error: Tensor) -> Tensor:
        """``G E C``."""
        product = self._left[:, None] * error if self._left.dim() == 1 else self._left @ error
        return product * self._right if self._right.dim() == 1 else product @ self._right


def _scaled(gram: Tensor | None, size: int, like: Tensor) -> Tensor:
    """A side of the metric with 1 as its largest diagonal entry, against underflow; a vector is a diagonal."""
    if gram is None:
        return like.new_ones(size)
    return (gram / _diagonal(gram).max().clamp_min(torch.finfo(gram.dtype).tiny)).to(like)


def _diagonal(gram: Tensor) -> Tensor:
    return gram if gram.dim() == 1 else gram.diagonal()


def _error(weight: Tensor, factors: Factors, sparse: Sparse | None = None) -> Tensor:
    wide = widened(weight)
    error = wide - factors.B.to(wide) @ factors.A.to(wide)
    return error if sparse is None else error - sparse.matrix(*weight.shape)


def _start_rank(out_features: int, in_features: int) -> int:
    return max(break_even_rank(out_features, in_features) // 2, 1)
