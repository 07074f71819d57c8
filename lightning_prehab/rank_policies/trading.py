"""Ranks traded between layers: one budget, spent exactly where it is worth most."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prehab.rank_policies.allocation import best_allocation
from lightning_prehab.rank_policies.base import LayerChoices

#: For one layer: the options (ranks, None for dense), their integer costs and their values, never negative.
Offer = tuple[Sequence[int | None], Tensor, Tensor]


def best_ranks(layers: Sequence[LayerChoices], offers: Sequence[Offer], budget: int) -> dict[str, int | None]:
    """The ranks of largest total value whose total cost is within the budget, by name of the layer.

    Costs may come in any order and with ties; an option that another one beats for the same price or less is left out,
    so among equal values the cheapest is chosen.

    Raises:
        PlanError: If the cheapest options together exceed the budget.
    """
    kept = [_undominated(cost, value) for _, cost, value in offers]
    chosen = best_allocation(
        [cost[index] for (_, cost, _), index in zip(offers, kept, strict=True)],
        [value[index] for (_, _, value), index in zip(offers, kept, strict=True)],
        budget,
    )
    return {
        layer.name: options[int(index[choice])]
        for layer, (options, _, _), index, choice in zip(layers, offers, kept, chosen, strict=True)
    }


def retained_at(layer: LayerChoices, options: Sequence[int | None]) -> Tensor:
    """Sum of the squared singular values that each option retains; None retains all. Shape ``(len(options),)``."""
    return layer.retained()[[len(layer.singular_values) if rank is None else rank for rank in options]]


def _undominated(cost: Tensor, value: Tensor) -> Tensor:
    """Indices by ascending cost, along which the value rises strictly."""
    order = value.argsort(descending=True, stable=True)
    order = order[cost[order].argsort(stable=True)]
    ordered = value[order].double()
    best_before = torch.cat([ordered.new_tensor([-torch.inf]), ordered.cummax(0).values[:-1]])
    return order[ordered > best_before]
