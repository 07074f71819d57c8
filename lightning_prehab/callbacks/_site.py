"""A LightningModule in the middle of its training, on one process or on several (DDP), as a place for the surgery."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prehab.callbacks._distributed import (
    FactorsOfOwners,
    decide_on_rank_zero,
    merge,
    rewrap,
    sum_statistics_,
    together,
)
from lightning_prehab.callbacks._listeners import tell_listeners
from lightning_prehab.callbacks._own_pass import collect_in_own_pass, probe_in_own_pass
from lightning_prehab.callbacks._owners import owners_of, say_memory
from lightning_prehab.callbacks._targets import targets_of
from lightning_prehab.callbacks._trial import NOT_KNOWN, CutsInTraining, Trial, where_possible
from lightning_prehab.factorizations import Decomposition
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solution, Solver, Spectrum
from lightning_prehab.rank_policies import Probe
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.sites import Site
from lightning_prehab.statistics.scarce import starved, warning_of_few_tokens
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.surgery.factors import compute_factors, planned_targets
from lightning_prehab.surgery.swap import prepare_swap
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import form_name

T = TypeVar("T")
#: Training batches that a policy with probes is shown, for each layer.
PROBE_BATCHES = 8
_REMEDY = "Raise calibration_batches, or the shrinkage of the factorization."


class TrainerSite(Site):
    """The module and the optimizers of a running Trainer, one device or DDP.

    The processes share the targets out among them to decompose, rank 0 decides, and all end bit-identical.

    Args:
        trainer: The running Trainer.
        pl_module: Its module.
        batches: Training batches for a pass of our own, where nothing has been collected.
        collected: What has been collected on ordinary training steps, of this process alone; or None.
        kept: Some of those batches with their numbers.
        announced: Call ``on_before_surgery`` before the model is changed: not for a replay.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batches: int,
        collected: dict[str, LayerStatistics] | None = None,
        kept: Sequence[tuple[Any, int]] = (),
        *,
        announced: bool = False,
    ) -> None:
        self._trainer, self._pl_module, self._announced = trainer, pl_module, announced
        self._batches, self._collected, self._kept = batches, collected, kept
        self._own_pass = 0  # batches that it has taken
        self._decompositions: dict[str, Decomposition] = {}
        self._trials: CutsInTraining | None = None

    @property
    def calibrates(self) -> bool:
        """There is training data."""
        return True

    def find(self, recipe: Recipe) -> Targets:
        """What the recipe finds in the module."""
        return together(self._trainer, lambda: targets_of(recipe, self._pl_module))

    def hold_back(self) -> bool:
        """There are training batches beside those of the statistics, in most cases."""
        return True

    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, LayerStatistics] | None:
        """What the ride on training steps has collected, or a pass of our own, summed over the processes."""
        if not any(wanted):
            return None
        statistics, self._collected = self._collected, None  # they can be large, and are wanted once
        if statistics is None:
            self._own_pass = self._batches
            arguments = self._trainer, self._pl_module, targets, wanted, self._batches
            statistics = together(self._trainer, lambda: collect_in_own_pass(*arguments))
        sum_statistics_(self._trainer, statistics)
        warning = warning_of_few_tokens(starved(statistics), _REMEDY)
        if warning is not None:
            rank_zero_warn(warning)
        return statistics

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """Some here, the others on other processes, so that all are busy for about as long."""
        owners = owners_of(solver.targets, self._trainer.world_size)
        own = [name for name, owner in owners.items() if owner == self._trainer.global_rank]
        say_memory(self._pl_module, solver, owners, self._trainer.world_size)
        solved = together(self._trainer, lambda: self._solve(solver, own))
        plain = merge(self._trainer, {name: spectrum.to_lists() for name, (_, spectrum) in solved.items()})
        return {name: Spectrum.of_lists(*plain[name]) for name in solver.targets}

    def _solve(self, solver: Solver, own: Sequence[str]) -> dict[str, Solution]:
        """Decomposes some of the targets here, and keeps of several processes' work what ranks that save can need."""
        solved = solver(own)
        for name, (decomposition, _) in solved.items():
            if decomposition.compact is not None and self._trainer.world_size > 1:
                decomposition.compact(solver.rank_limit(name))
            self._decompositions[name] = decomposition
        return solved

    def probe(self, targets: Targets, probe_keep: float, layout: Layout = "factors") -> dict[str, Probe] | None:
        """Each process measures the layers that it has decomposed, on its own batches."""
        here = {name: target for name, target in targets.items() if form_name(name, target) in self._decompositions}
        batches = min(self._batches, PROBE_BATCHES)
        own = Targets(here, {}, None)
        arguments = self._trainer, self._pl_module, own, self._decompositions, probe_keep, batches, layout
        return merge(self._trainer, together(self._trainer, lambda: probe_in_own_pass(*arguments)))

    def decide(self, answer: Callable[[], T]) -> T:
        """Rank 0 decides."""
        return decide_on_rank_zero(self._trainer, answer)

    def factors(self, plan: CompressionPlan) -> Mapping[str, Factors]:
        """Each from the process that has decomposed the layer."""
        own = together(self._trainer, lambda: compute_factors(self._pl_module, plan, self._decompositions))
        targets = together(self._trainer, lambda: planned_targets(self._pl_module, plan))
        shared = FactorsOfOwners(self._trainer, own, targets)
        return {name: shared[name].to(view_of(targets[name]).parameter.device) for name in shared}

    def divergence(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float:
        """What the cut adds to the loss of ``training_step``, on batches that the statistics are not from if there are.

        Those that an epoch begins with: the ride is on the last ones. A pass of our own has seen these, so those after
        them are taken, where an epoch has more.
        """
        if self._trials is None:
            trial = self._trial("Use another rank policy.")
            self._trials = CutsInTraining(self._trainer, trial, skip=self._own_pass)
        return self._trials.mean_change(plan, factors)

    def release(self) -> None:
        """Forgets those of this process."""
        self._decompositions = {}

    def effect(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float | None:
        """On training batches, by ``training_step`` of a copy; None, with a warning, where that fails.

        What a trial of this very cut has said is not measured once more.
        """

        def increase() -> float:
            tried = self._trials or CutsInTraining(self._trainer, self._trial(NOT_KNOWN), self._kept)
            return tried.increase(plan, factors)

        return where_possible(increase)

    def _trial(self, instead: str) -> Trial:
        """A copy of the module to try cuts on."""
        return together(self._trainer, lambda: Trial(self._trainer, self._pl_module, instead))

    def swap(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> CompressionReport:
        """In the module and all optimizers, once every process is ready to; the DDP wrapper is rebuilt."""
        if self._announced:
            together(self._trainer, lambda: tell_listeners(self._trainer, self._pl_module, "on_before_surgery"))
        arguments = self._pl_module, plan, factors, self._trainer.optimizers
        report = together(self._trainer, lambda: prepare_swap(*arguments)).commit()
        rewrap(self._trainer, self._pl_module)
        return report
