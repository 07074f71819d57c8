"""The same share of parameters in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prehab.linalg.storage import rank_within
from lightning_prehab.rank_policies.base import BudgetPolicy, LayerChoices, require_within


@dataclass(frozen=True)
class RankRatio(BudgetPolicy):
    """Uniform: the largest admissible rank within ``keep`` of the parameters of each layer by itself.

    That is ``r = floor(keep m n / (m + n))`` for two factors, and in the pivot layout ``r = floor((m + n -
    sqrt((m + n)^2 - 4 keep m n)) / 2)``.

    The safe choice for factorizations whose spectra mean different things in different layers (SVD, WhitenedSVD), where
    trading ranks between layers may gain or lose: measure it. On ``benchmarks/digits_vit.py`` it loses clearly.

    Args:
        keep: Share of the parameters of each layer that is kept, in ``(0, 1]``; 1 leaves every layer dense.
        min_rank: Smallest rank of any layer, at least 1.
        scope: Whether ``keep`` is a share of the ``"targets"`` or of the whole ``"model"``.

    Raises:
        ArgumentError: If a value is out of range.
    """

    def __call__(self, layers: Sequence[LayerChoices]) -> dict[str, int | None]:
        """The largest admissible rank within the ratio for each layer, and at least the smallest admissible one."""
        self.budget(layers)  # refuses a share of the model that has not been turned into one of the targets
        return {layer.name: self._rank(layer) for layer in layers}

    def check(self, layers: Sequence[LayerChoices]) -> None:
        """Checks that the ranks fit into the budget; each depends on the size of its layer alone.

        Raises:
            PlanError: If smallest or overridden ranks do not fit; nothing is taken from other layers for them.
        """
        spent = sum(layer.parameters(self._rank(layer)) for layer in layers)
        require_within(spent, self.budget(layers), f"keep={self.keep} in every layer", "parameters", len(layers))

    def _rank(self, layer: LayerChoices) -> int | None:
        ranks = [rank for rank in layer.options(self.min_rank) if rank is not None]
        if not ranks or (self.keep == 1.0 and layer.dense):
            return None
        m, n = layer.out_features, layer.in_features
        wanted = rank_within(self.keep * m * n - layer.new_bias, m, n, layer.layout, layer.groups)
        return max((rank for rank in ranks if rank <= wanted), default=ranks[0])
