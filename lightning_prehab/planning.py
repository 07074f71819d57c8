"""Decides what will happen to each layer; nothing is changed here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from lightning_prehab.choices import RankOverride, choices_of, resolve_overrides
from lightning_prehab.errors import ArgumentError, PlanError
from lightning_prehab.factorizations import Factorization, KroneckerSVD
from lightning_prehab.forms import cheapest_forms, in_all_forms, in_chosen_forms
from lightning_prehab.kinds import kind_of, view_of
from lightning_prehab.latency import measure_latencies
from lightning_prehab.plan import CompressionPlan, LayerPlan
from lightning_prehab.rank_policies import LayerChoices, ParameterBudget, Probe, RankPolicy, RankRatio
from lightning_prehab.spectra import Spectrum, decompose_targets, spectrum
from lightning_prehab.statistics import LayerStatistics, Wanted
from lightning_prehab.targets import Target, Targets, group_names


def default_policy(keep: float, factorization: Factorization) -> RankPolicy:
    """One budget for all layers if spectra are comparable between layers, the same ratio in each if not."""
    return ParameterBudget(keep) if factorization.comparable else RankRatio(keep)


def make_plan(
    targets: Mapping[str, Target],
    policy_or_keep: RankPolicy | float,
    factorization: Factorization | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
    *,
    probes: Mapping[str, Probe] | None = None,
) -> CompressionPlan:
    """Decides the rank of each target. The model is not changed.

    Args:
        targets: ``{name: layer}``, as from :func:`~lightning_prehab.find_targets`.
        policy_or_keep: A rank policy, or the share of the targets' parameters to keep, in ``(0, 1]``. A share means
            ``ParameterBudget`` if spectra of the factorization are comparable between layers, else ``RankRatio``.
        factorization: How the factors will be computed; None means ``KroneckerSVD()``.
        statistics: ``{name: LayerStatistics}`` for factorizations that read them. A target that the calibration did not
            reach is left alone, with the reason.
        rank_overrides: ``{pattern: rank}``: an int is a rank, a float a share of the layer's parameters, ``"dense"``
            keeps the layer. Later patterns win.
        rank_multiple_of: Ranks are multiples of this; layers whose break-even rank is smaller than it are free.
        probes: ``{name: Probe}`` for policies that read them; see :func:`~lightning_prehab.probes.measure_probes`.

    Returns:
        The plan; its achieved ``keep`` is never above the asked one.

    Raises:
        ArgumentError: If a value is out of range.
        PlanError: If the wish cannot be met.
        NumericalError: If a weight or a statistic is not finite (the layer is named).
    """
    factorization = KroneckerSVD() if factorization is None else factorization
    check_method(factorization, None)
    policy = policy_or_keep if isinstance(policy_or_keep, RankPolicy) else default_policy(policy_or_keep, factorization)
    check_wish(targets, policy, factorization, rank_overrides, rank_multiple_of)
    forms = usable_targets(targets, policy, factorization, statistics)
    require_targets(forms)
    spectra = {}
    for name, decomposition in decompose_targets(forms, factorization, statistics).items():
        spectra[name] = spectrum(name, forms[name], decomposition, statistics, policy.needs_weight_gradients)
    return plan_ranks(targets, forms, policy, factorization, spectra, rank_overrides, rank_multiple_of, probes=probes)


def usable_targets(
    targets: Mapping[str, Target],
    policy: RankPolicy,
    factorization: Factorization,
    statistics: Mapping[str, LayerStatistics] | None,
) -> Targets:
    """The targets whose statistics suffice, in all forms; the others are listed as skipped, with the reason.

    Returns:
        By the name of the form, see :mod:`lightning_prehab.forms`; what is skipped by the name of the target.

    Raises:
        PlanError: If there are no statistics though they are needed.
    """
    wanted = wanted_statistics(factorization, policy)
    skipped = dict(targets.skipped) if isinstance(targets, Targets) else {}
    if any(wanted) and statistics is None:
        who = factorization if factorization.needs_statistics else policy
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
    kind = kind_of(view.module)
    if factorization.nonzeros(view.out_features, view.in_features) and (kind is None or not kind.sparse):
        return f"{type(view.module).__name__} cannot keep a sparse part"
    return None


def require_targets(usable: Targets) -> None:
    """Raises :class:`PlanError` with all reasons if there is nothing to cut."""
    if not usable:
        reasons = "; ".join(f"{name}: {why}" for name, why in usable.skipped.items())
        raise PlanError(f"No target can be cut: {reasons}.")


def choose_forms(
    targets: Mapping[str, Target],
    forms: Targets,
    policy: RankPolicy,
    factorization: Factorization,
    spectra: Mapping[str, Spectrum],
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
) -> dict[str, str]:
    """The form of each usable target that is predicted to lose least at equal parameters.

    A target whose rank is given by hand stays in its ordinary form, whose rank that is. So does everything under a
    policy that counts operations or time: a form may save them by other means than its parameters.

    Args:
        targets: The targets.
        forms: As from :func:`usable_targets`.
        policy: How the budget is spread.
        factorization: How the factors are computed.
        spectra: Of all forms.
        rank_overrides: As for :func:`make_plan`.
        rank_multiple_of: As for :func:`make_plan`.

    Returns:
        ``{name: name of the form}``.
    """
    overrides = resolve_overrides(rank_overrides or {}, targets, factorization)
    names = {}
    for name, target in targets.items():  # what is chosen already stands under the name of the target
        found = [form for form in dict.fromkeys([name, *in_all_forms({name: target})]) if form in forms]
        if found:
            names[name] = found
    for name in names:
        if policy.needs_positions or policy.needs_latencies or name in overrides:
            names[name] = names[name][:1]
    if all(len(found) == 1 for found in names.values()):
        return {name: form for name, (form,) in names.items()}
    first = [forms[found[0]] for found in names.values()]
    policy = without_probes(policy).for_model(_dense_parameters(first), forms.model_parameters)
    layers = {
        name: [
            choices_of(name, forms[form], spectra[form], factorization, overrides.get(name), rank_multiple_of)
            for form in found
        ]
        for name, found in names.items()
    }
    chosen = cheapest_forms(policy, layers, comparable=factorization.comparable)
    return {name: names[name][index] for name, index in chosen.items()}


def without_probes(policy: RankPolicy) -> RankPolicy:
    """The policy; one budget for all layers in the place of one that needs probes, as long as there are none."""
    if not policy.needs_probes:
        return policy
    wishes = {name: getattr(policy, name) for name in ("min_rank", "scope") if hasattr(policy, name)}
    return ParameterBudget(getattr(policy, "keep", 0.5), **wishes)


def plan_ranks(
    targets: Mapping[str, Target],
    forms: Targets,
    policy: RankPolicy,
    factorization: Factorization,
    spectra: Mapping[str, Spectrum],
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
    *,
    probes: Mapping[str, Probe] | None = None,
) -> CompressionPlan:
    """The last step of :func:`make_plan`, for callers that have decomposed the usable targets themselves.

    ``forms`` and ``spectra`` are of all forms, or of those that :func:`choose_forms` has chosen.
    """
    chosen = choose_forms(targets, forms, policy, factorization, spectra, rank_overrides, rank_multiple_of)
    usable = in_chosen_forms(forms, chosen)
    spectra = {name: spectra[form] for name, form in chosen.items()}
    overrides = resolve_overrides(rank_overrides or {}, targets, factorization)
    if policy.needs_probes and probes is not None:
        unseen = {name: "no probe batch reached it" for name in usable if name not in probes}
        layers_left = {name: layer for name, layer in usable.items() if name not in unseen}
        usable = Targets(layers_left, {**usable.skipped, **unseen}, usable.model_parameters)
        require_targets(usable)
    policy = policy.for_model(_dense_parameters(usable.values()), usable.model_parameters)
    choices = [
        replace(
            choices_of(name, layer, spectra[name], factorization, overrides.get(name), rank_multiple_of),
            probe=(probes or {}).get(name),
        )
        for name, layer in usable.items()
    ]
    if policy.needs_latencies:
        admissible = {choice.name: choice.ranks for choice in choices}
        latencies = measure_latencies(usable, policy.latency_tokens, admissible)
        choices = [replace(choice, latencies=latencies[choice.name]) for choice in choices]
    ranks = policy(choices)
    planned = [_layer_plan(layer, ranks[layer.name], overrides.get(layer.name), factorization) for layer in choices]
    layers = tuple(replace(layer, form=view_of(usable[layer.name]).form) for layer in planned)
    plan = CompressionPlan(layers, factorization, usable.skipped, usable.model_parameters)
    _require_budget(policy, choices, plan)
    return plan


def wanted_statistics(factorization: Factorization, policy: RankPolicy) -> Wanted:
    """What calibration has to collect for a method and a policy."""
    gradients = policy.needs_weight_gradients
    return factorization.wanted.union(Wanted(gradients or policy.needs_positions, weight_gradients=gradients))


def check_wish(
    targets: Mapping[str, Target],
    policy: RankPolicy,
    factorization: Factorization,
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
) -> None:
    """Raises what :func:`make_plan` would raise whatever the weights are: wrong wishes, too small a budget."""
    if not isinstance(rank_multiple_of, int) or rank_multiple_of < 1:
        raise ArgumentError(f"rank_multiple_of must be at least 1, got {rank_multiple_of!r}.")
    if (policy.needs_positions or policy.needs_latencies) and any(
        factorization.nonzeros(*view_of(layer).shape) for layer in targets.values()
    ):
        raise ArgumentError(
            f"{policy} counts operations or time, and the sparse part of {factorization} saves neither: it is "
            "multiplied as a dense matrix. Count parameters, or choose a factorization without a sparse part."
        )
    for name, target in targets.items() if policy.needs_latencies else ():
        kind = kind_of(view_of(target).module)
        if kind is None or not kind.linear:
            raise ArgumentError(
                f"{policy} counts time, and only linear layers are measured; leave {name!r} out with "
                "exclude_modules, or count parameters or FLOPs."
            )
    overrides = resolve_overrides(rank_overrides or {}, targets, factorization)
    policy = policy.for_model(_dense_parameters(targets.values()), getattr(targets, "model_parameters", None))
    choices = []
    for name, layer in targets.items():
        view = view_of(layer)
        size = min(view.out_features // view.group_count, view.in_features)
        flat = torch.ones(size, dtype=torch.float64)
        choices.append(choices_of(name, layer, Spectrum(flat), factorization, overrides.get(name), rank_multiple_of))
    policy.check(choices)


def _dense_parameters(layers: Iterable[Target]) -> int:
    return sum(view_of(layer).out_features * view_of(layer).in_features for layer in layers)


def _require_budget(policy: RankPolicy, choices: Sequence[LayerChoices], plan: CompressionPlan) -> None:
    """Raises :class:`PlanError` if a policy has chosen more than it promises to keep."""
    limit = policy.parameter_limit(choices)
    if limit is not None and plan.parameters > limit:
        raise PlanError(
            f"{policy} allows {limit:,} parameters, the smallest choice holds {plan.parameters:,} of "
            f"{plan.dense_parameters:,} (keep {plan.keep:.4f}). Raise keep, lower rank_multiple_of or the overridden "
            "ranks, or exclude small layers with exclude_modules. (RankRatio takes nothing from other layers for what "
            "an override adds; ParameterBudget does.)"
        )


def check_method(factorization: object, policy: object) -> None:
    """Raises :class:`ArgumentError` for a class in place of an instance, or for something else altogether."""
    for value, kind in ((factorization, Factorization), (policy, RankPolicy)):
        if value is not None and not isinstance(value, kind):
            hint = f"; write {value.__name__}(...)" if isinstance(value, type) else ""
            raise ArgumentError(f"Expected a {kind.__name__}, got {value!r}{hint}.")


def _layer_plan(
    layer: LayerChoices, rank: int | None, override: int | str | None, factorization: Factorization
) -> LayerPlan:
    m, n = layer.out_features, layer.in_features
    nonzeros = factorization.nonzeros(m, n)
    new_bias = layer.new_bias - nonzeros
    dense = LayerPlan(layer.name, m, n, None, new_bias=new_bias, nonzeros=nonzeros, groups=layer.groups)
    comparable = factorization.comparable
    if rank is None:
        reason = "rank_overrides" if override == "dense" else "every rank below break-even costs more than it saves"
        return replace(dense, relative_error=0.0, reason=reason, loss_increase=0.0 if comparable else None)
    retained = layer.retained()
    dropped = float((retained[-1] - retained[rank]).clamp_min(0.0))
    error = min(dropped / max(float(retained[-1]), 1e-300), 1.0) ** 0.5
    return replace(dense, rank=rank, relative_error=error, loss_increase=0.5 * dropped if comparable else None)
