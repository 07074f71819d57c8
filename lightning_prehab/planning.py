"""Decides what will happen to each layer; nothing is changed here."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError, PlanError, PrehabError
from lightning_prehab.factorizations import Factorization, KroneckerSVD
from lightning_prehab.linalg import break_even_rank
from lightning_prehab.plan import CompressionPlan, LayerPlan
from lightning_prehab.rank_policies import LayerChoices, ParameterBudget, RankPolicy, RankRatio
from lightning_prehab.rank_policies.base import parameter_budget
from lightning_prehab.statistics import LayerStatistics
from lightning_prehab.targets import Targets, match_names

#: For a layer: a rank (int), a share of its parameters (float), or "dense".
RankOverride = int | float | str


def default_policy(keep: float, factorization: Factorization) -> RankPolicy:
    """One budget for all layers if spectra are comparable between layers, the same ratio in each if not."""
    return ParameterBudget(keep) if factorization.comparable else RankRatio(keep)


def make_plan(
    targets: Mapping[str, nn.Linear],
    policy_or_keep: RankPolicy | float,
    factorization: Factorization | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
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

    Returns:
        The plan; its achieved ``keep`` is never above the asked one.

    Raises:
        ArgumentError: If a value is out of range.
        PlanError: If the wish cannot be met.
        NumericalError: If a weight or a statistic is not finite (the layer is named).
    """
    if factorization is None:
        factorization = KroneckerSVD()
    check_method(factorization, None)
    policy = policy_or_keep if isinstance(policy_or_keep, RankPolicy) else default_policy(policy_or_keep, factorization)
    if rank_multiple_of < 1:
        raise ArgumentError(f"rank_multiple_of must be at least 1, got {rank_multiple_of}.")
    if factorization.needs_statistics and statistics is None:
        raise PlanError(f"{factorization} needs calibration statistics; pass batches, or choose SVD().")

    skipped = dict(targets.skipped) if isinstance(targets, Targets) else {}
    usable = dict(targets)
    if factorization.needs_statistics:
        for name in targets:
            reason = _unusable(name, statistics, factorization)
            if reason is not None:
                skipped[name] = reason
                del usable[name]
    if not usable:
        raise PlanError(f"No target can be cut: {'; '.join(f'{name}: {why}' for name, why in skipped.items())}.")

    overrides = _resolve_overrides(rank_overrides or {}, targets)
    choices = []
    for name, layer in usable.items():
        spectrum = _spectrum(name, layer, factorization, statistics)
        choices.append(_choices(name, layer, spectrum, factorization, overrides.get(name), rank_multiple_of))
    ranks = policy(choices)
    layers = tuple(_layer_plan(layer, ranks[layer.name], overrides.get(layer.name)) for layer in choices)
    plan = CompressionPlan(layers, factorization, skipped, getattr(targets, "model_parameters", None))
    _require_budget(policy, choices, plan.parameters)
    return plan


def check_wish(
    targets: Mapping[str, nn.Linear],
    policy: RankPolicy,
    factorization: Factorization,
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
) -> None:
    """Raises what :func:`make_plan` would raise whatever the weights are: wrong overrides, too small a budget."""
    overrides = _resolve_overrides(rank_overrides or {}, targets)
    choices = []
    for name, layer in targets.items():
        flat = torch.ones(min(layer.out_features, layer.in_features), dtype=torch.float64)
        choices.append(_choices(name, layer, flat, factorization, overrides.get(name), rank_multiple_of))
    ranks = policy(choices)
    _require_budget(policy, choices, sum(layer.parameters(ranks[layer.name]) for layer in choices))


def _require_budget(policy: RankPolicy, choices: Sequence[LayerChoices], parameters: int) -> None:
    """Raises :class:`PlanError` if a policy that promises to keep a share has chosen more."""
    keep = getattr(policy, "keep", None)
    if isinstance(keep, int | float) and parameters > parameter_budget(choices, keep):
        dense = sum(layer.parameters(None) for layer in choices)
        raise PlanError(
            f"The asked keep of {keep} cannot be met: the smallest choice holds {parameters:,} of {dense:,} parameters "
            f"(keep {parameters / dense:.4f}). Raise keep, lower rank_multiple_of or the overridden ranks, or exclude "
            "small layers with exclude_modules. (RankRatio takes nothing from other layers for what an override adds; "
            "ParameterBudget does.)"
        )


