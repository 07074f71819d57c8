"""When a surgery comes that waits for a forecast (``epoch="auto"``)."""

from typing import Any

import lightning.pytorch as pl

from lightning_prehab.callbacks._trainer import batches_per_epoch, callbacks_of
from lightning_prehab.errors import ArgumentError


def last_possible_epoch(trainer: "pl.Trainer", compression: pl.Callback) -> int:
    """The last one, if there is one and a callback forecasts.

    Raises:
        ArgumentError: Otherwise.
    """
    asked = [getattr(other, "forecasts", None) for other in callbacks_of(trainer)]
    if not any(callable(forecasts) and forecasts(compression) for forecasts in asked):
        raise ArgumentError(
            "CompressionCallback(epoch='auto') waits for a forecast of what the cut will cost: add "
            "PrehabCallback(..., space='loss') with forecast_every_n_steps above 0, or give an epoch."
        )
    if not trainer.lightning_module.automatic_optimization:
        raise ArgumentError(
            "CompressionCallback(epoch='auto') waits for a forecast, and with manual optimization none can be made: "
            "training_step cannot be run apart from training. Give an epoch."
        )
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise ArgumentError("CompressionCallback(epoch='auto') needs max_epochs: the cut comes before the last one.")
    return trainer.max_epochs - 1


def check_reachable(trainer: "pl.Trainer", epoch: int) -> None:
    """Raises :class:`ArgumentError` for a surgery that never comes, as far as the Trainer knows."""
    limit = None if getattr(trainer, "fast_dev_run", False) else trainer.max_epochs
    if limit is not None and limit != -1 and epoch >= limit:
        raise ArgumentError(
            f"CompressionCallback(epoch={epoch}) is never reached: epochs count from 0 and max_epochs is "
            f"{limit}. Choose an epoch from 0 to {limit - 1}, or max_epochs={epoch + 1} or more."
        )


def is_due(trainer: "pl.Trainer", batch_idx: int, calibration_batches: int) -> bool:
    """Whether this is the batch to decide at: the first whose statistics would be collected."""
    length = batches_per_epoch(trainer)
    return length is not None and batch_idx == max(length - calibration_batches, 0)


def counts_as_free(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", limit: float, batch: Any, batch_idx: int
) -> bool:
    """Whether a forecast is below a limit, and still is when the cut has been tried with the weights of now."""
    for other in callbacks_of(trainer):
        if not _is_below(other, limit):
            continue
        renew = getattr(other, "renew_forecast", None)
        if callable(renew):
            renew(trainer, pl_module, batch, batch_idx)
        if _is_below(other, limit):
            return True
    return False


def _is_below(callback: pl.Callback, limit: float) -> bool:
    forecast = getattr(callback, "forecast", None)
    return forecast is not None and forecast < limit
