"""One budget for all layers, spent where it saves most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from lightning_prehab.documents.checks import check_whole
from lightning_prehab.errors import ArgumentError
from lightning_prehab.rank_policies.base import BudgetPolicy, LayerChoices, check_choice, require_within
from lightning_prehab.rank_policies.costs import UNITS, Cost, option_costs
from lightning_prehab.rank_policies.trading import Offer, best_ranks, retained_at


@dataclass(frozen=True)
class ParameterBudget(BudgetPolicy):
    """Global: the ranks that retain the largest sum of squared singular values within ``keep`` of the cost.

    A layer for which a rank above break-even would be worth its price stays dense. The choice is exact (a knapsack
    problem), not greedy. It is meant for spectra that mean the same in every layer, as those of
    :class:`~lightning_prehab.KroneckerSVD` do; with other metrics it may gain or lose against
    :class:`~lightning_prehab.RankRatio`.

    A budget of FLOPs is due to BALF (González-Martínez, 2025, https://arxiv.org/abs/2509.25136). Whatever the cost, a
    cut layer never holds more parameters than its dense form.

    Args:
        keep: Share of the cost of all dense targets that is kept in total, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.
        scope: Whether ``keep`` is a share of the ``"targets"`` or of the whole ``"model"`` (parameters only).
        cost: What is counted: ``"parameters"``; ``"flops"``, the multiply-adds per sample, which differ where layers
            see different numbers of tokens; or ``"latency"``, the measured time of each layer on its device, which
            leaves a layer dense if no rank is faster.
        latency_tokens: Tokens per call at which latencies are measured, at least 1.

    Raises:
        ArgumentError: If a value is out of range.

    >>> flat = LayerChoices("flat", 20, 20, torch.ones(20), tuple(range(1, 10)))
    >>> steep = LayerChoices("steep", 20, 20, torch.logspace(1, -3, 20), tuple(range(1, 10)))
    >>> ParameterBudget(keep=0.6)([flat, steep])
    {'flat': 7, 'steep': 5}
    """

    cost: Cost = "parameters"
    latency_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("cost", self.cost, get_args(Cost))
        check_whole("latency_tokens", self.latency_tokens, 1)
        if self.scope == "model" and self.cost != "parameters":
            raise ArgumentError(
                f"scope='model' counts parameters; what the rest of the model costs in {self.cost} is unknown. Use "
                "scope='targets' or cost='parameters'."
            )

    @property
    def needs_positions(self) -> bool:
        """Whether FLOPs are counted."""
        return self.cost == "flops"

    @property
    def needs_latencies(self) -> bool:
        """Whether time is counted."""
        return self.cost == "latency"

    def parameter_limit(self, layers: Sequence[LayerChoices]) -> int | None:
        """The budget, or None if something else than parameters is counted."""
        return self.budget(layers) if self.cost == "parameters" else None

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """Ranks within the budget.

        Raises:
            PlanError: If the smallest ranks exceed it, or a latency is missing.
        """
        options = [layer.options(self.min_rank) for layer in layers]
        costs = option_costs(layers, options, self.cost)
        dense = option_costs(layers, [[None]] * len(layers), self.cost)
        offers = [self._offer(*one) for one in zip(layers, options, costs, [cost for (cost,) in dense], strict=True)]
        if self.cost == "parameters":
            budget = self.budget(layers)
        else:
            budget = math.floor(self.keep * sum(cost for (cost,) in dense) + 1e-6)
        least = sum(int(cost.min()) for _, cost, _ in offers)
        require_within(least, budget, f"keep={self.keep}", UNITS[self.cost], len(layers))
        return best_ranks(layers, offers, budget)

    def _offer(self, layer: LayerChoices, options: Sequence[int | None], costs: Sequence[int], dense: int) -> Offer:
        if self.cost == "latency" and layer.dense:  # a rank that saves no time is no choice, whatever it retains
            faster = [index for index, cost in enumerate(costs) if cost < dense]
            options, costs = [*(options[i] for i in faster), None], [*(costs[i] for i in faster), dense]
        return options, torch.tensor(costs, dtype=torch.float64, device="cpu"), retained_at(layer, options)
