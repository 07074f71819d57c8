"""The same share of energy in every layer."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_prehab.errors import ArgumentError
from lightning_prehab.rank_policies.base import LayerChoices, RankPolicy, check_min_rank


@dataclass(frozen=True)
class EnergyThreshold(RankPolicy):
    """The smallest rank with ``sum over i <= r of s_i^2 >= energy * sum over all i`` in each layer by itself.

    Admissible ranks are rounded up to; a layer that needs more than the largest of them stays dense. There is no
    budget: how many parameters are left is known afterwards.

    Args:
        energy: Share of the squared singular values that every layer retains, in ``(0, 1]``.
        min_rank: Smallest rank of any layer, at least 1.

    Raises:
        ArgumentError: If a value is out of range.

    >>> layer = LayerChoices("fc", 8, 8, torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), (1, 2, 3))
    >>> EnergyThreshold(0.9)([layer]), EnergyThreshold(0.95)([layer])
    ({'fc': 1}, {'fc': 2})
    """

    energy: float
    min_rank: int = 1

    def __post_init__(self) -> None:
        energy = self.energy
        if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0.0 < energy <= 1.0:
            raise ArgumentError(
                f"energy is the share of the squared singular values that is retained and must lie in (0, 1], "
                f"got {energy!r}."
            )
        check_min_rank(self.min_rank)

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """The rank of each layer; an overridden rank is taken as it is."""
        return {layer.name: self._rank(layer) for layer in layers}

    def _rank(self, layer: LayerChoices) -> int | None:
        retained = layer.retained()
        needed = int(torch.searchsorted(retained, self.energy * retained[-1]))  # the first that is not below
        ranks = [rank for rank in layer.options(self.min_rank) if rank is not None]
        index = bisect.bisect_left(ranks, needed)
        if index < len(ranks):
            return ranks[index]
        return None if layer.dense else ranks[-1]
