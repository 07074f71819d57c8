"""What a rank policy may choose from for a target, and what people have said of it by hand."""

from collections.abc import Iterable, Mapping

from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.storage import Layout, largest_saving_rank, rank_within, stored_parameters
from lightning_prehab.plan.layer_plan import NO_MULTIPLE, LayerPlan
from lightning_prehab.plan.recipe import RankOverride, Recipe
from lightning_prehab.plan.spectra import Spectrum
from lightning_prehab.rank_policies import LayerChoices
from lightning_prehab.targets.layouts import layout_of
from lightning_prehab.targets.locate import Target, layer_names
from lightning_prehab.targets.names import match_names


def choices_of(
    name: str,
    layer: Target,
    spectrum: Spectrum,
    recipe: Recipe,
    override: int | str | None,
) -> LayerChoices:
    """What a rank policy may choose from for one layer."""
    view, factorization, multiple = view_of(layer), recipe.factorization_or_default, recipe.rank_multiple_of
    if override == "dense":
        ranks: tuple[int, ...] = () if view.rank is None else (view.rank,)
    elif isinstance(override, int):
        ranks = (override,)
    else:
        limit = rank_limit(layer, factorization, recipe.layout)
        ranks = tuple(range(multiple, limit + 1, multiple)) or tuple(range(1, limit + 1))
        if view.rank is not None and view.rank not in ranks:
            ranks = (*ranks, view.rank)  # it may stay as it is
    dense = view.rank is None and (override is None or override == "dense")
    added = added_parameters(layer, factorization)
    return LayerChoices(
        name,
        *view.shape,
        spectrum.singular_values,
        ranks,
        dense,
        added,
        spectrum.components,
        positions=spectrum.positions,
        groups=view.group_count,
        layout=layout_of(layer, recipe.layout),
    )


def added_parameters(layer: Target, factorization: Factorization) -> int:
    """Parameters that a cut adds beside the low-rank matrix: a new bias, the values of a sparse part."""
    view = view_of(layer)
    new_bias = view.bias_size if factorization.adds_bias and view.bias is None else 0
    return new_bias + factorization.nonzeros(*view.shape)


def rank_limit(layer: Target, factorization: Factorization, layout: Layout) -> int:
    """The largest rank that saves parameters in a layout, with what a cut adds beside the low-rank matrix counted.

    Of a layer that has been cut before, the largest that does not make it grow.
    """
    view, stored = view_of(layer), layout_of(layer, layout)
    beside = added_parameters(layer, factorization)
    if view.rank is None:
        return largest_saving_rank(*view.shape, stored, view.group_count, beside)
    spare = present_parameters(layer) - beside
    return min(rank_within(spare, *view.shape, stored, view.group_count), view.rank)


def present_parameters(layer: Target) -> int:
    """Numbers that the matrix of a target is stored in now."""
    view = view_of(layer)
    if view.rank is None:
        return view.out_features * view.in_features
    return stored_parameters(*view.shape, view.rank, view.layout, view.group_count)


def too_small(dense: LayerPlan, multiple: int) -> str | None:
    """Why a layer has a rank that is no multiple: all that save parameters are smaller; None if they are not."""
    if dense.max_rank >= multiple:
        return None
    return f"{NO_MULTIPLE} {multiple}: ranks above {dense.max_rank} save nothing"


def resolve_overrides(recipe: Recipe, targets: Mapping[str, Target]) -> dict[str, int | str]:
    """A rank or "dense" for each layer that a pattern names."""
    resolved: dict[str, int | str] = {}
    for pattern, wish in (recipe.rank_overrides or {}).items():
        for name in match_names(pattern, list(targets), "rank_overrides", layer_names(targets)):
            resolved[name] = _resolve_override(name, wish, targets[name], recipe)
    return resolved


def _resolve_override(name: str, wish: RankOverride, layer: Target, recipe: Recipe) -> int | str:
    (m, n), groups = view_of(layer).shape, view_of(layer).group_count
    factorization = recipe.factorization_or_default
    limit = rank_limit(layer, factorization, recipe.layout)
    now = view_of(layer).rank
    if wish == "dense":
        return "dense"
    if isinstance(wish, float) and 0.0 < wish < 1.0:
        spare = wish * m * n - added_parameters(layer, factorization)
        wish = max(rank_within(spare, m, n, layout_of(layer, recipe.layout), groups), 1)
        wish = wish if now is None else min(wish, now)
    if isinstance(wish, bool) or not isinstance(wish, int) or not 1 <= wish <= limit:
        raise ArgumentError(
            f"rank_overrides: {wish!r} does not suit layer {name!r} ({m}x{n}); give a rank from 1 to {limit} "
            f"({'above, nothing is saved' if now is None else 'that it has'}), a share in (0, 1), or 'dense'."
        )
    return wish


def dense_parameters(layers: Iterable[Target]) -> int:
    """Weight parameters of some targets."""
    return sum(view_of(layer).out_features * view_of(layer).in_features for layer in layers)
