"""A provisional plan for layers that lie in shards: each is decomposed where it is whole for a moment."""

from collections.abc import Mapping

import lightning.pytorch as pl

from lightning_prehab.callbacks._distributed import decide_on_rank_zero
from lightning_prehab.callbacks._owners import owners_of
from lightning_prehab.callbacks._rounds import decompose_in_rounds
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.road import survey
from lightning_prehab.sites.process import KnownSite
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.targets.find import Targets


class _KnownShards(KnownSite):
    """Targets in shards, with the statistics of all processes."""

    def __init__(
        self, trainer: "pl.Trainer", targets: Targets, statistics: Mapping[str, LayerStatistics] | None
    ) -> None:
        super().__init__(targets, statistics)
        self._trainer = trainer

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """Each on its owner; nothing of it stays but the spectra."""
        owners = owners_of(solver.targets, self._trainer.world_size)
        return decompose_in_rounds(self._trainer, solver, owners, lambda here, names: here(names))


def plan_of_shards(
    trainer: "pl.Trainer", recipe: Recipe, targets: Targets, statistics: Mapping[str, LayerStatistics] | None
) -> CompressionPlan:
    """What a recipe without probes would do now; every process has to call this, the model is resharded."""
    found = survey(recipe, _KnownShards(trainer, targets, statistics))
    return decide_on_rank_zero(trainer, lambda: found.plan(recipe))
