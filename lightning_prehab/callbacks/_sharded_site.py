"""A LightningModule in the middle of its training, in shards on several processes, as a place for the surgery."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_prehab.callbacks._distributed import FactorsOfOwners, together
from lightning_prehab.callbacks._listeners import tell_listeners
from lightning_prehab.callbacks._owners import owners_of, say_memory
from lightning_prehab.callbacks._rounds import decompose_in_rounds
from lightning_prehab.callbacks._sharded_trial import ShardedTrial
from lightning_prehab.callbacks._site import TrainerSite
from lightning_prehab.callbacks._trial import Trial
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.sharding import is_distributed
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.rank_policies import Probe
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.sharded.engine import is_sharded, reshard_
from lightning_prehab.sharded.swap import prepare_sharded_swap
from lightning_prehab.sites import Site
from lightning_prehab.surgery.factors import compute_factors
from lightning_prehab.targets.find import Targets

T = TypeVar("T")


def site_of(trainer: "pl.Trainer", pl_module: "pl.LightningModule", batches: int, *known: Any, **settings: Any) -> Site:
    """The site of a running Trainer, by where its weights lie; arguments as of :class:`TrainerSite`."""
    kind = ShardedSite if is_sharded(pl_module) else TrainerSite
    return kind(trainer, pl_module, batches, *known, **settings)


class ShardedSite(TrainerSite):
    """The module and the optimizers of a running Trainer whose weights lie in shards.

    Each layer is put together on the process that decomposes it, one at a time on each; its factors stay there until
    the swap, which sends those of one layer after the other. No process ever has more of the model than its shard and
    one layer.
    """

    def find(self, recipe: Recipe) -> Targets:
        """What the recipe finds in the module, with all of its parameters in shards."""
        reshard_(self._pl_module)
        return super().find(recipe)

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """In rounds, in each of which each process works on one layer."""
        owners = owners_of(solver.targets, self._trainer.world_size)
        say_memory(self._pl_module, solver, owners, self._trainer.world_size)
        return decompose_in_rounds(self._trainer, solver, owners, self._solve)

    def probe(self, targets: Targets, probe_keep: float, layout: Layout = "factors") -> dict[str, Probe] | None:
        """Not here: each process would have to run the whole model for layers of its own."""
        raise UnsupportedError(
            "Small cuts of one layer each cannot be measured on sharded weights; use another policy."
        )

    def factors(self, plan: CompressionPlan) -> Mapping[str, Factors]:
        """Each stays with the process that has decomposed the layer, and is sent when it is asked for."""
        own = self._agree(lambda: compute_factors(self._pl_module, plan, self._decompositions))
        new = {name: found for name, found in own.items() if not is_distributed(found.A)}  # the others stay as they are
        return FactorsOfOwners(self._trainer, new, [layer.name for layer in plan.layers])

    def swap(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> CompressionReport:
        """In the module and all optimizers, layer by layer, once every process is ready to."""
        if self._announced:
            self._agree(lambda: tell_listeners(self._trainer, self._pl_module, "on_before_surgery"))
        reshard_(self._pl_module)
        arguments = self._pl_module, plan, factors, self._trainer.optimizers
        return prepare_sharded_swap(*arguments, agree=self._agree).commit()

    def _trial(self, instead: str) -> Trial:
        reshard_(self._pl_module)
        return self._agree(lambda: ShardedTrial(self._trainer, self._pl_module, instead))

    def _agree(self, work: Callable[[], T]) -> T:
        return together(self._trainer, work)
