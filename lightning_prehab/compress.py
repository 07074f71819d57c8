"""The whole way in one call, for people without a Trainer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.calibration import collect_statistics
from lightning_prehab.factorizations import SVD, Factorization, KroneckerSVD
from lightning_prehab.planning import check_method, make_plan
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.report import CompressionReport
from lightning_prehab.surgery import apply_plan_
from lightning_prehab.targets import Patterns, find_targets


def compress_(
    model: nn.Module,
    keep: float = 0.5,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    policy: RankPolicy | None = None,
    factorization: Factorization | None = None,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> CompressionReport:
    """Compresses a model in place: targets, statistics, plan, surgery.

    Args:
        model: Any module with linear layers.
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``; ignored if a policy is given.
        batches: Calibration batches; see :func:`~lightning_prehab.collect_statistics`. Some thousand tokens are enough.
        loss: ``(model, batch) -> scalar``, for output gradients; without it the output's ``.loss`` or labels sampled
            from the model's logits serve.
        policy: Rank policy; None means one global budget for KroneckerSVD and a uniform ratio for the other methods.
        factorization: None means ``KroneckerSVD()`` with batches and ``SVD()`` without.
        target_modules: Names or patterns of the layers to take; None takes all that can be cut.
        exclude_modules: Names or patterns of the layers to leave.
        optimizers: Optimizers that hold the weights; edited in place.

    Returns:
        The report; print it.

    Raises:
        PrehabError: If something is wrong; the model is then as it was.

    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> report = compress_(model, keep=0.5, batches=[torch.randn(64, 32)])
    >>> report.keep <= 0.5, type(model[0]).__name__
    (True, 'LowRankLinear')
    """
    check_method(factorization, policy)
    targets = find_targets(model, target_modules, exclude_modules)
    if factorization is None:
        factorization = SVD() if batches is None else KroneckerSVD()
    statistics = None
    if batches is not None and factorization.needs_statistics:
        statistics = collect_statistics(model, targets, batches, forward=loss, gradients=factorization.needs_gradients)
    plan = make_plan(targets, keep if policy is None else policy, factorization, statistics)
    return apply_plan_(model, plan, statistics, optimizers)
