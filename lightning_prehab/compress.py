"""Compression without a Trainer: the whole way in one call, and its two halves, a plan and its application."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.documents.checks import check_kind
from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import Factorization
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.recipe import RankOverride, Recipe
from lightning_prehab.plan.spectra import Solver
from lightning_prehab.progress import shown
from lightning_prehab.rank_policies import Probe, RankPolicy
from lightning_prehab.refinement.settings import Refinement
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.evaluation import Evaluation
from lightning_prehab.road import apply, operate, survey
from lightning_prehab.sites.process import KnownSite, ProcessSite
from lightning_prehab.statistics.sums import LayerStatistics
from lightning_prehab.surgery.factors import cut_targets
from lightning_prehab.surgery.holders import names_holders
from lightning_prehab.surgery.pretrained import check_pretrained
from lightning_prehab.targets.find import Targets, check_model
from lightning_prehab.targets.locate import Target
from lightning_prehab.targets.names import Patterns

_STATISTICS = "a mapping of statistics by name, as collect_statistics returns it"


@names_holders
@outside_inference_mode
def compress_(
    model: nn.Module,
    keep: float | Recipe = 0.5,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    policy: RankPolicy | None = None,
    factorization: Factorization | None = None,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
    split_fused: bool = False,
    layers_at_once: int | None = None,
    layout: Layout = "factors",
    refine: Refinement | bool | int | None = None,
    evaluate: float | Iterable[Any] | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compresses a model in place: targets, statistics, plan, surgery.

    Args:
        model: Any module with linear layers.
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``; without effect if a policy is given. Or a
            whole :class:`~lightning_prehab.Recipe`; those of the other arguments that are its fields are then left out.
        batches: Calibration batches; see :func:`~lightning_prehab.collect_statistics`. Some thousand tokens are enough.
        loss: ``(model, batch) -> scalar``, for output gradients; without it the output's ``.loss`` or labels sampled
            from the model's logits serve.
        policy: Rank policy; None means one global budget for KroneckerSVD and a uniform ratio for the other methods.
        factorization: None means ``KroneckerSVD()`` with batches and ``SVD()`` without.
        target_modules: Names or patterns of the layers to take; None takes all that can be cut, but for projections to
            a vocabulary, see :func:`~lightning_prehab.find_targets`.
        exclude_modules: Names or patterns of the layers to leave.
        optimizers: Optimizers that hold the weights; edited in place.
        rank_overrides: ``{pattern: rank}``: an int is a rank, a float a share of the layer's parameters, ``"dense"``
            keeps the layer.
        rank_multiple_of: Ranks are multiples of this; multiples of 8 to 32 may run faster, on GPUs above all: measure.
        split_fused: Cut the parts of fused projections (queries, keys and values; gate and up) each for itself; else
            they are one matrix.
        layers_at_once: Keep the statistics of so many layers in memory at a time, and run over the batches once for
            each such block: for models whose Gram matrices do not fit. Of a layer that is done its factors up to the
            largest rank that saves parameters stay, at most as large as the weight (as two weights for
            ``layout="pivot"``). None keeps all, in one pass.
        layout: How a matrix of rank ``r`` is stored: ``"factors"``, two factors, or ``"pivot"``, in ``r`` times ``r``
            fewer numbers; see :class:`~lightning_prehab.Recipe`.
        refine: Train the cut model right after the cut, without labels, to answer as the dense one did, on ``batches``:
            True, a number of steps, or a :class:`~lightning_prehab.Refinement`. It is given more data than statistics
            need with profit; :func:`~lightning_prehab.refine_` does the same afterwards, on other data.
        evaluate: Say in the report what the model is worth before and after: its loss, for language models the
            perplexity, and the accuracy where there are labels. Batches to measure on; or a share of ``batches``, in
            ``(0, 1)``, which is then held back from the calibration (``batches`` are kept in memory for that). None
            measures nothing. See :class:`~lightning_prehab.report.evaluation.Evaluation`.
        progress: Show on standard error what is being done, if it takes more than a second or two: bars on a terminal,
            lines elsewhere; see :func:`~lightning_prehab.progress.shown`.

    Returns:
        The report; print it.

    Raises:
        PrehabError: If something is wrong; the model is then as it was.

    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> report = compress_(model, keep=0.5, batches=[torch.randn(128, 32)])
    >>> report.keep <= 0.5, type(model[0]).__name__
    (True, 'LowRankLinear')
    """
    recipe = Recipe.of(
        keep,
        policy=policy,
        factorization=factorization,
        layout=layout,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        rank_overrides=rank_overrides,
        rank_multiple_of=rank_multiple_of,
        split_fused=split_fused,
    )
    if isinstance(batches, Iterator) and recipe.policy_or_default.needs_probes:
        batches = list(batches)  # another pass is needed
    refinement = Refinement.of(refine)
    site = ProcessSite(model, batches, loss, optimizers, layers_at_once=layers_at_once, evaluate=evaluate)
    with shown(progress):
        return operate(recipe, site, refinement)