def check_method(factorization: object, policy: object) -> None:
    """Raises :class:`ArgumentError` for a class in place of an instance, or for something else altogether."""
    for value, kind in ((factorization, Factorization), (policy, RankPolicy)):
        if value is not None and not isinstance(value, kind):
            hint = f"; write {value.__name__}(...)" if isinstance(value, type) else ""
            raise ArgumentError(f"Expected a {kind.__name__}, got {value!r}{hint}.")


def _unusable(name: str, statistics: Mapping[str, LayerStatistics] | None, factorization: Factorization) -> str | None:
    if statistics is None or name not in statistics:
        return "no statistics were collected for it"
    return statistics[name].missing(gradients=factorization.needs_gradients)


def _spectrum(
    name: str, layer: nn.Linear, factorization: Factorization, statistics: Mapping[str, LayerStatistics] | None
) -> Tensor:
    """The spectrum of one layer; errors name it."""
    try:
        return factorization.spectrum(layer.weight, statistics[name] if statistics and name in statistics else None)
    except PrehabError as error:
        raise type(error)(f"Layer {name!r} ({layer.out_features}x{layer.in_features}): {error}") from error


def _choices(
    name: str,
    layer: nn.Linear,
    spectrum: Tensor,
    factorization: Factorization,
    override: int | str | None,
    multiple: int,
) -> LayerChoices:
    """What a rank policy may choose from for one layer."""
    m, n = layer.out_features, layer.in_features
    new_bias = m if factorization.adds_bias and layer._parameters["bias"] is None else 0
    if override == "dense":
        ranks: tuple[int, ...] = ()
    elif isinstance(override, int):
        ranks = (override,)
    else:
        limit = max(m * n - new_bias - 1, 0) // (m + n)  # the break-even rank, with the new bias counted
        ranks = tuple(range(multiple, limit + 1, multiple)) or tuple(range(1, limit + 1))
    dense = override is None or override == "dense"
    return LayerChoices(name, m, n, spectrum.detach().to("cpu", torch.float64), ranks, dense, new_bias)


def _layer_plan(layer: LayerChoices, rank: int | None, override: int | str | None) -> LayerPlan:
    reason = None
    if rank is None:
        reason = "rank_overrides" if override == "dense" else "every rank below break-even costs more than it saves"
    retained = layer.retained()
    dropped = 0.0 if rank is None else float((1.0 - retained[rank] / retained[-1].clamp_min(1e-300)).clamp(0.0, 1.0))
    return LayerPlan(
        layer.name,
        layer.out_features,
        layer.in_features,
        rank,
        dropped**0.5,
        reason,
        0 if rank is None else layer.new_bias,
    )


def _resolve_overrides(overrides: Mapping[str, RankOverride], targets: Mapping[str, nn.Linear]) -> dict[str, int | str]:
    """A rank or "dense" for each layer that a pattern names."""
    resolved: dict[str, int | str] = {}
    for pattern, wish in overrides.items():
        for name in match_names(pattern, list(targets), "rank_overrides"):
            resolved[name] = _resolve_override(name, wish, targets[name])
    return resolved


def _resolve_override(name: str, wish: RankOverride, layer: nn.Linear) -> int | str:
    m, n = layer.out_features, layer.in_features
    limit = break_even_rank(m, n)
    if wish == "dense":
        return "dense"
    if isinstance(wish, float) and 0.0 < wish < 1.0:
        wish = max(int(wish * m * n / (m + n)), 1)
    if isinstance(wish, bool) or not isinstance(wish, int) or not 1 <= wish <= limit:
        raise ArgumentError(
            f"rank_overrides: {wish!r} does not suit layer {name!r} ({m}x{n}); give a rank from 1 to {limit} "
            "(break-even), a share in (0, 1), or 'dense'."
        )
    return wish
