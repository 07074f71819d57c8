"""Refines a cut model: the whole way, from what is wished for to what came of it."""

import logging
import math
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_prehab.errors import ArgumentError, StatisticsError, TargetError
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.progress import shown
from lightning_prehab.refinement.attempt import at_work, attempt
from lightning_prehab.refinement.block_scope import refine_blocks_
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.course import NOT_FINITE, Outcome
from lightning_prehab.refinement.exam import Exam
from lightning_prehab.refinement.memory import bytes_to_train, free_memory, weights_in
from lightning_prehab.refinement.model_scope import refine_model_
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.refinement.sequences import Sequences, first_row
from lightning_prehab.refinement.settings import Refinement, Scope
from lightning_prehab.refinement.teacher import in_half
from lightning_prehab.refinement.trained import is_short, parameters_to_train
from lightning_prehab.report.refined import RefinementReport
from lightning_prehab.targets.shards import check_not_in_shards

_log = logging.getLogger("lightning_prehab.refinement")
#: Share of the free memory that gradients and optimizer states may take.
ROOM = 0.7


@outside_inference_mode
def refine_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    refinement: Refinement | bool | int | None = None,
    *,
    progress: bool = True,
) -> RefinementReport:
    """Trains a cut model, in place and without labels, to answer as the dense one does.

    ``compress_(..., refine=True)`` does the same right after the cut, with the batches of the calibration. More data
    than statistics need is worth it here: up to what the steps take.

    Args:
        model: With low-rank layers. Their factors, and all norms and biases, are trained; modes, gradients,
            ``requires_grad``, hooks, buffers and random numbers are afterwards as they were.
        teacher: The dense model, as it was before the cut. It is not changed.
        batches: As for :func:`~lightning_prehab.collect_statistics`; labels are not needed. A part of them is held back
            to measure on. ``attention_mask`` leaves padding out.
        refinement: Settings, or a number of steps; None means ``Refinement()``.
        progress: Show on standard error what is being done; see :func:`~lightning_prehab.progress.shown`.

    Returns:
        What came of it. The model is never worse than before on the rows that were held back: what is not measured to
        be better is undone.

    Raises:
        ArgumentError: If something cannot be used; the model is then as it was.
        StatisticsError: If the answers of both do not fit together.
        UnsupportedError: If a low-rank layer is quantized, or the blocks of the model cannot be refined one by one.

    >>> import lightning_prehab as lp
    >>> dense, model = (nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2))
    >>> _ = model.load_state_dict(dense.state_dict())
    >>> batches = [torch.randn(64, 24) for _ in range(8)]
    >>> _ = lp.compress_(model, 0.5, batches)
    >>> found = refine_(model, dense, batches, 20)
    >>> found.after < found.before, found.steps
    (True, 20)
    """
    wish = Refinement.of(True if refinement is None else refinement)
    if wish is None:
        raise ArgumentError("refinement is False; leave refine_ out, or give settings.")
    check_models(model, teacher)
    with shown(progress):
        return refine_with_(model, teacher, Sequences(batches, wish), wish)


def check_models(model: nn.Module, teacher: nn.Module) -> None:
    """Raises :class:`ArgumentError` unless one can learn from the other."""
    for name, found in (("model", model), ("teacher", teacher)):
        if not isinstance(found, nn.Module):
            raise ArgumentError(f"{name} must be an nn.Module, got {type(found).__name__}.")
        check_not_in_shards(found, "refine_")
    if not any(isinstance(one, LowRankLayer) for one in model.modules()):
        raise ArgumentError(f"{type(model).__name__} has no low-rank layers; compress it first.")
    theirs = set(map(_place_of, teacher.parameters()))
    if any(_place_of(one) in theirs for one in [*parameters_to_train(model), *filter(is_short, model.parameters())]):
        raise ArgumentError(
            "The teacher shares weights with the model that are going to be trained; give a copy of the dense model, "
            "made before the cut: copy.deepcopy(model)."
        )


def _place_of(parameter: nn.Parameter) -> int:
    """Where its numbers lie, or what it is where that is not to be known: parameters of two models may share memory."""
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.device.type != "meta"
    return parameter.data_ptr() if plain and parameter.numel() > 0 else id(parameter)


def check_answers(model: nn.Module, sequences: Sequences, refinement: Refinement) -> None:
    """Raises, before a cut, what a refinement after it would stumble on: asks the dense model for one answer."""
    if refinement.scope == "blocks" or refinement.checkpointing:
        find_blocks(model)
    parameters_to_train(model)
    pair = Pair(model, model, in_half(refinement, next(model.parameters()).device), refinement.measure)
    whole = sequences.held_back[0]
    with at_work(pair), torch.no_grad():
        try:
            try:
                pair.right(first_row(whole))
            except ArgumentError:  # it may take whole batches alone
                pair.right(whole)
        except (ArgumentError, StatisticsError) as error:
            raise type(error)(
                "refine calls the model on the batches alone, without loss=, and compares what it returns. "
                f"{error} Or leave refine out."
            ) from error


def refine_with_(
    model: nn.Module, teacher: nn.Module, sequences: Sequences, refinement: Refinement
) -> RefinementReport:
    """Refines a model, both of them checked."""
    began = time.perf_counter()
    parameters = parameters_to_train(model)
    device = parameters[0].device
    scope = refinement.scope or fitting_scope(model, parameters)
    _log.info(
        "Refinement of %s numbers, scope %s: %.1f MB for gradients, moments, the best state, %.1f MB of the teacher.",
        *(f"{sum(one.numel() for one in parameters):,}", scope),
        *(size / 1e6 for size in (_bytes_of(scope, model, parameters), weights_in(teacher))),
    )
    pair = Pair(model, teacher, in_half(refinement, device), refinement.measure)
    exam = Exam(pair, sequences.held_back)
    try:
        found = attempt(
            pair,
            parameters,
            lambda: _refine_in(scope, pair, sequences, exam, refinement),
            exam.distance,
        )
    except Exception:
        raise
    except BaseException:
        pair.stand_ins.pack_()
        warnings.warn(
            "Interrupted while the model was refined: it is in the best state that was measured so far.", stacklevel=2
        )
        raise
    return RefinementReport(
        scope,
        pair.measure or "squared",
        found.before,
        found.after,
        found.steps,
        time.perf_counter() - began,
        found.kept,
        sequences.data,
        found.stopped,
    )


def fitting_scope(model: nn.Module, parameters: list[nn.Parameter]) -> Scope:
    """``"model"``, unless that would not fit into memory and there are blocks."""
    free = free_memory(parameters[0].device)
    if free is None or bytes_to_train(parameters) <= ROOM * free:
        return "model"
    try:
        find_blocks(model)
    except TargetError:
        return "model"
    return "blocks"


def _bytes_of(scope: Scope, model: nn.Module, parameters: list[nn.Parameter]) -> int:
    """What the training needs beside weights and activations."""
    if scope == "model":
        return bytes_to_train(parameters)
    return max(bytes_to_train(parameters_to_train(block)) for _, block in find_blocks(model))


def _refine_in(scope: Scope, pair: Pair, sequences: Sequences, exam: Exam, refinement: Refinement) -> Outcome:
    if scope == "model":
        return refine_model_(pair, sequences, exam, refinement)
    before = exam.distance()
    if not math.isfinite(before):
        return Outcome(before, before, 0, False, NOT_FINITE)
    outcomes = refine_blocks_(pair, sequences, refinement)
    after = exam.distance()
    return Outcome(before, after, sum(one.steps for one in outcomes), after < before, None)
