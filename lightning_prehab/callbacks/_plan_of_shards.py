"""A provisional plan for layers that lie in shards: each is decomposed where it is whole for a moment."""

from collections.abc import Mapping
from dataclasses import replace

import lightning.pytorch as pl

from lightning_prehab.callbacks._distributed import decide_on_rank_zero, merge
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._sharded_layers import ShardedLayer, on_owners, share_out_
from lightning_prehab.kinds import view_of
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.regularizers.metric import IDENTITY
from lightning_prehab.road import survey
from lightning_prehab.sites.process import KnownSite
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.targets.find import Targets

#: A spectrum as it is sent.
Plain = tuple[list[float], list[float] | None, float]


class _KnownShards(KnownSite):
    """Targets in shards, with the statistics of all processes."""

    def __init__(
        self, trainer: "pl.Trainer", targets: Targets, statistics: Mapping[str, LayerStatistics] | None
    ) -> None:
        super().__init__(targets, statistics)
        self._trainer = trainer

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """Each on its owner; nothing of it stays but the spectra."""
        layers = [ShardedLayer(name, view_of(target), None, IDENTITY) for name, target in solver.targets.items()]
        share_out_(layers)

        def solve(wholes: list[RegularizedLayer], _: object) -> dict[str, Plain]:
            found = replace(solver, targets={one.name: one.view for one in wholes})([one.name for one in wholes])
            return {name: solution.spectrum.to_lists() for name, solution in found.items()}

        own: dict[str, Plain] = {}
        for _, found in on_owners(self._trainer, layers, solve):
            own |= found or {}
        plain = merge(self._trainer, own)
        return {name: Spectrum.of_lists(*plain[name]) for name in solver.targets}


def plan_of_shards(
    trainer: "pl.Trainer", recipe: Recipe, targets: Targets, statistics: Mapping[str, LayerStatistics] | None
) -> CompressionPlan:
    """What a recipe without probes would do now; every process has to call this, the model is resharded."""
    found = survey(recipe, _KnownShards(trainer, targets, statistics))
    return decide_on_rank_zero(trainer, lambda: found.plan(recipe))
