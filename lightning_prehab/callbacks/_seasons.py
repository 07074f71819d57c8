"""A callback that acts for a time: between two epochs, until a surgery, and again until the next one."""

import math
from typing import Any, ClassVar

import lightning.pytorch as pl

from lightning_prehab.callbacks._at_steps import ActsAtSteps
from lightning_prehab.callbacks._timeline import remaining_batches
from lightning_prehab.callbacks._trainer import find_callback
from lightning_prehab.callbacks.compression import CompressionCallback


class ActsInSeason(ActsAtSteps):
    """Knows when its time is, and begins anew after a surgery that is not the last one.

    Attributes:
        start_epoch: First epoch of its time.
        stop_epoch: First epoch after it, or None.
        goes_on: Whether it acts between two surgeries, too.
    """

    start_epoch: int
    stop_epoch: int | None
    goes_on: ClassVar[bool] = True

    def _in_season(self, trainer: "pl.Trainer") -> bool:
        return self.start_epoch <= trainer.current_epoch < (math.inf if self.stop_epoch is None else self.stop_epoch)

    def _remaining(self, trainer: "pl.Trainer", batch_idx: int) -> int | None:
        return remaining_batches(trainer, self.stop_epoch, batch_idx)

    def _is_over(self, trainer: "pl.Trainer") -> bool:
        """Whether no surgery is to come that it has to prepare for, where there is somebody who makes them."""
        compression = find_callback(trainer, CompressionCallback)
        return compression is not None and (compression.done or (compression.report is not None and not self.goes_on))

    def _go_on(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: Any) -> None:
        """After a surgery: begins anew, if another one is to come."""
        if report is not None and not self._is_over(trainer):
            self._begin_count()
            self._look(trainer, pl_module)
            self._watch_steps(trainer, pl_module)

    def _begin_count(self) -> None:
        """All that is counted is counted from here."""

    def _look(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Finds out what to act on."""
