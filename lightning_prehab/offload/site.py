"""A model in a folder on disk."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import Decomposition
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.offload.chain import Chain
from lightning_prehab.offload.heap import give_back
from lightning_prehab.offload.memories import Decompositions, Remembered, Seen
from lightning_prehab.offload.parts import Part, highest_rank, parts_of
from lightning_prehab.offload.refining import FolderRefinement, check_blocks_alone
from lightning_prehab.offload.skeleton import Skeleton
from lightning_prehab.offload.sweep import Sweep, entered
from lightning_prehab.offload.work import Work
from lightning_prehab.offload.writer import FolderWriter
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.progress import counted
from lightning_prehab.rank_policies import Probe
from lightning_prehab.refinement.sequences import Sequences, first_row
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.sites.base import Site
from lightning_prehab.statistics.scarce import starved, warning_of_few_tokens, warning_of_no_data
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.surgery.factors import compute_factors, cut_targets
from lightning_prehab.surgery.pretrained import check_pretrained
from lightning_prehab.targets.find import Targets

T = TypeVar("T")
_REMEDY = "Give more batches (--data on the command line), or raise the shrinkage of the factorization."


class FolderSite(Site):
    """A model in a folder on disk, of which one block is in memory at a time.

    Everything that has been done lies in the work folder; a site that is asked the same questions again goes on where
    another one was killed.

    Args:
        skeleton: The model.
        chain: Its blocks.
        batches: Calibration batches, or None.
        work: The folder for what is not finished.
        writer: Writes the compressed model.
        sums_at_most: Bytes of statistics that may be in memory at a time; None: all of a block.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        chain: Chain,
        batches: Sequence[Any] | None,
        work: Work,
        writer: FolderWriter,
        sums_at_most: int | None = None,
    ) -> None:
        self._skeleton, self._chain, self._batches, self._work = skeleton, chain, batches, work
        self._writer, self._sums_at_most = writer, sums_at_most
        self._decompositions = Decompositions(work)
        self._sweep: Sweep | None = None
        self._parts: dict[int, Part] = {}  # by the id of their targets
        self._part: Part | None = None
        self._recipe = Recipe()
        self._starved: dict[str, int] = {}

    @property
    def calibrates(self) -> bool:
        """Whether there are batches."""
        return self._batches is not None

    @property
    def goes_on(self) -> bool:
        """With all that lies in the work folder."""
        return True

    def find(self, recipe: Recipe) -> Targets:
        """What the recipe finds in the model without its weights."""
        check_possible(recipe)
        self._recipe = recipe
        targets = recipe.find_targets(self._skeleton.model)
        check_pretrained(self._skeleton.model, (view_of(target).module for target in targets.values()))
        if not self.calibrates and not any(recipe.wanted):
            warning = warning_of_no_data(sum(math.prod(view_of(target).shape) for target in targets.values()))
            if warning is not None:
                warnings.warn(warning, stacklevel=2)
        return targets

    def blocks(self, targets: Targets) -> list[Targets]:
        """The parts of the model, in the order of the passes."""
        wanted = self._wanted
        if any(wanted) and self._sweep is None and self._batches is not None:
            self._sweep = Sweep(self._skeleton, self._chain, self._batches, wanted, self._work)
        parts = parts_of(targets, self._chain, wanted, self._sums_at_most)
        self._parts = {id(part.targets): part for part in parts}
        return [part.targets for part in parts]

    def observe(self, targets: Targets, wanted: Wanted) -> Mapping[str, LayerStatistics] | None:
        """What calibration sees of a part, on disk."""
        part = self._part = self._parts[id(targets)]
        if not any(wanted) or self._batches is None:
            return None
        key = f"statistics-{part.key}"
        if self._work.done(key) is None:
            Seen.write(self._work, key, self._seen_of(part), wanted)
            give_back()
        found = Remembered.of(self._work, key)
        self._starved |= starved(found)
        return found

    def decompose(self, solver: Solver) -> dict[str, Spectrum]:
        """One target at a time; those that were decomposed before are read."""
        part = self._part
        assert part is not None
        key = f"statistics-{part.key}"
        for form, target in counted(list(solver.targets.items()), "decompose"):
            if self._decompositions.note(form) is not None:
                continue
            view = view_of(target)
            statistics = None if solver.statistics is None else Seen(self._work, key)
            with self._skeleton.loaded(view.module):
                solution = replace(solver, statistics=statistics)([form])[form]
                self._decompositions.keep(
                    form, solution, highest_rank(target, self._recipe.layout), view.parameter.dtype, key
                )
                del solution
            give_back()
        notes = [self._decompositions.note(form) for form in solver.targets]
        if all(note is not None and note["kept"] for note in notes):
            self._work.remove(f"{key}.safetensors")
        if self._sweep is not None and part.last and part.block is not None:
            self._sweep.passed(part.block)
        return {form: self._decompositions.spectrum(form) for form in solver.targets}

    def probe(self, targets: Targets, probe_keep: float, layout: Layout = "factors") -> dict[str, Probe] | None:
        """Never asked: such policies are refused."""
        return None

    def decide(self, answer: Callable[[], T]) -> T:
        """This process decides; it warns if it has seen too little to decide by."""
        warning = warning_of_few_tokens(self._starved, _REMEDY)
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
        self._starved = {}
        return answer()

    def factors(self, plan: CompressionPlan) -> Mapping[str, Factors]:
        """Those that are cut, each computed when it is asked for, its layer being in memory then."""
        return _Factors(plan, self._factors_of)

    def release(self) -> None:
        """Lets go of what the blocks are called with; nothing else is in memory."""
        self._sweep = None

    def effect(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float | None:
        """Not measured: it would take three more passes over the model."""
        return None

    def swap(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> CompressionReport:
        """Block by block, each written when it is cut."""
        return self._writer.write(plan, factors)

    def check_refinement(self, refinement: Refinement) -> None:
        """There must be batches, and blocks that run one at a time."""
        check_blocks_alone(refinement)
        self._sequences = Sequences(self._batches, refinement)
        entered(self._chain, first_row(self._sequences.held_back[0]))
        self._chain.rest()

    def teacher(self, refinement: Refinement) -> Skeleton:
        """The dense model, without its weights."""
        return Skeleton(self._skeleton.source)

    def refine(self, refinement: Refinement, teacher: Skeleton) -> RefinementReport:
        """Block by block, each written when it is refined."""
        self._writer.adopt()
        return FolderRefinement(self._skeleton, teacher, self._sequences, refinement, self._work, self._writer).run()

    @property
    def _wanted(self) -> Wanted:
        return self._recipe.where_calibrated(self.calibrates).wanted

    def _seen_of(self, part: Part) -> dict[str, LayerStatistics]:
        assert self._sweep is not None
        if part.block is not None:
            return self._sweep.block(part.block, part.targets)
        return self._sweep.front(part.targets) if part.front else self._sweep.head(part.targets)

    def _factors_of(self, plan: CompressionPlan) -> Factors:
        """The factors of a plan of one layer, which is in memory."""
        ((form, target),) = cut_targets(self._skeleton.model, plan).items()

        def again() -> Decomposition:
            note = self._decompositions.note(form)
            statistics = Seen(self._work, note["part"]) if note is not None and any(self._wanted) else None
            return Solver({form: target}, plan.factorization, statistics)([form])[form].decomposition

        found = {form: self._decompositions.decomposition(form, again)}
        return compute_factors(self._skeleton.model, plan, found)[plan.layers[0].name]


class _Factors(Mapping[str, Factors]):
    """The factors of a plan, computed when they are asked for."""

    def __init__(self, plan: CompressionPlan, factors_of: Callable[[CompressionPlan], Factors]) -> None:
        self._plan, self._factors_of = plan, factors_of
        self._cuts = {layer.name: layer for layer in plan.layers if layer.rank is not None}

    def __getitem__(self, name: str) -> Factors:
        return self._factors_of(replace(self._plan, layers=(self._cuts[name],)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)


def check_possible(recipe: Recipe) -> None:
    """Raises :class:`ArgumentError` for what needs the whole model in memory."""
    policy = recipe.policy_or_default
    if policy.needs_probes or policy.trials:
        raise ArgumentError(
            f"{policy} tries cuts on the whole model, again and again, and a model that is larger than memory would be "
            "read from disk each time; choose a policy that reads spectra, such as ParameterBudget."
        )
