"""From a plan to checked factors for its layers; nothing is changed."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, NumericalError, PlanError
from lightning_prehab.factorizations import Decomposition
from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.linalg.sparse import Sparse
from lightning_prehab.plan.choices import added_parameters
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.plan.spectra import naming
from lightning_prehab.progress import counted, naming_items
from lightning_prehab.surgery.recut import present_factors
from lightning_prehab.targets.forms import form_name
from lightning_prehab.targets.locate import Target, locate
from lightning_prehab.targets.names import clean_name, join


def cut_targets(model: nn.Module, plan: CompressionPlan) -> dict[str, Target]:
    """The matrices that the plan cuts, by the name of the form; see :mod:`lightning_prehab.targets.forms`.

    Raises:
        PlanError: If the plan does not fit the model or its own factorization.
    """
    targets = planned_targets(model, plan)
    cuts = [cut for cut in plan.layers if cut.rank is not None]
    for cut in cuts:
        said, added = cut.new_bias + cut.nonzeros, added_parameters(targets[cut.name], plan.factorization)
        if said != added:
            raise PlanError(
                f"Layer {cut.name!r}: the plan counts {said} parameters beside the two factors, "
                f"{plan.factorization} adds {added}. A plan belongs to its factorization; make it anew with make_plan."
            )
    return {form_name(cut.name, targets[cut.name]): targets[cut.name] for cut in cuts}


@in_full_precision
def compute_factors(
    model: nn.Module, plan: CompressionPlan, decompositions: Mapping[str, Decomposition]
) -> dict[str, Factors]:
    """Factors for those of the layers to cut that are decomposed here, in the dtype of their weights.

    Args:
        model: The module that the plan was made for.
        plan: What is cut to which rank.
        decompositions: By the name of the form.

    Returns:
        By the name of the layer.

    Raises:
        PlanError: If the plan does not fit the model, or the method returns something else than was planned.
        NumericalError: If factors are not finite (the layer is named).
    """
    cuts = [cut for cut in plan.layers if cut.rank is not None]
    here = [item for item in zip(cuts, cut_targets(model, plan).items(), strict=True) if item[1][0] in decompositions]
    with naming_items("factorize", [cut.name for cut, _ in here]):
        return {
            cut.name: _checked_factors(cut, target, plan, decompositions[form])
            for cut, (form, target) in counted(here, "factorize")
        }


def planned_targets(model: nn.Module, plan: CompressionPlan) -> dict[str, Target]:
    """The matrices that the plan names, checked against it."""
    if not isinstance(plan, CompressionPlan):
        raise ArgumentError(
            f"The plan must be a CompressionPlan, got {show(plan)}; make_plan makes one, "
            "CompressionPlan.from_yaml(path) reads one."
        )
    located = locate(model, {layer.name: (layer.out_features, layer.in_features) for layer in plan.layers})
    views = {join(name, part): view for name, (_, parts) in located.items() for part, view in parts.items()}
    for name, count in Counter(layer.name for layer in plan.layers).items():
        if count > 1:
            raise PlanError(f"Layer {name!r} stands twice in the plan; leave one of the two.")
    for cut in plan.layers:
        view = views.get(cut.name)
        wanted = cut.out_features, cut.in_features, cut.groups, cut.was
        if view is None or (*view.shape, view.group_count, view.rank) != wanted:
            modules = {clean_name(name): module for name, module in model.named_modules()}
            have = view.module if view is not None else modules.get(cut.name)
            found = "nothing" if have is None else f"a {type(have).__name__}({have.extra_repr()})"
            size = f"{cut.out_features}x{cut.in_features}" + ("" if cut.was is None else f" (cut to rank {cut.was})")
            raise PlanError(
                f"Layer {cut.name!r}: the plan expects a {size} weight, the model has "
                f"{found}. Make the plan for this very model, before any surgery."
            )
    return {cut.name: views[cut.name] for cut in plan.layers}


def stays_as_it_is(cut: LayerPlan, view: MatrixView) -> bool:
    """Whether a layer that has been cut before keeps its rank, and is stored as it was."""
    return cut.was is not None and cut.rank == cut.was and cut.layout == view.layout


def _checked_factors(cut: LayerPlan, target: Target, plan: CompressionPlan, decomposition: Decomposition) -> Factors:
    assert cut.rank is not None
    view = view_of(target)
    weight = view.parameter
    where = f"Layer {cut.name!r} ({cut.out_features}x{cut.in_features}): "
    with torch.no_grad(), naming(cut.name, target):
        a, b, shift, sparse, _ = decomposition.factors(cut.rank)
    if stays_as_it_is(cut, view) and shift is None:
        return present_factors(view)
    expected = (cut.groups * cut.rank, cut.in_features), (cut.out_features, cut.rank)
    if (a.shape, b.shape) != expected:
        raise PlanError(
            f"{where}{plan.factorization} returned factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"expected {expected[0]} and {expected[1]}."
        )
    nonzeros = 0 if sparse is None else len(sparse.values)
    if nonzeros != cut.nonzeros or (sparse is not None and not sparse.fits(cut.out_features, cut.in_features)):
        raise PlanError(
            f"{where}{plan.factorization} returned a sparse part of {nonzeros} values; the plan expects "
            f"{cut.nonzeros}, each at a place of its own, in ascending order."
        )
    order = None
    if cut.layout == "pivot":
        with naming(cut.name, target):
            a, b, _, _, order = Factors(a, b).pivoted()
        assert order is not None
        order = order.to(weight.device)
    a, b = a.to(weight), b.to(weight)
    shift = None if shift is None else view.to_bias(shift).to(weight)
    if sparse is not None:
        sparse = Sparse(sparse.indices.to(weight.device), sparse.values.to(weight))
    parts = (a, b, shift, None if sparse is None else sparse.values)
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise NumericalError(f"{where}{plan.factorization} returned factors with NaN or Inf at rank {cut.rank}.")
    return Factors(a, b, shift, sparse, order)
