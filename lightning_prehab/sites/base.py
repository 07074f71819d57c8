"""The questions that the road asks of the place where a model lives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.rank_policies import Probe
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.report.scores import Score
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.find import Targets

T = TypeVar("T")


class Site(ABC):
    """Where a model lives: in this process, in a Trainer on several processes, in pieces elsewhere.

    A site knows nothing of methods and policies; those know nothing of sites. On several processes the road is walked
    by all of them, step by step together, and every question is asked on each. What a question raises on one of them
    has to be raised on all, or the others wait for ever.

    A new place for models is one subclass. :class:`~lightning_prehab.sites.process.ProcessSite` is the plainest one.
    """

    @property
    @abstractmethod
    def calibrates(self) -> bool:
        """Whether :meth:`observe` has data; without it the default method is one that needs none."""

    @property
    def goes_on(self) -> bool:
        """Whether the same call goes on after an interruption; if not, somebody is warned that a model is cut."""
        return False

    @abstractmethod
    def find(self, recipe: Recipe) -> Targets:
        """What there is to cut, and why the rest is left alone: in most places ``recipe.find_targets(model)``."""

    def hold_back(self) -> bool:
        """Keeps a part of the data out of what is observed, for :meth:`divergence`; asked before anything is observed.

        Returns:
            Whether cuts can be tried here; then :meth:`divergence` answers.
        """
        return False

    def score(self) -> Score | None:
        """What the model is worth as it is: asked once before anything is done, and once after the swap.

        None if nobody wants to know or it cannot be told; it is then not asked again. What it raises before the swap
        ends the work; after the swap it becomes a warning, and the report has no scores.
        """
        return None

    def blocks(self, targets: Targets) -> Iterable[Targets]:
        """The targets in parts that are observed and decomposed one after the other; by default in one."""
        return [targets]

    @abstractmethod
    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, LayerStatistics] | None:
        """What calibration sees of these targets, complete (summed over all processes), or None without data."""

    @abstractmethod
    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """Has each target decomposed once, somewhere, and keeps the decompositions for :meth:`factors`.

        It is asked for one block after the other; what it keeps adds up.

        Args:
            solver: ``solver.targets`` are what is to be decomposed, by the name of the form (see
                :mod:`lightning_prehab.targets.forms`); ``solver(names)`` decomposes some of them here.

        Returns:
            The spectra of all of them, equal on every process.
        """

    @abstractmethod
    def probe(self, targets: Targets, probe_keep: float, layout: Layout = "factors") -> dict[str, Probe] | None:
        """What a small cut of each target alone does to the model; None if that cannot be measured here.

        Args:
            targets: Decomposed ones, each in one form, by the name of the target.
            probe_keep: Share of its parameters that a layer is cut to.
            layout: How a cut layer is going to be stored.
        """

    @abstractmethod
    def decide(self, answer: Callable[[], T]) -> T:
        """The answer of one process, which all of them then have."""

    @abstractmethod
    def factors(self, plan: CompressionPlan) -> Mapping[str, Factors]:
        """Factors of all layers that the plan cuts, equal on every process.

        Raises:
            PlanError: If the plan does not fit the model.
            NumericalError: If factors are not finite (the layer is named).
        """

    def divergence(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float:
        """How far these cuts, all together, take the model from the dense one, measured; nothing is changed.

        On what has been held back: the mean Kullback-Leibler divergence of its predictions, or what comes nearest to
        that here. It may be asked for several plans; :meth:`effect` then need not measure them once more. Equal on
        every process, and infinite for a cut that leaves no finite outputs.
        """
        raise UnsupportedError(f"A {type(self).__name__} has nothing to try cuts on.")

    def release(self) -> None:  # noqa: B027  # a site that keeps nothing has nothing to let go of
        """Lets go of the decompositions, which can be large: no more factors are wanted."""

    def effect(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float | None:
        """What these cuts, all together, add to the loss in the user's own unit, measured; nothing is changed.

        Equal on every process; None if it cannot be measured here, or not yet.
        """
        return None

    @abstractmethod
    def swap(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> CompressionReport:
        """Puts the factors in the place of the planned layers: the only question that changes something."""

    def check_refinement(self, refinement: Refinement) -> None:
        """Asked before the work begins: can the cut model be refined here?

        Raises:
            PrehabError: If it cannot.
        """
        raise self._cannot_refine()

    def teacher(self, refinement: Refinement) -> Any:
        """Asked right before the swap: what :meth:`refine` needs of the dense model."""
        return None

    def refine(self, refinement: Refinement, teacher: Any) -> RefinementReport:
        """Trains the cut model toward the dense one; asked after the swap, where :meth:`check_refinement` agreed.

        What it raises becomes a warning, and the report has no refinement: the model is cut already.

        Args:
            refinement: The settings.
            teacher: What :meth:`teacher` has kept.
        """
        raise self._cannot_refine()

    def _cannot_refine(self) -> UnsupportedError:
        return UnsupportedError(
            f"A model cannot be refined in a {type(self).__name__}; refine it afterwards with refine_, or train it."
        )
