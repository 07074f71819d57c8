"""The best way to spend a budget: one option for each item, largest total value, total cost within the budget.

This is the multiple-choice knapsack problem, for costs and values of any shape. A Lagrange multiplier gives an upper
bound; only options whose Lagrangian loss is within the gap between bound and optimum can be part of the optimum. Few
are left for an exact search (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995,
https://doi.org/10.1016/0377-2217(95)00015-I), the fewer the nearer value over cost is to a concave curve in each item.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prehab.errors import PlanError

#: Partial solutions kept at a time. Only near-ties by the thousand reach it; the answer is then the best of those kept.
MAX_STATES = 20_000
#: And at most so many are extended at a time: fewer where an item has many options left, as flat spectra have.
MOST = 2**15
#: The gap is widened in so many steps, each by this factor. The best choice within a gap is the best of all, and nearly
#: always there is one in a small gap, where few options are left.
LEVELS, WIDER = 8, 8.0
#: So few options are looked at in the whole gap at once.
AT_ONCE = 1000


def best_allocation(costs: Sequence[Tensor], values: Sequence[Tensor], budget: int) -> list[int]:
    """Chooses one option for each item.

    Args:
        costs: For each item the integer cost of its options, shape ``(options,)``, ascending.
        values: For each item the value of its options, same shapes, not negative.
        budget: Largest total cost allowed.

    Returns:
        The index of the chosen option for each item. Nothing that raises the total value still fits into the budget.

    Raises:
        PlanError: If even the cheapest options together cost more than the budget.

    >>> costs = [torch.tensor([1, 2]), torch.tensor([1, 3])]
    >>> values = [torch.tensor([5.0, 6.0]), torch.tensor([1.0, 4.0])]
    >>> best_allocation(costs, values, budget=4)
    [0, 1]
    """
    cheapest = sum(int(cost.min()) for cost in costs)
    if cheapest > budget:
        raise PlanError(f"The smallest possible choice costs {cheapest:,}, the budget is {budget:,}.")
    budget = _reachable(costs, budget)
    cost = torch.nn.utils.rnn.pad_sequence([c.double().cpu() for c in costs], batch_first=True)
    value = torch.nn.utils.rnn.pad_sequence(
        [v.double().cpu() for v in values], batch_first=True, padding_value=-torch.inf
    )
    price, choice = _lagrangian_choice(cost, value, budget)
    if price == 0.0:
        return choice.tolist()
    best = _fill(cost, value, budget, choice)
    reduced = value - price * cost
    slack = reduced.amax(1, keepdim=True) - reduced  # what choosing an option takes off the upper bound
    bound = float(price * budget + reduced.amax(1).sum())

    def missing(choice: Tensor) -> float:
        rounding = 1e-12 * (bound + price * budget)
        return max(bound - float(_pick(value, choice).sum()), 0.0) + rounding

    for level in reversed(range(LEVELS if value.numel() > AT_ONCE else 1)):
        gap = missing(best) / WIDER**level
        found, complete = _search(cost, value, slack, price=price, gap=gap, budget=budget)
        if found is not None and missing(found) < missing(best):
            best = found
        if missing(best) <= gap or (found is not None and not complete):
            break
    return best.tolist()


def _reachable(costs: Sequence[Tensor], budget: int) -> int:
    """What can be spent at most: all choices cost the cheapest one and multiples of a step, which is often above 1.

    >>> _reachable([torch.tensor([2, 8, 14]), torch.tensor([1, 10])], budget=16)
    15
    """
    least = [int(cost.min()) for cost in costs]
    steps = {int(one) - low for cost, low in zip(costs, least, strict=True) for one in cost.tolist()}
    step = math.gcd(*steps)
    return budget if step == 0 else sum(least) + (budget - sum(least)) // step * step


def _pick(table: Tensor, choice: Tensor) -> Tensor:
    return table.gather(1, choice[:, None])[:, 0]


def _lagrangian_choice(cost: Tensor, value: Tensor, budget: int) -> tuple[float, Tensor]:
    """Smallest price of cost at which all items can take their own best option within the budget, and these options."""

    def respond(price: float) -> Tensor:
        return (value - price * cost).argmax(1)  # the first of equals, which is the cheapest

    choice = respond(0.0)
    if float(_pick(cost, choice).sum()) <= budget:
        return 0.0, choice
    low, high = 0.0, float(value.max()) + 1.0
    choice = cost.masked_fill(value == -torch.inf, torch.inf).argmin(1)
    for _ in range(200):
        price = (low + high) / 2
        if price in (low, high):
            break
        response = respond(price)
        if float(_pick(cost, response).sum()) <= budget:
            high, choice = price, response
        else:
            low = price
    return high, choice


def _fill(cost: Tensor, value: Tensor, budget: int, choice: Tensor) -> Tensor:
    """Spends what is left, the best gain per cost first."""
    choice = choice.clone()
    while True:
        extra, gain = cost - _pick(cost, choice)[:, None], value - _pick(value, choice)[:, None]
        left = budget - float(_pick(cost, choice).sum())
        density = torch.where((gain > 0) & (extra <= left), gain / extra.clamp_min(1e-9), -torch.inf)
        best = int(density.argmax())
        if float(density.view(-1)[best]) == -torch.inf:
            return choice
        choice[best // cost.shape[1]] = best % cost.shape[1]


def _search(
    cost: Tensor, value: Tensor, slack: Tensor, *, price: float, gap: float, budget: int
) -> tuple[Tensor | None, bool]:
    """The best choice that misses the upper bound by no more than a gap, if there is one, and whether that is sure.

    Among the options whose slack is within the gap; what is left of the budget in the end misses its price. Of partial
    choices those are dropped that another one beats in value for the same cost or less.
    """
    slack = slack.masked_fill(value == -torch.inf, torch.inf)
    candidates = [torch.nonzero(row <= gap)[:, 0] for row in slack]
    cheapest_rest, dearest_rest = [0.0], [0.0]
    for row, options in zip(cost.flip(0), reversed(candidates), strict=True):
        cheapest_rest.append(cheapest_rest[-1] + float(row[options].min()))
        dearest_rest.append(dearest_rest[-1] + float(row[options].max()))
    cheapest_rest.reverse()
    dearest_rest.reverse()

    complete = True
    total_cost, total_value, total_slack = (torch.zeros(1, dtype=torch.float64, device="cpu") for _ in range(3))
    trail: list[tuple[Tensor, Tensor]] = []
    for item, options in enumerate(candidates):
        most = max(MOST // len(options), 1)
        if len(total_cost) > most:
            few = total_slack.argsort(stable=True)[:most].sort().values
            trail[-1] = trail[-1][0][few], trail[-1][1][few]
            total_cost, total_value, total_slack, complete = total_cost[few], total_value[few], total_slack[few], False
        parent = torch.arange(len(total_cost), device="cpu").repeat_interleave(len(options))
        option = options.repeat(len(total_cost))
        next_cost = total_cost[parent] + cost[item, option]
        next_value = total_value[parent] + value[item, option]
        next_slack = total_slack[parent] + slack[item, option]
        unspent = (budget - dearest_rest[item + 1] - next_cost).clamp_min(0.0)
        keep = (next_cost + cheapest_rest[item + 1] <= budget) & (next_slack + price * unspent <= gap)
        keep = torch.nonzero(keep)[:, 0]
        keep = keep[next_value[keep].argsort(descending=True, stable=True)]
        keep = keep[next_cost[keep].argsort(stable=True)]  # by cost, the largest value of equals first
        ordered = next_value[keep]
        best_before = (
            torch.cat([ordered.new_tensor([-torch.inf]), ordered.cummax(0).values[:-1]]) if len(keep) else ordered
        )
        keep = keep[ordered > best_before]
        if len(keep) > MAX_STATES:
            keep = keep[next_slack[keep].argsort(stable=True)[:MAX_STATES]].sort().values
            complete = False
        if len(keep) == 0:
            return None, complete
        total_cost, total_value, total_slack = next_cost[keep], next_value[keep], next_slack[keep]
        trail.append((parent[keep], option[keep]))

    state = int(total_value.argmax())
    chosen: list[int] = []
    for parents, options in reversed(trail):
        chosen.append(int(options[state]))
        state = int(parents[state])
    return torch.tensor(chosen[::-1], device="cpu"), complete
