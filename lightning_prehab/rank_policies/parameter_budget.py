"""One budget for all layers, spent where it saves most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_prehab.allocation import best_allocation
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.rank_policies.base import LayerChoices, RankPolicy, check_keep, parameter_budget


@dataclass(frozen=True)
class ParameterBudget(RankPolicy):
    """Global: the ranks that retain the largest sum of squared singular values within ``keep`` of the parameters.

    A layer for which a rank above break-even would be worth its price stays dense. The choice is exact (a knapsack
    problem), not greedy. It is meant for spectra that mean the same in every layer, as those of
    :class:`~lightning_prehab.KroneckerSVD` do; with other metrics it may gain or lose against
    :class:`~lightning_prehab.RankRatio`.

    Args:
        keep: Share of the targeted parameters that is kept in total, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.

    Raises:
        ArgumentError: If a value is out of range.
    """

    keep: float
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.min_rank < 1:
            raise ArgumentError(f"min_rank must be at least 1, got {self.min_rank}.")

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """Ranks within the budget.

        Raises:
            PlanError: If the smallest ranks exceed it.
        """
        options = [layer.options(self.min_rank) for layer in layers]
        costs = [
            torch.tensor([layer.parameters(rank) for rank in ranks])
            for layer, ranks in zip(layers, options, strict=True)
        ]
        values = [
            layer.retained()[[len(layer.singular_values) if rank is None else rank for rank in ranks]]
            for layer, ranks in zip(layers, options, strict=True)
        ]
        budget = parameter_budget(layers, self.keep)
        least = sum(int(cost.min()) for cost in costs)
        if least > budget:
            raise PlanError(
                f"keep={self.keep} allows {budget:,} parameters for the {len(layers)} targets, their smallest ranks "
                f"hold {least:,}. Raise keep, lower min_rank, rank_multiple_of or the overridden ranks, or exclude "
                "small layers."
            )
        chosen = best_allocation(costs, values, budget)
        return {layer.name: ranks[index] for layer, ranks, index in zip(layers, options, chosen, strict=True)}
