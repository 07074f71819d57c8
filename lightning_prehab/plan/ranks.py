"""Decides the rank of each layer; nothing is changed here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, PlanError, TargetError, UnsupportedError
from lightning_prehab.kinds import kind_again, view_of
from lightning_prehab.plan.choices import (
    choices_of,
    dense_parameters,
    present_parameters,
    resolve_overrides,
    too_small,
)
from lightning_prehab.plan.compression_plan import CompressionPlan, LayerPlan
from lightning_prehab.plan.form_choice import choose_forms
from lightning_prehab.plan.layer_plan import AND, AS_IT_WAS
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.plan.spectra import Spectrum
from lightning_prehab.plan.timing import measure_latencies
from lightning_prehab.plan.usable import require_targets
from lightning_prehab.rank_policies import LayerChoices, Probe, RankPolicy
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import in_chosen_forms
from lightning_prehab.targets.layouts import why_factors
from lightning_prehab.targets.locate import Target


def plan_ranks(
    targets: Mapping[str, Target],
    forms: Targets,
    recipe: Recipe,
    spectra: Mapping[str, Spectrum],
    *,
    probes: Mapping[str, Probe] | None = None,
) -> CompressionPlan:
    """Decides the rank of each target.

    Args:
        targets: What was found.
        forms: What of it can be cut, in all forms or in chosen ones, by the name of the form.
        recipe: What is wished for.
        spectra: Of ``forms``.
        probes: For policies that read them; a target without one is left alone.

    Raises:
        PlanError: If the wish cannot be met.
    """
    chosen = choose_forms(targets, forms, recipe, spectra)
    usable = in_chosen_forms(forms, chosen)
    spectra = {name: spectra[form] for name, form in chosen.items()}
    overrides = resolve_overrides(recipe, targets)
    policy = recipe.policy_or_default
    if policy.needs_probes and probes is not None:
        unseen = {name: "no probe batch reached it" for name in usable if name not in probes}
        layers_left = {name: layer for name, layer in usable.items() if name not in unseen}
        usable = Targets(layers_left, {**usable.skipped, **unseen}, usable.model_parameters)
        require_targets(usable)
    policy = policy.for_model(dense_parameters(usable.values()), usable.model_parameters)
    choices = [
        replace(
            choices_of(name, layer, spectra[name], recipe, overrides.get(name)),
            probe=(probes or {}).get(name),
        )
        for name, layer in usable.items()
    ]
    if policy.needs_latencies:
        admissible = {choice.name: choice.ranks for choice in choices}
        layouts = {choice.name: choice.layout for choice in choices}
        latencies = measure_latencies(usable, policy.latency_tokens, admissible, layouts)
        choices = [replace(choice, latencies=latencies[choice.name]) for choice in choices]
    ranks = _checked(policy(choices), policy, choices)
    layers = tuple(
        _layer_plan(layer, usable[layer.name], ranks[layer.name], overrides.get(layer.name), recipe)
        for layer in choices
    )
    plan = CompressionPlan(layers, recipe.factorization_or_default, usable.skipped, usable.model_parameters)
    _require_budget(policy, choices, plan)
    return plan


def _checked(answer: object, policy: RankPolicy, choices: Sequence[LayerChoices]) -> Mapping[str, int | None]:
    """The answer of a policy, which may be anybody's: a rank that may be chosen for each layer, and nothing else."""
    names = [layer.name for layer in choices]
    if not isinstance(answer, Mapping) or set(answer) != set(names):
        given = list(answer) if isinstance(answer, Mapping) else answer
        raise PlanError(f"{policy} must answer with a rank for each of {names}, got {show(given)}.")
    for layer in choices:
        rank = answer[layer.name]
        dense = rank is None and layer.dense
        if not dense and (isinstance(rank, bool) or not isinstance(rank, int) or rank not in layer.ranks):
            or_dense = ", or None for dense" if layer.dense else ""
            allowed = f"one of {show(list(layer.ranks))}{or_dense}" if layer.ranks else "None, for dense"
            raise PlanError(f"{layer}: {policy} must answer with {allowed}, got {show(rank)}.")
    return answer


