"""Targets that can be seen as more than one matrix, such as the two schemes of a convolution, and the choice of one.

A form is told by its shape in plans and files, and by its name in statistics: those of the ordinary form stand under
the name of the target, those of another one under ``"name:form"``.
"""

from collections.abc import Mapping, Sequence

from lightning_prehab.kinds import MatrixView, kind_of, view_of
from lightning_prehab.rank_policies import LayerChoices, RankPolicy
from lightning_prehab.targets import Target, Targets

#: Plans that are made at most to see what the forms cost; the choice is settled after one or two.
ROUNDS = 4


def form_name(name: str, target: Target) -> str:
    """The name of a target in one of its forms.

    >>> from torch import nn
    >>> form_name("conv", nn.Conv2d(4, 4, 3)), [form_name("conv", form) for form in forms_of(nn.Conv2d(4, 4, 3))]
    ('conv', ['conv', 'conv:spatial'])
    """
    form = view_of(target).form
    return f"{name}:{form}" if form else name


def forms_of(target: Target) -> list[Target]:
    """The forms that planning may choose from; a matrix that is given as a view is chosen already."""
    kind = None if isinstance(target, MatrixView) else kind_of(target)
    if kind is None or isinstance(target, MatrixView):
        return [target]
    others = [view for views in kind.choices(target)[1:] for view in views.values()]
    return [target, *others]


def in_all_forms(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Every target in all of its forms, by the names of their statistics."""
    return {form_name(name, form): form for name, target in targets.items() for form in forms_of(target)}


def form_of_shape(target: Target, shape: tuple[int, int]) -> Target:
    """The form of a target whose matrix has this shape; the target itself if none has."""
    return next((form for form in forms_of(target) if view_of(form).shape == shape), target)


def in_chosen_forms(forms: Targets, chosen: Mapping[str, str]) -> Targets:
    """Each target in one form: ``forms`` holds all of them, ``chosen`` is ``{name: name of the form}``."""
    taken = {name: forms[form] for name, form in chosen.items()}
    return Targets(taken, forms.skipped, forms.model_parameters)


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
    lost = float(retained[-1] - retained[max(ranks, default=0)])
    return lost if comparable else lost / max(float(retained[-1]), 1e-300)
