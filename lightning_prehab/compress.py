"""The whole way in one call, for people without a Trainer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.calibration import collect_statistics
from lightning_prehab.errors import ArgumentError
from lightning_prehab.factorizations import SVD, Decomposition, Factorization, KroneckerSVD
from lightning_prehab.forms import in_chosen_forms
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg import break_even_rank
from lightning_prehab.planning import (
    check_method,
    check_wish,
    choose_forms,
    default_policy,
    plan_ranks,
    require_targets,
    usable_targets,
    wanted_statistics,
)
from lightning_prehab.probes import measure_probes
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.report import CompressionReport
from lightning_prehab.spectra import Spectrum, decompose_targets, spectrum
from lightning_prehab.surgery import compute_factors, swap_
from lightning_prehab.targets import Patterns, Targets, find_targets


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
    *,
    layers_at_once: int | None = None,
    split_fused: bool = False,
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
        target_modules: Names or patterns of the layers to take; None takes all that can be cut, but for projections to
            a vocabulary, see :func:`~lightning_prehab.find_targets`.
        exclude_modules: Names or patterns of the layers to leave.
        optimizers: Optimizers that hold the weights; edited in place.
        layers_at_once: Keep the statistics of so many layers in memory at a time, and run over the batches once for
            each such block: for models whose Gram matrices do not fit. Of a layer that is done its factors up to the
            break-even rank stay, at most as large as the weight. None keeps all, in one pass.
        split_fused: Cut the parts of fused projections (queries, keys and values; gate and up) each for itself; else
            they are one matrix.

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
    if layers_at_once is not None and (not isinstance(layers_at_once, int) or layers_at_once < 1):
        raise ArgumentError(f"layers_at_once must be at least 1, got {layers_at_once!r}.")
    targets = find_targets(model, target_modules, exclude_modules, split_fused=split_fused)
    if factorization is None:
        factorization = SVD() if batches is None else KroneckerSVD()
    policy = default_policy(keep, factorization) if policy is None else policy
    check_wish(targets, policy, factorization)
    if isinstance(batches, Iterator) and (policy.needs_probes or layers_at_once is not None):
        batches = list(batches)  # several passes are needed

    forms = Targets({}, targets.skipped, targets.model_parameters)
    decompositions: dict[str, Decomposition] = {}
    spectra: dict[str, Spectrum] = {}
    for block in _blocks(targets, layers_at_once):
        statistics = None
        wanted = wanted_statistics(factorization, policy)
        if batches is not None and any(wanted):
            statistics = collect_statistics(model, block, batches, forward=loss, wanted=wanted)
        found = usable_targets(block, policy, factorization, statistics)
        forms.update(found)
        forms.skipped |= found.skipped
        for name, decomposition in decompose_targets(found, factorization, statistics).items():
            decompositions[name] = decomposition
            spectra[name] = spectrum(name, found[name], decomposition, statistics, policy.needs_weight_gradients)
            if layers_at_once is not None and decomposition.compact is not None:
                view = view_of(found[name])
                decomposition.compact(max(break_even_rank(*view.shape, view.group_count), 1))
    require_targets(forms)
    chosen = choose_forms(targets, forms, policy, factorization, spectra)
    usable = in_chosen_forms(forms, chosen)
    decompositions = {name: decompositions[form] for name, form in chosen.items()}
    spectra = {name: spectra[form] for name, form in chosen.items()}

    probes = None
    if policy.needs_probes and batches is not None:
        probes = measure_probes(
            model,
            usable,
            lambda name, rank: decompositions[name].factors(rank),
            batches,
            policy.probe_keep,
            forward=loss,
        )
    plan = plan_ranks(targets, usable, policy, factorization, spectra, probes=probes)
    report = swap_(model, plan, compute_factors(model, plan, decompositions=decompositions), optimizers)
    return report.with_spectra({name: found.singular_values for name, found in spectra.items()})


def _blocks(targets: Targets, size: int | None) -> list[Targets]:
    names = list(targets)
    size = len(names) if size is None else size
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    return [Targets({name: targets[name] for name in chunk}, {}, None) for chunk in chunks]