def check_recipe(recipe: Recipe, targets: Mapping[str, Target]) -> None:
    """Raises what the road would raise whatever the weights are: wrong wishes, too small a budget, no values at all."""
    policy, factorization = recipe.policy_or_default, recipe.factorization_or_default
    for name, target in targets.items():
        _check_readable(name, view_of(target).parameter)
    if (policy.needs_positions or policy.needs_latencies) and any(
        factorization.nonzeros(*view_of(layer).shape) for layer in targets.values()
    ):
        raise ArgumentError(
            f"{policy} counts operations or time, and the sparse part of {factorization} saves neither: it is "
            "multiplied as a dense matrix. Count parameters, or choose a factorization without a sparse part."
        )
    for name, target in targets.items() if recipe.layout != "factors" else ():
        if factorization.nonzeros(*view_of(target).shape):
            raise ArgumentError(
                f"{factorization} keeps a sparse part beside two factors; the {recipe.layout} layout has no place for "
                f"it (layer {name!r}). Leave layout out, or choose a factorization without a sparse part."
            )
    for name, target in targets.items() if policy.needs_latencies else ():
        kind = kind_again(view_of(target).module)
        if kind is None or not kind.linear:
            raise ArgumentError(
                f"{policy} counts time, and only linear layers are measured; leave {name!r} out with "
                "exclude_modules, or count parameters or FLOPs."
            )
    overrides = resolve_overrides(recipe, targets)
    policy = policy.for_model(dense_parameters(targets.values()), getattr(targets, "model_parameters", None))
    choices = []
    for name, layer in targets.items():
        view = view_of(layer)
        size = min(view.out_features // view.group_count, view.in_features)
        flat = torch.ones(size, dtype=torch.float64, device="cpu")
        choices.append(choices_of(name, layer, Spectrum(flat), recipe, overrides.get(name)))
    policy.check(choices)
    _require_less(policy, choices, targets)


def _require_less(policy: RankPolicy, choices: Sequence[LayerChoices], targets: Mapping[str, Target]) -> None:
    """Raises :class:`TargetError` for a budget that a model is within already: another cut would change nothing."""
    again = [name for name, target in targets.items() if view_of(target).rank is not None]
    limit = policy.parameter_limit(choices)
    present = sum(present_parameters(target) for target in targets.values())
    if not again or limit is None or present > limit:
        return
    whole = dense_parameters(targets.values())
    raise TargetError(
        f"The model is compressed already (low-rank layers: {len(again)}, the first {again[0]!r}): the targets hold "
        f"{present:,} of {whole:,} parameters (keep {present / whole:.3f}), and {policy} allows {limit:,}. Give a "
        "smaller keep, which counts against the dense weights, for a deeper cut; or call to_dense_(model) first, or "
        "start from the dense model, for another cut of the same layers."
    )


def _check_readable(name: str, weight: Tensor) -> None:
    """Raises :class:`UnsupportedError` for a weight that has a shape to plan with, but cannot be decomposed."""
    if weight.is_meta:
        raise UnsupportedError(
            f"Layer {name!r}: its weight has no values (meta device, or moved out by accelerate). Load the weights "
            "first, or leave the layer out with exclude_modules."
        )


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


def _layer_plan(
    layer: LayerChoices, target: Target, rank: int | None, override: int | str | None, recipe: Recipe
) -> LayerPlan:
    m, n, factorization = layer.out_features, layer.in_features, recipe.factorization_or_default
    nonzeros = factorization.nonzeros(m, n)
    new_bias = layer.new_bias - nonzeros
    dense = LayerPlan(
        layer.name,
        m,
        n,
        None,
        new_bias=new_bias,
        nonzeros=nonzeros,
        groups=layer.groups,
        form=view_of(target).form,
        layout=layer.layout,
        was=view_of(target).rank,
    )
    comparable = factorization.comparable
    if rank is None:
        limit = "break-even" if layer.layout == "factors" else "the full one"
        reason = "rank_overrides" if override == "dense" else f"every rank below {limit} costs more than it saves"
        return replace(dense, relative_error=0.0, reason=reason, loss_increase=0.0 if comparable else None)
    retained = layer.retained()
    dropped = float((retained[-1] - retained[rank]).clamp_min(0.0))
    error = min(dropped / max(float(retained[-1]), 1e-300), 1.0) ** 0.5
    loss_increase = 0.5 * dropped if comparable else None
    multiple = None if override is not None else too_small(dense, recipe.rank_multiple_of)
    kept = AS_IT_WAS if rank == dense.was else None
    reasons = (kept or multiple, why_factors(target, recipe.layout))
    return replace(
        dense,
        rank=rank,
        relative_error=error,
        loss_increase=loss_increase,
        reason=AND.join(filter(None, reasons)) or None,
    )
