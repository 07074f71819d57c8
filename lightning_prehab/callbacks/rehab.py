"""Learning-rate warm-up after the surgery, on top of whatever scheduler the user has."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_prehab.callbacks._checkpoint import check_version
from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._schedules import Shape, warmup_factor
from lightning_prehab.callbacks._steps import StepWatch, are_of_now, check_seen
from lightning_prehab.callbacks._timeline import steps_of_epochs
from lightning_prehab.callbacks._trainer import (
    batches_per_epoch,
    callbacks_of,
    find_callback,
    move_to_front,
    set_callbacks,
)
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.report.compression_report import CompressionReport

#: Of the state in checkpoints.
STATE_VERSION = 1


class RehabSchedule(OnlyOne):
    """Warms the learning rate up after the surgery: effective rate = the user's rate times a factor.

    The factor rises from ``start_factor`` at the first step after the surgery to ``peak_factor`` at the end of the
    warm-up and stays there. It is applied around ``optimizer.step`` alone and undone before any scheduler steps, so the
    user's scheduler runs exactly as without it and checkpoints hold the user's own rate; LearningRateMonitor shows the
    rate that is used. The surgery announces
    itself: there is no epoch number to repeat here.

    Args:
        warmup_steps: Length in optimizer steps.
        warmup_epochs: Length in epochs, may be a fraction; one epoch if neither length is given. They are counted in
            the steps that these epochs are going to have, a GradientAccumulationScheduler included; with manual
            optimization in batches.
        start_factor: Factor at the first step, at least 0.
        peak_factor: Factor from the end of the warm-up on, above 0.
        shape: ``"linear"`` or ``"cosine"``.

    Raises:
        ArgumentError: If a value is out of range, or both lengths are given.
        UnsupportedError: When fit starts, if there is no CompressionCallback, or another RehabSchedule; at the end of
            the first epoch, if parameters move and no step of their optimizer is ever seen.

    Example::

        trainer = L.Trainer(callbacks=[CompressionCallback(epoch=6), RehabSchedule(warmup_steps=200)])
    """

    def __init__(
        self,
        warmup_steps: int | None = None,
        warmup_epochs: float | None = None,
        *,
        start_factor: float = 0.1,
        peak_factor: float = 1.0,
        shape: Shape = "linear",
    ) -> None:
        super().__init__()
        if warmup_steps is not None and warmup_epochs is not None:
            raise ArgumentError("Give warmup_steps or warmup_epochs, not both.")
        check_whole("warmup_steps", warmup_steps, 0, optional=True)
        check_real("warmup_epochs", warmup_epochs, "[0, inf)", optional=True)
        check_real("start_factor", start_factor, "[0, inf)")
        check_real("peak_factor", peak_factor, "(0, inf)")
        if shape not in ("linear", "cosine"):
            raise ArgumentError(f"shape must be 'linear' or 'cosine', got {shape!r}.")
        self.warmup_steps = warmup_steps
        self.warmup_epochs = 1.0 if warmup_steps is None and warmup_epochs is None else warmup_epochs
        self.start_factor = start_factor
        self.peak_factor = peak_factor
        self.shape: Shape = shape
        self._length: int | None = None  # of the warm-up, in steps, once the surgery is done
        self._module: pl.LightningModule | None = None
        self._scaled: list[_ScaledRate] = []
        self._done: list[int] = []

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Looks for the surgery, and moves before LearningRateMonitor."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.refuse_others(trainer, RehabSchedule, "both would scale the same learning rates. Keep one of them.")
        if self._module is not pl_module or not any(isinstance(part, LowRankLayer) for part in pl_module.modules()):
            self._module, self._length, self._done = pl_module, None, []  # nothing has been cut yet
        if find_callback(trainer, CompressionCallback) is None:
            raise UnsupportedError("RehabSchedule warms up after a surgery; add a CompressionCallback to the Trainer.")
        move_to_front(trainer, self)
        others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, _RestoreRates)]
        set_callbacks(trainer, [*others, _RestoreRates(self)])

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Puts the step hooks on the optimizers; they are idle until the surgery."""
        if self.warmup_epochs is not None and batches_per_epoch(trainer) is None:
            raise UnsupportedError("The length of an epoch is not known here; give RehabSchedule(warmup_steps=...).")
        self._follow(trainer)

    def _follow(self, trainer: "pl.Trainer") -> None:
        """Scales the rates of the optimizers of now, which somebody may have made anew."""
        self._remove()
        if len(self._done) != len(trainer.optimizers):
            self._done = [0] * len(trainer.optimizers)
        self._scaled = [_ScaledRate(self, index, optimizer) for index, optimizer in enumerate(trainer.optimizers)]

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: CompressionReport) -> None:
        """Starts the warm-up."""
        if self.warmup_steps is not None:
            self._length = self.warmup_steps
        else:
            assert self.warmup_epochs is not None
            self._length = round(steps_of_epochs(trainer, self.warmup_epochs))
        self._done = [0] * len(trainer.optimizers)
        self._apply()

    def factor(self, optimizer_index: int = 0) -> float:
        """The factor on the learning rate of the next step of an optimizer; 1 before the surgery."""
        if self._length is None:
            return 1.0
        return warmup_factor(self._done[optimizer_index], self._length, self.start_factor, self.peak_factor, self.shape)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Shows LearningRateMonitor the rate that the epoch starts with."""
        self._apply()

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Shows LearningRateMonitor the rate of the step to come."""
        if not are_of_now([scaled.watch for scaled in self._scaled], trainer.optimizers):
            self._follow(trainer)
        for scaled in self._scaled:
            scaled.watch.forget()
        self._apply()

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Applies the factor to a rate that ``training_step`` has set; takes it back where loss scaling may skip."""
        for scaled in self._scaled:
            if scaled.optimizer is optimizer and scaled.watch.in_step:
                scaled.apply()
            elif scaled.optimizer is optimizer:
                scaled.restore()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Hands the user's own rates back, for checkpoints; counts batches where steps cannot be foreseen."""
        self.restore()
        if self._length is not None and self._counts_batches(pl_module):
            self._done = [done + 1 for done in self._done]

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hands the user's own rates back, for checkpoints; no step of an optimizer may have gone unseen."""
        self.restore()
        watches = [scaled.watch for scaled in self._scaled]
        if are_of_now(watches, trainer.optimizers):
            check_seen(watches, self)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off the optimizers."""
        self._remove()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the helper out of the Trainer."""
        set_callbacks(trainer, [c for c in callbacks_of(trainer) if not isinstance(c, _RestoreRates)])

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Hands the user's own rates back and takes the hooks off."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """How far the warm-up has come; plain data only."""
        return {"version": STATE_VERSION, "length": self._length, "done": list(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        self._length, self._done = state_dict["length"], list(state_dict["done"])

    def count_step(self, optimizer_index: int) -> None:
        """Notes that an optimizer has made a step; called by its step hook."""
        assert self._module is not None
        if self._length is not None and not self._counts_batches(self._module):
            self._done[optimizer_index] += 1

    def _counts_batches(self, pl_module: "pl.LightningModule") -> bool:
        """By hand an optimizer may step at every batch or at some: only batches tell how long an epoch is."""
        return self.warmup_epochs is not None and not pl_module.automatic_optimization

    def _apply(self) -> None:
        for scaled in self._scaled:
            scaled.apply()

    def restore(self) -> None:
        """Hands the user's own rates back."""
        for scaled in self._scaled:
            scaled.restore()

    def _remove(self) -> None:
        for scaled in self._scaled:
            scaled.remove()
        self._scaled = []


class _ScaledRate:
    """The learning rates of one optimizer, multiplied while it steps and while other callbacks look."""

    def __init__(self, schedule: RehabSchedule, index: int, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._schedule = schedule
        self._index = index
        self._own: dict[int, tuple[float, float]] = {}  # by group: the user's rate and ours, while ours is in place
        self.watch = StepWatch(optimizer, self._before_step, self._after_step)

    def apply(self) -> None:
        """Multiplies the rates, once; a rate that was changed since is the user's new one and is multiplied anew."""
        factor = self._schedule.factor(self._index)
        if factor == 1.0:
            return
        for slot, group in self._slots():
            rate = float(group["lr"])
            if slot not in self._own or rate != self._own[slot][1]:
                _set_rate(group, rate * factor)
                self._own[slot] = rate, float(group["lr"])

    def restore(self) -> None:
        """Puts the user's rates back, except where the user has set another one in the meantime."""
        for slot, group in self._slots():
            if slot in self._own and float(group["lr"]) == self._own[slot][1]:
                _set_rate(group, self._own[slot][0])
        self._own = {}

    def remove(self) -> None:
        """Puts the user's rates back and takes the hooks off."""
        self.restore()
        self.watch.remove()

    def _slots(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Groups by identity; a rate tensor that several groups share comes once."""
        seen: set[int] = set()
        for group in self.watch.groups():
            if isinstance(group.get("lr"), Tensor):
                if id(group["lr"]) in seen:
                    continue
                seen.add(id(group["lr"]))
            if "lr" in group:
                yield id(group), group

    def _before_step(self, *_: Any) -> None:
        self.apply()

    def _after_step(self, *_: Any) -> None:
        self.restore()
        self._schedule.count_step(self._index)


class _RestoreRates(pl.Callback):
    """Stands last in the Trainer: whatever follows the callbacks (the module's own hooks) sees the user's rates."""

    def __init__(self, schedule: RehabSchedule) -> None:
        self._schedule = schedule

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """After LearningRateMonitor."""
        self._schedule.restore()

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """After LearningRateMonitor."""
        self._schedule.restore()


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