@outside_inference_mode
def make_plan(
    targets: Mapping[str, Target],
    policy_or_keep: RankPolicy | float | Recipe,
    factorization: Factorization | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    rank_overrides: Mapping[str, RankOverride] | None = None,
    rank_multiple_of: int = 1,
    *,
    probes: Mapping[str, Probe] | None = None,
    layout: Layout = "factors",
) -> CompressionPlan:
    """Decides the rank of each target. The model is not changed.

    Args:
        targets: ``{name: layer}``, as from :func:`~lightning_prehab.find_targets`.
        policy_or_keep: A rank policy, or the share of the targets' parameters to keep, in ``(0, 1]``, or a whole
            :class:`~lightning_prehab.Recipe` (its names and ``split_fused`` are for ``find_targets``, and do not count
            here). A share means ``ParameterBudget`` if spectra of the factorization are
            comparable between layers, else ``RankRatio``.
        factorization: How the factors will be computed; None means ``KroneckerSVD()``.
        statistics: ``{name: LayerStatistics}`` for factorizations that read them. A target that the calibration did not
            reach is left alone, with the reason.
        rank_overrides: ``{pattern: rank}``: an int is a rank, a float a share of the layer's parameters, ``"dense"``
            keeps the layer. Later patterns win.
        rank_multiple_of: Ranks are multiples of this; layers for which none saves parameters are free.
        probes: ``{name: Probe}`` for policies that read them; see :func:`~lightning_prehab.plan.probes.measure_probes`.
        layout: How a matrix is going to be stored: ``"factors"`` or ``"pivot"``; see :class:`~lightning_prehab.Recipe`.

    Returns:
        The plan; its achieved ``keep`` is never above the asked one.

    Raises:
        ArgumentError: If a value is out of range, or something else than what it should be.
        PlanError: If the wish cannot be met.
        NumericalError: If a weight or a statistic is not finite (the layer is named).
    """
    policy, keep = (policy_or_keep, 0.5) if isinstance(policy_or_keep, RankPolicy) else (None, policy_or_keep)
    recipe = Recipe.of(
        keep,
        policy=policy,
        factorization=factorization,
        rank_overrides=rank_overrides,
        rank_multiple_of=rank_multiple_of,
        layout=layout,
    )
    if isinstance(targets, nn.Module):
        raise ArgumentError("make_plan takes targets, not a model: write make_plan(find_targets(model), ...).")
    check_kind("targets", targets, Mapping, "a mapping of layers by name, as find_targets returns it")
    check_kind("statistics", statistics, Mapping, _STATISTICS, optional=True)
    check_kind("probes", probes, Mapping, "a mapping of probes by name, as measure_probes returns it", optional=True)
    known = targets if isinstance(targets, Targets) else Targets(targets, {}, None)
    found = survey(recipe, KnownSite(known, statistics))
    return found.plan(recipe, probes)


@names_holders
@outside_inference_mode
def apply_plan_(
    model: nn.Module,
    plan: CompressionPlan,
    statistics: Mapping[str, LayerStatistics] | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    layers_at_once: int | None = None,
    batches: Iterable[Any] | None = None,
    refine: Refinement | bool | int | None = None,
    evaluate: Iterable[Any] | Evaluation | None = None,
) -> CompressionReport:
    """Replaces the planned layers by :class:`~lightning_prehab.LowRankLinear`, in place.

    Layers with a sparse part become :class:`~lightning_prehab.LowRankPlusSparseLinear`, those planned in the pivot
    layout :class:`~lightning_prehab.PivotLinear`.

    Args:
        model: The module that the plan was made for.
        plan: From :func:`~lightning_prehab.make_plan`.
        statistics: The same statistics as for the plan, for factorizations that read them.
        optimizers: Optimizers that hold the weights. Each weight is replaced by its factors at the same place of its
            group, first moments are carried over exactly, learning-rate schedulers go on undisturbed. Both moments of
            the values of a sparse part are carried over exactly.
        layers_at_once: Work on so many layers at a time, as in :func:`compress_`; None takes all at once.
        batches: What ``refine`` trains on.
        refine: Train the cut model right after the cut, as in :func:`compress_`.
        evaluate: Batches to say on what the model is worth before and after, as in :func:`compress_`.

    Returns:
        The report. Biases stay the same parameter objects.

    Raises:
        ArgumentError: If an argument is something else.
        PlanError: If the plan does not fit the model.
        NumericalError: If factors are not finite (the layer is named).
        UnsupportedError: If an optimizer cannot be edited, or the model could not be saved afterwards.
        PrehabError: Whatever a factorization raises. The model and the optimizers are then as they were.
    """
    check_model(model)
    check_kind("statistics", statistics, Mapping, _STATISTICS, optional=True)
    targets = cut_targets(model, plan)
    check_pretrained(model, (view_of(target).module for target in targets.values()))
    pivot = any(layer.layout == "pivot" for layer in plan.layers)
    solver = Solver(targets, plan.factorization, statistics, layout="pivot" if pivot else "factors")
    refinement = Refinement.of(refine)
    site = ProcessSite(model, batches, None, optimizers, layers_at_once=layers_at_once, evaluate=evaluate)
    return apply(plan, site, solver, refinement)
