"""A model in the memory of this process."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prehab.documents.checks import check_whole
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.factorizations import Decomposition
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.compression_plan import CompressionPlan, Cut
from lightning_prehab.plan.probes import measure_probes
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.progress import ends_the_work, tell
from lightning_prehab.rank_policies import Probe
from lightning_prehab.refinement.refine import check_answers, refine_with_
from lightning_prehab.refinement.sequences import Sequences
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.refinement.teacher import in_half, keep_teacher
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.evaluation import Evaluation, for_calibration
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.report.scores import Score
from lightning_prehab.sites.base import Site
from lightning_prehab.statistics.batches import check_batches
from lightning_prehab.statistics.calibration import Forward, collect_statistics
from lightning_prehab.statistics.effect import Change, effect_of_cuts
from lightning_prehab.statistics.held_back import hold_back_few
from lightning_prehab.statistics.kept import KeptBatches
from lightning_prehab.statistics.scarce import starved, warning_of_few_tokens, warning_of_no_data
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.statistics.trials import Trials, Tried
from lightning_prehab.surgery.factors import compute_factors, planned_targets
from lightning_prehab.surgery.optimizers import listed_optimizers
from lightning_prehab.surgery.pretrained import check_pretrained
from lightning_prehab.surgery.swap import swap_
from lightning_prehab.surgery.untrained import held_by_none
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import form_name
from lightning_prehab.targets.locate import Target
from lightning_prehab.targets.shards import check_not_in_shards

T = TypeVar("T")
_REMEDY = "Give more batches (--data on the command line), or raise the shrinkage of the factorization."


class ProcessSite(Site):
    """A model in the memory of this process, calibrated with some batches.

    Args:
        model: Any module with layers to cut.
        batches: Calibration batches, or None. They are gone through once for each block, and once more for probes. For
            a policy that tries cuts a few of them are held back; see :func:`hold_back_few`.
        forward: ``(model, batch) -> output or loss``; see :func:`~lightning_prehab.collect_statistics`.
        optimizers: Those that hold the weights.
        layers_at_once: So many targets are observed and decomposed at a time, and of their decompositions only what
            ranks that save parameters need is kept; None takes all at once.
        evaluate: What the model is scored on before and after: batches, a share of ``batches`` to hold back, in
            ``(0, 1)``, or an evaluation of its own; None scores nothing.

    Raises:
        ArgumentError: If ``layers_at_once`` is not at least 1, or ``evaluate`` cannot be used.
        UnsupportedError: If parameters of the model lie in shards on several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        forward: Forward | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        *,
        layers_at_once: int | None = None,
        evaluate: float | Iterable[Any] | Evaluation | None = None,
    ) -> None:
        if isinstance(model, nn.Module):
            check_not_in_shards(model, "compress_")
        check_batches(batches, forward)
        check_whole("layers_at_once", layers_at_once, 1, optional=True)
        optimizers = listed_optimizers(optimizers)
        batches, self._evaluation = for_calibration(batches, evaluate, forward)
        if isinstance(batches, Iterator) and layers_at_once is not None:
            batches = list(batches)  # several passes are needed
        self.model = model
        self._batches, self._forward, self._optimizers = batches, forward, optimizers
        self._layers_at_once = layers_at_once
        self._decompositions: dict[str, Decomposition] = {}
        self._kept = KeptBatches()
        self._trials: Trials | None = None
        self._tried: dict[tuple[Cut, ...], Tried] = {}
        self._starved: dict[str, int] = {}  # layers that have been observed: tokens needed, of those that saw few

    @property
    def calibrates(self) -> bool:
        """Whether there are batches."""
        return self._batches is not None

    def find(self, recipe: Recipe) -> Targets:
        """What the recipe finds in the model, if the model can be saved after a cut of it."""
        targets = recipe.find_targets(self.model, cut_again=True)
        check_pretrained(self.model, (view_of(target).module for target in targets.values()))
        found = [held_by_none(targets, self._optimizers)]
        if not self.calibrates and not any(recipe.wanted):
            found.append(warning_of_no_data(sum(math.prod(view_of(target).shape) for target in targets.values())))
        for warning in filter(None, found):
            warnings.warn(warning, stacklevel=2)
        return targets

    def hold_back(self) -> bool:
        """A few of the calibration batches, if there are any; those of the evaluation are for the end alone."""
        if self._batches is None:
            return False
        if self._trials is None:
            self._batches, held = hold_back_few(list(self._batches))
            self._trials = Trials(self.model, held, self._forward)
        return True

    def score(self) -> Score | None:
        """On the batches of the evaluation, if there is one."""
        return None if self._evaluation is None else self._evaluation.score(self.model)

    def blocks(self, targets: Targets) -> list[Targets]:
        """So many at once as the site was made for."""
        names = list(targets)
        size = self._layers_at_once or max(len(names), 1)
        return [
            Targets({name: targets[name] for name in names[start : start + size]}, {}, None)
            for start in range(0, len(names), size)
        ]

    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, LayerStatistics] | None:
        """Runs the model over the batches, if there are any and something is wanted."""
        if self._batches is None or not any(wanted):
            return None
        batches = self._batches
        if wanted.gradients and not self._kept and not isinstance(batches, Tensor):
            batches = self._kept.passing(batches)
        found = collect_statistics(self.model, targets, batches, forward=self._forward, wanted=wanted)
        self._starved |= starved(found)
        return found

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """All of them, here."""
        solved = solver(list(solver.targets))
        for name, (decomposition, _) in solved.items():
            self._decompositions[name] = decomposition
            if self._layers_at_once is not None and decomposition.compact is not None:
                decomposition.compact(solver.rank_limit(name))
        return {name: spectrum for name, (_, spectrum) in solved.items()}

    def probe(self, targets: Targets, probe_keep: float, layout: Layout = "factors") -> dict[str, Probe] | None:
        """On all batches."""
        if self._batches is None:
            return None
        factors_of = factors_in_forms(targets, self._decompositions)
        return measure_probes(self.model, targets, factors_of, self._batches, probe_keep, self._forward, layout)

    def decide(self, answer: Callable[[], T]) -> T:
        """This process decides; it warns if it has seen too little to decide by."""
        self.warn_of_few_tokens()
        return answer()

    def warn_of_few_tokens(self) -> None:
        """Warns, once, if what was observed is too little for some layers."""
        warning = warning_of_few_tokens(self._starved, _REMEDY)
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
        self._starved = {}

    def factors(self, plan: CompressionPlan) -> dict[str, Factors]:
        """From the decompositions of this site."""
        return compute_factors(self.model, plan, self._decompositions)

    def divergence(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float:
        """By one pass over what has been held back; see :class:`~lightning_prehab.statistics.trials.Trials`."""
        assert self._trials is not None
        tried = self._tried[plan.cuts] = self._trials.of(self._changes(plan, factors))
        return tried.divergence

    def _changes(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> list[Change]:
        targets = planned_targets(self.model, plan)
        return [Change.by_cut(view_of(targets[name]), found) for name, found in factors.items()]

    def release(self) -> None:
        """Forgets them."""
        self._decompositions.clear()

    def effect(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float | None:
        """What a trial of this very cut has said; else on held-back batches, else on the first ones of the calibration.

        None, with a warning, where that fails.
        """
        tried = self._tried.get(plan.cuts)
        if not self._kept and tried is None:
            return None
        targets = planned_targets(self.model, plan)
        views = {name: view_of(targets[name]) for name in factors}
        try:
            if self._trials is not None and tried is not None:
                return self._trials.increase(self._changes(plan, factors), tried)
            held_back = None if self._evaluation is None else self._evaluation.some_batches()
            some = held_back or [batch for batch, _ in self._kept]
            return effect_of_cuts(self.model, views, factors, some, self._forward)
        except Exception as error:  # a loss is anybody's code, and the cut does not need to know
            if ends_the_work(error):
                raise
            tell("try", 0, 0)
            warnings.warn(
                f"What the cut does to the loss could not be measured ({type(error).__name__}: {error}).", stacklevel=2
            )
            return None

    def swap(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> CompressionReport:
        """In the model and the optimizers."""
        return swap_(self.model, plan, factors, self._optimizers)

    def check_refinement(self, refinement: Refinement) -> None:
        """There must be batches, answers to compare, and no optimizer whose moments the new factors would not fit."""
        if any(optimizer.state for optimizer in self._optimizers):
            raise UnsupportedError(
                "The model cannot be refined under an optimizer that has made steps: its moments would be those of "
                "other weights. Give no optimizers, and make one after compress_."
            )
        if isinstance(self._batches, Iterator):
            self._batches = list(self._batches)  # another pass is needed
        self._sequences = Sequences(self._batches, refinement)
        check_answers(self.model, self._sequences, refinement)

    def teacher(self, refinement: Refinement) -> nn.Module:
        """The dense model, in half precision where that is fast."""
        return keep_teacher(self.model, in_half(refinement, next(self.model.parameters()).device))

    def refine(self, refinement: Refinement, teacher: nn.Module) -> RefinementReport:
        """On the batches of the calibration."""
        return refine_with_(self.model, teacher, self._sequences, refinement)


class KnownSite(ProcessSite):
    """Targets with the statistics that somebody has collected of them, without their model: enough for a plan.

    Args:
        targets: What there is to cut.
        statistics: What is known of it, or None.
    """

    def __init__(self, targets: Targets, statistics: Mapping[str, LayerStatistics] | None) -> None:
        super().__init__(nn.Module())
        self._targets, self._statistics = targets, statistics

    @property
    def calibrates(self) -> bool:
        """Always, so that a method that wants statistics and is given none says so, rather than be exchanged."""
        return True

    def find(self, recipe: Recipe) -> Targets:
        """The given ones, whatever the recipe would take."""
        return self._targets

    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, LayerStatistics] | None:
        """The given ones."""
        return self._statistics


def factors_in_forms(
    targets: Mapping[str, Target], decompositions: Mapping[str, Decomposition]
) -> Callable[[str, int], Factors]:
    """``(name of a target, rank) -> factors``, from decompositions by the name of the form."""
    return lambda name, rank: decompositions[form_name(name, targets[name])].factors(rank)
