"""How much time is left before the surgery."""

import lightning.pytorch as pl

from lightning_prehab.callbacks._trainer import batches_per_epoch, find_callback
from lightning_prehab.callbacks.compression import CompressionCallback

#: Training batches that statistics are taken from where no CompressionCallback says how many.
CALIBRATION_BATCHES = 64


def end_epoch(trainer: "pl.Trainer", stop_epoch: int | None) -> int | None:
    """The first epoch that prehab has no part in: ``stop_epoch``, the surgery or the end of training; None if open."""
    compression = find_callback(trainer, CompressionCallback)
    ends = [stop_epoch, None if compression is None else compression.epoch]
    ends.append(None if trainer.max_epochs == -1 else trainer.max_epochs)
    return min((end for end in ends if end is not None), default=None)


def remaining_batches(trainer: "pl.Trainer", stop_epoch: int | None, batch_idx: int) -> int | None:
    """Batches after this one until then, or None if that cannot be known."""
    length, end = batches_per_epoch(trainer), end_epoch(trainer, stop_epoch)
    if length is None or end is None:
        return None
    return (end - trainer.current_epoch) * length - batch_idx - 1


def batches_to_watch(trainer: "pl.Trainer", start_epoch: int, stop_epoch: int | None, at_most: int | None) -> int:
    """Batches to take statistics from, at most half of all that prehab has: as many as the surgery wants, or fewer."""
    compression = find_callback(trainer, CompressionCallback)
    wanted = CALIBRATION_BATCHES if compression is None else compression.calibration_batches
    if at_most is not None:
        wanted = max(min(wanted, at_most), 1)
    length, end = batches_per_epoch(trainer), end_epoch(trainer, stop_epoch)
    if length is None or end is None:
        return wanted
    return min(wanted, max((end - start_epoch) * length // 2, 1))
