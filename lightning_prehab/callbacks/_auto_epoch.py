"""When a surgery comes that waits for a forecast (``epoch="auto"``)."""

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


def is_forecast_below(trainer: "pl.Trainer", limit: float, batch_idx: int, calibration_batches: int) -> bool:
    """Whether the cut counts as free, asked right before its statistics have to be collected."""
    length = batches_per_epoch(trainer)
    if length is None or batch_idx != max(length - calibration_batches, 0):
        return False
    forecasts = [getattr(other, "forecast", None) for other in callbacks_of(trainer)]
    return any(forecast is not None and forecast < limit for forecast in forecasts)
