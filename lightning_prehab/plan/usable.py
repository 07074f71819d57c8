"""Which targets can be cut with the statistics that there are, and why the others cannot."""

from collections.abc import Mapping

from lightning_prehab.errors import PlanError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.kinds import kind_again, view_of
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_all_forms
from lightning_prehab.targets.locate import Target, group_names


def usable_targets(
    targets: Mapping[str, Target], recipe: Recipe, statistics: Mapping[str, LayerStatistics] | None
) -> Targets:
    """The targets whose statistics suffice, in all forms; the others are listed as skipped, with the reason.

    Returns:
        By the name of the form, see :mod:`lightning_prehab.targets.forms`; what is skipped by the name of the target.

    Raises:
        PlanError: If there are no statistics though they are needed.
    """
    wanted, factorization = recipe.wanted, recipe.factorization_or_default
    skipped = dict(targets.skipped) if isinstance(targets, Targets) else {}
    if any(wanted) and statistics is None:
        who = factorization if factorization.needs_statistics else recipe.policy_or_default
        raise PlanError(f"{who} needs calibration statistics; pass batches, or choose SVD().")
    usable: dict[str, Target] = {}
    for name, target in targets.items():
        forms = in_all_forms({name: target})
        reasons = {
            form: _no_sparse_part(view, factorization) or _lacking(form, view, wanted, statistics)
            for form, view in forms.items()
        }
        usable |= {form: forms[form] for form, reason in reasons.items() if reason is None}
        if all(reasons.values()):
            skipped[name] = str(next(iter(reasons.values())))
    return Targets(usable, skipped, getattr(targets, "model_parameters", None))


def _lacking(form: str, target: Target, wanted: Wanted, statistics: Mapping[str, LayerStatistics] | None) -> str | None:
    """Why the statistics of a target do not suffice, or None."""
    if statistics is None or not any(wanted):
        return None
    for group in group_names(form, target):
        reason = statistics[group].missing(wanted) if group in statistics else "no statistics were collected for it"
        if reason is not None:
            return reason
    return None


def _no_sparse_part(target: Target, factorization: Factorization) -> str | None:
    view = view_of(target)
    kind = kind_again(view.module)
    if factorization.nonzeros(view.out_features, view.in_features) and (kind is None or not kind.sparse):
        return f"{type(view.module).__name__} cannot keep a sparse part"
    if factorization.nonzeros(view.out_features, view.in_features) and view.rank is not None:
        return "it is low-rank already, and gets no sparse part in another cut"
    return None


def require_targets(usable: Targets) -> None:
    """Raises :class:`PlanError` with all reasons if there is nothing to cut."""
    if not usable:
        reasons = "; ".join(f"{name}: {why}" for name, why in usable.skipped.items())
        raise PlanError(f"No target can be cut: {reasons}.")
