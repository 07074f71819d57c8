"""The same share of parameters in every layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prehab.rank_policies.base import LayerChoices, RankPolicy, check_keep


@dataclass(frozen=True)
class RankRatio(RankPolicy):
    """Uniform: ``r = floor(keep m n / (m + n))`` in every layer, rounded down to an admissible rank.

    The safe choice for factorizations whose spectra mean different things in different layers (SVD, WhitenedSVD), where
    trading ranks between layers may gain or lose: measure it. On ``benchmarks/digits_vit.py`` it loses clearly.

    Args:
        keep: Share of the parameters of each layer that is kept, in ``(0, 1]``; 1 leaves every layer dense.

    Raises:
        ArgumentError: If ``keep`` is outside ``(0, 1]``.
    """

    keep: float

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """The largest admissible rank within the ratio for each layer, and at least the smallest admissible one."""
        return {layer.name: self._rank(layer) for layer in layers}

    def _rank(self, layer: LayerChoices) -> int | None:
        if not layer.ranks or (self.keep == 1.0 and layer.dense):
            return None
        m, n = layer.out_features, layer.in_features
        wanted = math.floor((self.keep * m * n - layer.new_bias) / (m + n) + 1e-9)
        return max((rank for rank in layer.ranks if rank <= wanted), default=layer.ranks[0])
