"""The recipe that the words of the command line mean."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import SVD, ActivationSVD, Factorization, FisherSVD, KroneckerSVD, WhitenedSVD
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.rank_policies import BudgetPolicy, ParameterBudget, ProbeBudget, RankRatio, ZeroSum

#: The names of :data:`lightning_prehab.cli.arguments.METHODS`.
METHODS: dict[str, Callable[[], Factorization]] = {
    "svd": SVD,
    "activation": ActivationSVD,
    "fisher": FisherSVD,
    "whitened": WhitenedSVD,
    "kronecker": KroneckerSVD,
}
#: Policies of a share to keep; others are named in a recipe.
POLICIES: dict[str, Callable[[float], BudgetPolicy]] = {
    "budget": ParameterBudget,
    "ratio": RankRatio,
    "probe": ProbeBudget,
    "zero-sum": ZeroSum,
}


def read_recipe(settings: Any, keep: float | None) -> Recipe:
    """The recipe of the options that were given: those of a file, those of the command line in their place.

    Args:
        settings: Parsed options of ``plan`` or ``compress``.
        keep: One of the shares to keep, or None if none was given.

    Raises:
        ArgumentError: If a value cannot be used.
    """
    recipe = Recipe() if settings.recipe is None else Recipe.from_yaml(settings.recipe)
    options = {
        "keep": keep,
        "factorization": None if settings.method is None else METHODS[settings.method](),
        "target_modules": settings.target_modules,
        "exclude_modules": settings.exclude_modules,
        "rank_overrides": None if settings.rank_override is None else dict(settings.rank_override),
        "rank_multiple_of": settings.rank_multiple_of,
        "split_fused": settings.split_fused or None,
        "layout": settings.layout,
    }
    recipe = replace(recipe, **{name: value for name, value in options.items() if value is not None})
    if settings.policy is not None:
        stored = recipe.policy.keep if isinstance(recipe.policy, BudgetPolicy) else recipe.keep
        return replace(recipe, policy=POLICIES[settings.policy](stored if keep is None else keep))
    if keep is None or recipe.policy is None:
        return recipe
    if not isinstance(recipe.policy, BudgetPolicy):
        raise ArgumentError(f"--keep has no effect on {recipe.policy}, the policy of {settings.recipe}; leave it out.")
    return replace(recipe, policy=replace(recipe.policy, keep=keep))
