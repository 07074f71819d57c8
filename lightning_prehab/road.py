"""The one road from a recipe to a report: every step stands here once, in order.

Who walks it says where the model lives (:class:`~lightning_prehab.sites.Site`): in this process (``compress_``), in a
Trainer (``CompressionCallback``), or on the way to plans alone (``make_plan`` and the command line).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.plan.compression_plan import CompressionPlan, Cut
from lightning_prehab.plan.form_choice import choose_forms
from lightning_prehab.plan.ranks import check_recipe, plan_ranks
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.plan.usable import require_targets, usable_targets
from lightning_prehab.progress import counted, length_of, quiet, tell
from lightning_prehab.rank_policies import Probe
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.report.scores import Score, Scores
from lightning_prehab.sites.base import Site
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_chosen_forms, name_in_form

T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """What is known of a model before anything is decided; enough for the plan of any budget.

    Attributes:
        targets: What there is to cut.
        forms: What of it can be cut with the statistics that there are, in all forms, by the name of the form; see
            :mod:`lightning_prehab.targets.forms`.
        spectra: Of ``forms``.
    """

    targets: Targets
    forms: Targets
    spectra: Mapping[str, Spectrum]

    def plan(self, recipe: Recipe, probes: Mapping[str, Probe] | None = None) -> CompressionPlan:
        """What the recipe would do to each target.

        Args:
            recipe: With the method that the targets have been decomposed with.
            probes: What a small cut of each target did, for policies that ask.

        Raises:
            PlanError: If the wish cannot be met.
            StatisticsError: If the policy tries whole cuts, which is for :func:`operate` and :func:`plan_budgets`.
        """
        if recipe.policy_or_default.trials:
            raise _nothing_to_try(recipe)
        return plan_ranks(self.targets, self.forms, recipe, self.spectra, probes=probes)


def operate(recipe: Recipe, site: Site, refinement: Refinement | None = None) -> CompressionReport:
    """Cuts a model, where it lives, as the recipe says, and refines what is left of it, if that is wished for.

    Raises:
        PrehabError: If something is wrong; the model is then as it was.
    """
    if refinement is not None:
        site.check_refinement(refinement)
    recipe = recipe.where_calibrated(site.calibrates)
    targets = _find([recipe], site)
    before = site.score()
    found = _examine(targets, recipe, site)
    plan = _decide(recipe, site, found)
    factors = site.factors(plan)
    site.release()
    plan = _in_the_unit_of_the_loss(plan, site, factors)
    forms = {layer.name: name_in_form(layer.name, layer.form) for layer in plan.layers}
    spectra = {name: found.spectra[form] for name, form in forms.items()}
    return _carry_out(plan, site, factors, spectra, before, refinement)


def survey(recipe: Recipe, site: Site, others: Sequence[Recipe] = ()) -> Survey:
    """The first part of the road, up to where something has to be decided: find, observe, decompose.

    Args:
        recipe: What is wished for.
        site: Where the model lives.
        others: Recipes that are going to be planned too, checked before the work begins.
    """
    return _examine(_find([recipe, *others], site), recipe, site)


def _find(recipes: Sequence[Recipe], site: Site) -> Targets:
    """What there is to cut; recipes that cannot be met with it are refused before the work begins."""
    targets = site.find(recipes[0])
    for one in recipes:
        check_recipe(one, targets)
        if one.policy_or_default.trials and not site.hold_back():
            raise _nothing_to_try(one)
    return targets


def _nothing_to_try(recipe: Recipe) -> StatisticsError:
    return StatisticsError(
        f"{recipe.policy_or_default} tries cuts of the model on calibration batches, and here there are none (a plan "
        "out of statistics has no model either). Give batches to compress_, --data on the command line, or the policy "
        "what such trials have found: trials=0, alpha=..., gamma=..."
    )


def _examine(targets: Targets, recipe: Recipe, site: Site) -> Survey:
    forms = Targets({}, dict(targets.skipped), targets.model_parameters)
    spectra: dict[str, Spectrum] = {}

    def look_at(block: Targets) -> None:  # a function of its own: its statistics are gone before the next block's come
        statistics = site.observe(block, recipe.wanted)
        usable = usable_targets(block, recipe, statistics)
        solver = Solver(
            usable,
            recipe.factorization_or_default,
            statistics,
            components=recipe.policy_or_default.needs_weight_gradients,
            layout=recipe.layout,
        )
        spectra.update(site.decompose(solver))
        forms.add(usable)

    blocks = site.blocks(targets)
    for block in blocks if length_of(blocks) == 1 else counted(blocks, "block"):
        look_at(block)
    require_targets(forms)
    return Survey(targets, forms, spectra)


def plan_budgets(recipes: Sequence[Recipe], site: Site) -> list[CompressionPlan]:
    """Plans of several budgets out of one calibration and one decomposition; nothing is changed.

    Args:
        recipes: At least one; they differ in what ranks depend on alone, such as in ``keep``.
        site: Where the model lives.

    Raises:
        ArgumentError: If they differ in what is calibrated or decomposed.
    """
    first, *others = (recipe.where_calibrated(site.calibrates) for recipe in recipes)
    ranks_alone = ("keep", "policy", "rank_overrides", "rank_multiple_of")
    same = {name: getattr(first, name) for name in ranks_alone}
    for other in others:
        if replace(other, **same) != first or other.wanted != first.wanted:
            raise ArgumentError(f"{other} cannot be planned together with {first}: it needs a calibration of its own.")
    found = survey(first, site, others)
    plans = []
    for recipe in (first, *others):
        plan = _decide(recipe, site, found)
        plans.append(_in_the_unit_of_the_loss(plan, site, site.factors(plan)) if plan.loss_increase else plan)
    site.release()
    return plans


def apply(plan: CompressionPlan, site: Site, solver: Solver, refinement: Refinement | None = None) -> CompressionReport:
    """Carries out a plan that is there already.

    Args:
        plan: What is cut to which rank.
        site: Where the model lives.
        solver: Of the targets to be cut, in the order of the plan.
        refinement: What is to be done with the cut model, or None.

    Raises:
        PrehabError: If something is wrong; the model is then as it was.
    """
    if refinement is not None:
        site.check_refinement(refinement)
    before = site.score()
    spectra: dict[str, Spectrum] = {}
    for block in site.blocks(Targets(solver.targets, {}, None)):
        spectra.update(site.decompose(replace(solver, targets=block)))
    cut = [layer.name for layer in plan.layers if layer.rank is not None]
    factors = site.factors(plan)
    site.release()
    seen = {name: spectra[form] for name, form in zip(cut, solver.targets, strict=True)}
    return _carry_out(plan, site, factors, seen, before, refinement)


def _decide(recipe: Recipe, site: Site, found: Survey) -> CompressionPlan:
    """The middle of the road: probe and try, where the policy asks for it, and plan."""
    policy, probes = recipe.policy_or_default, None
    if policy.needs_probes:
        chosen = site.decide(lambda: choose_forms(found.targets, found.forms, recipe, found.spectra))
        probes = site.probe(in_chosen_forms(found.forms, chosen), policy.probe_keep, recipe.layout)
    if policy.trials:
        return _best_tried(recipe, site, found, probes)
    return site.decide(partial(found.plan, recipe, probes))


def _best_tried(recipe: Recipe, site: Site, found: Survey, probes: Mapping[str, Probe] | None) -> CompressionPlan:
    """The plan whose cut as a whole takes the model least far from the dense one; the first of equals."""
    search, trials = recipe.policy_or_default.search(), recipe.policy_or_default.trials
    costs: dict[tuple[Cut, ...], float] = {}
    plans: list[tuple[float, CompressionPlan]] = []
    policy = next(search)
    while True:
        tell("budget", len(plans), trials)
        with quiet():
            plan = site.decide(partial(found.plan, replace(recipe, policy=policy), probes))
            if plan.cuts not in costs:
                costs[plan.cuts] = site.divergence(plan, site.factors(plan.as_two_factors()))
        plans.append((costs[plan.cuts], plan))
        try:
            policy = search.send(costs[plan.cuts])
        except StopIteration as end:
            tell("budget", len(plans), len(plans))
            _, best = min(plans, key=itemgetter(0))
            return replace(best, note=end.value)


def _in_the_unit_of_the_loss(plan: CompressionPlan, site: Site, factors: Mapping[str, Factors]) -> CompressionPlan:
    """The plan with a prediction in the user's own unit, or without one where it cannot be tried.

    Gradients alone do not know that unit: a loss may be a sum or a mean, over samples or over their tokens.
    """
    return plan.with_loss_increase(site.effect(plan, factors)) if plan.loss_increase else plan


def _carry_out(
    plan: CompressionPlan,
    site: Site,
    factors: Mapping[str, Factors],
    spectra: Mapping[str, Spectrum],
    before: Score | None,
    refinement: Refinement | None = None,
) -> CompressionReport:
    """The last part of the road: the swap, what it did, and what refining brings.

    Spectra, by the name of the layer, are for the report.
    """
    teacher = None if refinement is None else site.teacher(refinement)
    report = site.swap(plan, factors)
    report = report.with_spectra({name: one.singular_values for name, one in spectra.items()})
    if refinement is not None:
        report = report.with_refinement(_refined(site, refinement, teacher))
        del teacher
    return report if before is None else report.with_scores(_scores(site, before))


def _refined(site: Site, refinement: Refinement, teacher: Any) -> RefinementReport | None:
    return _after_the_cut(site, lambda: site.refine(refinement, teacher), "it could not be refined", "refined")


def _scores(site: Site, before: Score) -> Scores | None:
    after = _after_the_cut(site, site.score, "what it is worth now could not be measured", "measured")
    return None if after is None else Scores(before, after)


def _after_the_cut(site: Site, work: Callable[[], T], failed: str, done: str) -> T | None:
    """What goes wrong here is a warning: a model is anybody's code, and it is cut already."""
    try:
        return work()
    except Exception as error:
        warnings.warn(f"The model is compressed, but {failed} ({type(error).__name__}: {error}).", stacklevel=2)
        return None
    except BaseException:
        if not site.goes_on:
            warnings.warn(
                f"Interrupted while the compressed model was {done}: the model in memory is cut, and there is no "
                "report.",
                stacklevel=2,
            )
        raise
