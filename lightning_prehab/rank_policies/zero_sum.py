"""Components dropped so that the predicted changes of the loss cancel."""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_prehab.errors import StatisticsError
from lightning_prehab.rank_policies.base import BudgetPolicy, LayerChoices


@dataclass(frozen=True)
class ZeroSum(BudgetPolicy):
    """Global: drops components one by one so that the sum of their predicted effects on the loss stays near zero.

    ``delta_i = -s_i u_i^T H v_i``, with ``H`` the gradient of the loss in the coordinates of the decomposition, is what
    dropping component ``i`` does to the loss in first order. Each layer offers its smallest remaining component. While
    the running sum is not above zero, the offer with the smallest non-negative delta is taken, else the negative one
    nearest to zero (of the other sign if there is none), until the budget is met. A layer with more components than its
    largest admissible rank stays dense and saves nothing; between admissible ranks it is stored at the next larger one.
    Components that an overridden rank drops are part of the sum from the start.

    Near a minimum of the loss first-order effects are small against second-order ones, and mostly noise.

    Source: ZS-SVD, Abbasi et al., 2026, https://arxiv.org/abs/2602.02848.

    Args:
        keep: Share of the parameters that is kept in total, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.
        scope: Whether ``keep`` is a share of the ``"targets"`` or of the whole ``"model"``.

    Raises:
        ArgumentError: If a value is out of range.
    """

    needs_weight_gradients: ClassVar[bool] = True

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """Ranks within the budget.

        Raises:
            PlanError: If the smallest ranks exceed it.
            StatisticsError: If a layer comes without predicted changes.
        """
        self.check(layers)
        budget = self.budget(layers)
        matrices = [_Matrix(layer, self.min_rank) for layer in layers]
        spent = sum(matrix.parameters() for matrix in matrices)
        total = sum(sum(matrix.deltas[matrix.left :]) for matrix in matrices)
        rising: list[tuple[float, int]] = []
        falling: list[tuple[float, int]] = []

        def offer(index: int) -> None:
            matrix = matrices[index]
            if matrix.left > matrix.floor:
                delta = matrix.deltas[matrix.left - 1]
                heapq.heappush(rising if delta >= 0.0 else falling, (abs(delta), index))

        for index in range(len(matrices)):
            offer(index)
        while spent > budget:
            heap = (rising or falling) if total <= 0.0 else (falling or rising)
            _, index = heapq.heappop(heap)
            matrix = matrices[index]
            spent -= matrix.parameters()
            matrix.left -= 1
            spent += matrix.parameters()
            total += matrix.deltas[matrix.left]
            offer(index)
        return {matrix.layer.name: matrix.rank() for matrix in matrices}


class _Matrix:
    """One layer while it loses components: how many are left, and what it is stored as."""

    def __init__(self, layer: LayerChoices, min_rank: int) -> None:
        if layer.components is None:
            raise StatisticsError(
                f"{layer}: ZeroSum needs the predicted change of the loss for each component, from weight gradients; "
                "calibrate with them (pass batches), or use ParameterBudget."
            )
        self.layer = layer
        self.deltas: list[float] = layer.components.tolist()
        self.ranks = [rank for rank in layer.options(min_rank) if rank is not None]
        self.left = len(self.deltas) if layer.dense else self.ranks[-1]
        self.floor = self.ranks[0] if self.ranks else self.left

    def rank(self) -> int | None:
        """The smallest admissible rank that holds the remaining components; None is dense."""
        index = bisect.bisect_left(self.ranks, self.left)
        return self.ranks[index] if index < len(self.ranks) else None

    def parameters(self) -> int:
        return self.layer.parameters(self.rank())
