"""The one road from a recipe to a report: every step stands here once, in order.

Who walks it says where the model lives (:class:`~lightning_prehab.sites.Site`): in this process (``compress_``), in a
Trainer (``CompressionCallback``), or on the way to plans alone (``make_plan`` and the command line).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.form_choice import choose_forms
from lightning_prehab.plan.ranks import check_recipe, plan_ranks
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Solver, Spectrum
from lightning_prehab.plan.usable import require_targets, usable_targets
from lightning_prehab.rank_policies import Probe
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.sites.base import Site
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_chosen_forms, name_in_form


@dataclass(frozen=True)
class Survey:
    """What is known of a model before anything is decided; enough for the plan of any budget.

    Attributes:
        targets: What there is to cut.
        forms: What of it can be cut with the statistics that there are, in all forms, by the name of the form; see
            :mod:`lightning_prehab.targets.forms`.
        spectra: Of ``forms``.
        probes: What a small cut of each target did, for policies that ask.
    """

    targets: Targets
    forms: Targets
    spectra: Mapping[str, Spectrum]
    probes: Mapping[str, Probe] | None = None

    def plan(self, recipe: Recipe) -> CompressionPlan:
        """What the recipe would do to each target.

        Raises:
            PlanError: If the wish cannot be met.
        """
        return plan_ranks(self.targets, self.forms, recipe, self.spectra, probes=self.probes)


def operate(recipe: Recipe, site: Site) -> CompressionReport:
    """Cuts a model, where it lives, as the recipe says.

    Raises:
        PrehabError: If something is wrong; the model is then as it was.
    """
    recipe = recipe.where_calibrated(site.calibrates)
    found = survey(recipe, site)
    plan = site.decide(partial(found.plan, recipe))
    forms = {layer.name: name_in_form(layer.name, layer.form) for layer in plan.layers}
    return _carry_out(plan, site, {name: found.spectra[form] for name, form in forms.items()})


def survey(recipe: Recipe, site: Site, others: Sequence[Recipe] = ()) -> Survey:
    """The first half of the road, up to where something has to be decided: find, observe, decompose, probe.

    Args:
        recipe: What is wished for.
        site: Where the model lives.
        others: Recipes that are going to be planned too, checked before the work begins.
    """
    targets = site.find(recipe)
    for one in (recipe, *others):
        check_recipe(one, targets)
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
        )
        spectra.update(site.decompose(usable, solver))
        forms.add(usable)

    for block in site.blocks(targets):
        look_at(block)
    require_targets(forms)
    found = Survey(targets, forms, spectra)
    if not recipe.policy_or_default.needs_probes:
        return found
    chosen = site.decide(lambda: choose_forms(targets, forms, recipe, spectra))
    return replace(found, probes=site.probe(in_chosen_forms(forms, chosen), recipe.policy_or_default.probe_keep))


def plan_budgets(recipes: Sequence[Recipe], site: Site) -> list[CompressionPlan]:
    """Plans of several budgets out of one calibration and one decomposition; nothing is changed.

    Args:
        recipes: They differ in nothing that calibration or the decomposition depend on, such as in ``keep`` alone.
        site: Where the model lives.
    """
    recipes = [recipe.where_calibrated(site.calibrates) for recipe in recipes]
    found = survey(recipes[0], site, recipes[1:])
    return [site.decide(partial(found.plan, recipe)) for recipe in recipes]


def apply(plan: CompressionPlan, site: Site, solver: Solver) -> CompressionReport:
    """Carries out a plan that is there already.

    Args:
        plan: What is cut to which rank.
        site: Where the model lives.
        solver: Of the targets to be cut, in the order of the plan.

    Raises:
        PrehabError: If something is wrong; the model is then as it was.
    """
    targets = Targets(solver.targets, {}, None)
    spectra = site.decompose(targets, solver)
    cut = [layer.name for layer in plan.layers if layer.rank is not None]
    return _carry_out(plan, site, {name: spectra[form] for name, form in zip(cut, targets, strict=True)})


def _carry_out(plan: CompressionPlan, site: Site, spectra: Mapping[str, Spectrum]) -> CompressionReport:
    """The last part of the road: factors, and the swap. The spectra, by the name of the layer, are for the report."""
    factors = site.factors(plan)
    report = site.swap(plan, factors)
    return report.with_spectra({name: one.singular_values for name, one in spectra.items()})
