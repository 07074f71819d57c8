"""What an option costs, as an integer: parameters, multiply-adds or shares of the dense time."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from lightning_prehab.errors import PlanError
from lightning_prehab.rank_policies.base import LayerChoices

#: What a budget is counted in.
Cost = Literal["parameters", "flops", "latency"]
UNITS: dict[Cost, str] = {
    "parameters": "parameters",
    "flops": "multiply-adds per sample",
    "latency": "hundred-thousandths of the dense time",
}


def option_costs(
    layers: Sequence[LayerChoices], options: Sequence[Sequence[int | None]], cost: Cost
) -> list[list[int]]:
    """Costs of the options (ranks, None for dense) of each layer, rounded up to integers.

    Time is counted in hundred-thousandths of what all layers take together when dense: finer than it can be measured,
    and coarse enough for a quick exact search.

    Raises:
        PlanError: If a layer has not been measured, or a measurement is not a sensible number.
    """
    prices: list[Callable[[int | None], float]]
    if cost == "parameters":
        return [[layer.parameters(rank) for rank in ranks] for layer, ranks in zip(layers, options, strict=True)]
    if cost == "flops":
        prices, unit = [partial(_flops, layer) for layer in layers], 1.0
    else:
        curves = [_LatencyCurve(layer) for layer in layers]
        prices, unit = [*curves], sum(curve.dense for curve in curves) / 1e5
    return [[math.ceil(price(rank) / unit) for rank in ranks] for price, ranks in zip(prices, options, strict=True)]


def _flops(layer: LayerChoices, rank: int | None) -> float:
    if not 0.0 <= layer.positions < math.inf:
        raise PlanError(f"{layer}: positions must be a number of tokens per sample, got {layer.positions}.")
    return layer.parameters(rank) * layer.positions


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence, in least squares, that never falls: neighbours that fall are replaced by their mean.

    The pool-adjacent-violators algorithm (Ayer et al., 1955, https://doi.org/10.1214/aoms/1177728423).

    >>> isotonic([1.0, 4.0, 2.0, 6.0])
    [1.0, 3.0, 3.0, 6.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count > total * pools[-1][1]:
            before, size = pools.pop()
            total, count = total + before, count + size
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


class _LatencyCurve:
    """Seconds at any rank: monotone, linear between the measured ranks, constant outside of them."""

    def __init__(self, layer: LayerChoices) -> None:
        measured = _checked(layer)
        self.dense = measured[None]
        self.ranks = sorted(rank for rank in measured if rank is not None)
        self.seconds = isotonic([measured[rank] for rank in self.ranks])

    def __call__(self, rank: int | None) -> float:
        if rank is None:
            return self.dense
        right = bisect.bisect_left(self.ranks, rank)
        if right == len(self.ranks) or right == 0:
            return self.seconds[min(right, len(self.ranks) - 1)]
        low, high = self.ranks[right - 1], self.ranks[right]
        share = (rank - low) / (high - low)
        return self.seconds[right - 1] + share * (self.seconds[right] - self.seconds[right - 1])


def _checked(layer: LayerChoices) -> Mapping[int | None, float]:
    measured = layer.latencies
    if measured is None or None not in measured or len(measured) < 2:
        raise PlanError(
            f"{layer} has no measured latencies, dense and at one rank at least; measure_latencies gives them."
        )
    for rank, seconds in measured.items():
        if not 0.0 < seconds < math.inf:
            raise PlanError(f"{layer}: a latency must be a positive number of seconds, got {seconds} at rank {rank}.")
    return measured
