"""What a change of the weights would do to the loss of the running training: tried on a copy, on real batches."""

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_prehab.callbacks._distributed import data_ranks, gather, together
from lightning_prehab.callbacks._own_pass import first_batches, loss_of, quiet_copy, run_training_step
from lightning_prehab.errors import StatisticsError, UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.progress import ends_the_work, tell
from lightning_prehab.statistics.collector import unseen
from lightning_prehab.statistics.effect import Change, LossesAt, measure_increase, moved
from lightning_prehab.statistics.kept import MOST_BATCHES
from lightning_prehab.surgery.factors import planned_targets

#: What is said where nothing can be done about it.
NOT_KNOWN = "So what the cut does to the loss is not known beforehand."
_NOT_FINITE = "training_step returned a loss that is not finite."


class Trial:
    """A copy of the module in eval mode, that logs nothing, and runs ``training_step`` with moved weights.

    Every run starts with the same buffers, and the same numbers in the attributes of the copy. What ``training_step``
    reaches through the Trainer is as it was afterwards: settings of the parameter groups; ``log_metrics`` of its
    loggers does nothing meanwhile.

    Raises:
        UnsupportedError: With manual optimization, or if the module cannot be copied.
    """

    #: Gradients are not wanted, but a training_step may compute some of its own for its loss.
    grad_mode: type[torch.enable_grad] | type[torch.no_grad] = torch.enable_grad

    def __init__(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", instead: str = NOT_KNOWN) -> None:
        self._trainer = trainer
        self.module = quiet_copy(trainer, pl_module, instead)
        self._buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        self._plain = {key: value for key, value in vars(self.module).items() if isinstance(value, int | float | str)}

    def first_batches(self, skip: int = 0) -> list[tuple[Any, int]]:
        """Those that an epoch begins with, from an iterator of our own; after ``skip`` of them, if any come then."""
        with isolate_rng():
            found = first_batches(self._trainer, self.module, skip + MOST_BATCHES)
            numbered = deque(zip(found, itertools.count(), strict=False), MOST_BATCHES)
        return [one for one in numbered if one[1] >= skip] or list(numbered)

    def changes(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> Sequence[Any]:
        """What turns the weights of the copy into the products of the factors; every process asks."""

        def changes_of() -> list[Change]:
            targets = planned_targets(self.module, plan)
            return [Change.by_cut(view_of(targets[name]), found) for name, found in factors.items()]

        return together(self._trainer, changes_of)

    def moved(self, changes: Sequence[Any], step: float) -> AbstractContextManager[None]:
        """Inside, the weights of the copy are moved by ``step`` times the changes."""
        return moved(changes, step)

    def loss(self, batch: Any, batch_idx: int, changes: Sequence[Any], step: float) -> float:
        """That of a batch, with the weights moved by ``step`` times the changes; in the state of randomness of now.

        NaN if ``training_step`` skips the batch.
        """
        vars(self.module).update(self._plain)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        with isolate_rng(), unseen(), _trainer_as_it_is(self._trainer), self.moved(changes, step), self.grad_mode():
            loss = loss_of(run_training_step(self._trainer, self.module, copy.deepcopy(batch), batch_idx))
        if loss is None:
            return math.nan
        if not bool(torch.isfinite(loss)):
            raise StatisticsError(_NOT_FINITE)
        return float(loss.detach())


def _log_nothing(*_args: Any, **_settings: Any) -> None:
    """Stands in for ``log_metrics`` of a logger."""


@contextmanager
def _trainer_as_it_is(trainer: "pl.Trainer") -> Iterator[None]:
    """Loggers that log nothing inside; settings of the optimizers as they are now outside."""
    loggers = [(logger, vars(logger).get("log_metrics")) for logger in trainer.loggers]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        for logger, _ in loggers:
            vars(logger)["log_metrics"] = _log_nothing
        yield
    finally:
        for logger, own in loggers:
            del vars(logger)["log_metrics"]
            if own is not None:
                vars(logger)["log_metrics"] = own
        for group, before in zip(groups, settings, strict=True):
            group.update(before)


def where_possible(work: Callable[[], float]) -> float | None:
    """What ``work`` measures, or None, with a warning, where it cannot: a run does not end for that."""
    try:
        return work()
    except Exception as error:  # training_step is anybody's code
        if ends_the_work(error):
            raise
        tell("try", 0, 0)
        if isinstance(error, UnsupportedError):
            rank_zero_info(str(error))
            return None
        rank_zero_warn(f"What the cut does to the loss could not be measured ({type(error).__name__}: {error}).")
    return None


class CutsInTraining:
    """What planned cuts add to the loss that ``training_step`` returns, over the batches of all processes.

    Args:
        trainer: The running Trainer.
        trial: Runs ``training_step``.
        kept: Training batches of this process, with their numbers; without any, those that an epoch begins with are
            taken.
        skip: Leave out so many of those, if that leaves some.

    Raises:
        StatisticsError: If there are no batches.
    """

    def __init__(
        self, trainer: "pl.Trainer", trial: Trial, kept: Sequence[tuple[Any, int]] = (), skip: int = 0
    ) -> None:
        def find() -> Sequence[tuple[Any, int]]:
            batches = kept or trial.first_batches(skip)
            if not batches:
                raise StatisticsError("The training data has no batches.")
            return batches

        self._trainer, self._trial = trainer, trial
        self._own = together(trainer, find)
        self._count = min(gather(trainer, len(self._own)))
        self._seen: dict[Hashable, dict[tuple[int, float], list[float]]] = {}

    def increase(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float:
        """Clear of its own noise; see :func:`~lightning_prehab.statistics.effect.measure_increase`.

        Raises:
            StatisticsError: If no batch has a loss.
        """
        return measure_increase(self._losses_at(plan, factors), self._count)

    def mean_change(self, plan: CompressionPlan, factors: Mapping[str, Factors]) -> float:
        """The mean over all batches as it is, to compare cuts by: it may be below zero; infinite for NaN.

        Raises:
            StatisticsError: If no batch has a loss.
        """
        losses_at = self._losses_at(plan, factors, finite=False)
        before, after = ([loss for number in range(self._count) for loss in losses_at(number, step)] for step in (0, 1))
        changes = [new - old for old, new in zip(before, after, strict=True) if not math.isnan(old)]
        if not changes:
            raise StatisticsError("No batch has a loss.")
        return math.fsum(changes) / len(changes)

    def _losses_at(self, plan: CompressionPlan, factors: Mapping[str, Factors], *, finite: bool = True) -> LossesAt:
        """Each loss is computed once, those of the dense model for all plans."""
        trainer, trial = self._trainer, self._trial
        alike = trainer.world_size // data_ranks(trainer)[1]  # processes, side by side, that see the same data

        changes = trial.changes(plan, factors)

        def own_loss(number: int, step: float) -> float:
            try:
                return trial.loss(*self._own[number], changes, step)
            except StatisticsError:
                if finite or not step:
                    raise
                return math.inf

        def losses_at(number: int, step: float) -> list[float]:
            seen = self._seen.setdefault(plan.cuts if step else (), {})
            if (number, step) not in seen:
                seen[number, step] = gather(trainer, together(trainer, lambda: own_loss(number, step)))[::alike]
            if finite and math.inf in seen[number, step]:
                raise StatisticsError(_NOT_FINITE)
            return seen[number, step]

        return losses_at
