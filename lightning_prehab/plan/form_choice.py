"""Which way to see each target as a matrix, where there are several: the one that loses least at equal parameters."""

from collections.abc import Mapping, Sequence

from lightning_prehab.plan.choices import choices_of, dense_parameters, resolve_overrides
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Spectrum
from lightning_prehab.rank_policies import LayerChoices, RankPolicy
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_all_forms
from lightning_prehab.targets.locate import Target

#: Plans that are made at most to see what the forms cost; the choice is settled after one or two.
ROUNDS = 4
#: Share of the energy below which a loss counts as none.
ROUNDING = 1e-12


def choose_forms(
    targets: Mapping[str, Target], forms: Targets, recipe: Recipe, spectra: Mapping[str, Spectrum]
) -> dict[str, str]:
    """The form of each usable target that is predicted to lose least at equal parameters.

    A target whose rank is given by hand stays in its ordinary form, whose rank that is. So does everything under a
    policy that counts operations or time: a form may save them by other means than its parameters.

    Args:
        targets: The targets.
        forms: As from :func:`~lightning_prehab.plan.usable.usable_targets`.
        recipe: What is wished for.
        spectra: Of all forms.

    Returns:
        ``{name: name of the form}``.
    """
    overrides = resolve_overrides(recipe, targets)
    names = {}
    for name, target in targets.items():  # what is chosen already stands under the name of the target
        found = [form for form in dict.fromkeys([name, *in_all_forms({name: target})]) if form in forms]
        if found:
            names[name] = found
    policy = recipe.policy_or_default
    for name in names:
        if policy.needs_positions or policy.needs_latencies or name in overrides:
            names[name] = names[name][:1]
    if all(len(found) == 1 for found in names.values()):
        return {name: form for name, (form,) in names.items()}
    first = [forms[found[0]] for found in names.values()]
    policy = recipe.without_probes().policy_or_default.for_model(dense_parameters(first), forms.model_parameters)
    layers = {
        name: [choices_of(name, forms[form], spectra[form], recipe, overrides.get(name)) for form in found]
        for name, found in names.items()
    }
    chosen = cheapest_forms(policy, layers, comparable=recipe.factorization_or_default.comparable)
    return {name: names[name][index] for name, index in chosen.items()}


def cheapest_forms(
    policy: RankPolicy, layers: Mapping[str, Sequence[LayerChoices]], *, comparable: bool = True
) -> dict[str, int]:
    """For each target the form that loses least at equal parameters.

    The policy says how many parameters a target gets in the form that is chosen so far, with its part of those that are
    left over; the form that loses least with so many is chosen, and the policy asked again, until nothing changes.

    Args:
        policy: How the budget is spread.
        layers: The forms of each target as a policy sees them, by the name of the target.
        comparable: Whether spectra of different forms are in one unit; else shares of the energy are compared.

    Returns:
        ``{name: index}``.
    """
    chosen = dict.fromkeys(layers, 0)
    smallest = getattr(policy, "min_rank", 1)
    for _ in range(ROUNDS):
        current = [forms[chosen[name]] for name, forms in layers.items()]
        ranks = policy(current)
        spent = {layer.name: layer.parameters(ranks[layer.name]) for layer in current}
        total = sum(spent.values())
        spare = (policy.parameter_limit(current) or total) / total
        share = total / sum(layer.parameters(None) for layer in current)
        before = dict(chosen)
        for name, forms in layers.items():
            if len(forms) < 2:
                continue
            budget = spent[name] if ranks[name] is not None else share * forms[0].parameters(None)
            losses = [_lost(form, budget * spare, smallest, comparable) for form in forms]
            if min(losses) < losses[chosen[name]]:
                chosen[name] = losses.index(min(losses))
        if chosen == before:
            break
    return chosen


def _lost(layer: LayerChoices, budget: float, min_rank: int, comparable: bool) -> float:
    """Energy that is cut off within a budget, as a share of all energy if it has a unit of its own."""
    retained = layer.retained()
    ranks = [rank for rank in layer.options(min_rank) if rank is not None and layer.parameters(rank) <= budget]
    energy = float(retained[-1])
    lost = energy - float(retained[max(ranks, default=0)])
    if lost <= ROUNDING * energy:
        return 0.0  # what is left of a matrix of that very rank differs from machine to machine
    return lost if comparable else lost / energy
