"""How much time is left before the surgery, and how many steps come after it."""

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_prehab.callbacks._trainer import batches_per_epoch, find_callback
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.errors import ArgumentError

#: Training batches that statistics are taken from where no CompressionCallback says how many.
CALIBRATION_BATCHES = 64


def end_epoch(trainer: "pl.Trainer", stop_epoch: int | None) -> int | None:
    """The first epoch that prehab has no part in: ``stop_epoch``, the surgery or the end of training; None if open."""
    compression = find_callback(trainer, CompressionCallback)
    ends = [stop_epoch, None if compression is None else compression.epoch]
    ends.append(None if trainer.max_epochs == -1 else trainer.max_epochs)
    return min((end for end in ends if end is not None), default=None)


def check_season(trainer: "pl.Trainer", start_epoch: int, who: str = "PrehabCallback", goes_on: bool = True) -> None:
    """Raises :class:`ArgumentError` for a regularizer that would begin when its time is over.

    Args:
        trainer: The running Trainer.
        start_epoch: Where it begins.
        who: For the message.
        goes_on: Whether it acts between two surgeries, too.
    """
    compression, end = find_callback(trainer, CompressionCallback), end_epoch(trainer, None)
    if goes_on and compression is not None and start_epoch < compression.last_epoch:
        return  # before a later one of several surgeries
    if end is not None and start_epoch >= end and not getattr(trainer, "fast_dev_run", False):
        surgery = compression is not None and compression.epoch == end
        why = f"the surgery is at epoch {end}" if surgery else f"max_epochs is {end}"
        raise ArgumentError(
            f"{who}(start_epoch={start_epoch}) never acts: {why}, and epochs count from 0. "
            f"{'Start earlier' if end > 0 else 'Cut later'}, or leave {who} out."
        )


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
    start = start_epoch if compression is None else max(start_epoch, compression.began)
    return min(wanted, max((end - start) * length // 2, 1))


def steps_of_epochs(trainer: "pl.Trainer", epochs: float) -> float:
    """Optimizer steps in so many epochs from the present one on; with manual optimization its batches.

    A GradientAccumulationScheduler is asked for each of these epochs: it sets the Trainer's number at the start of an
    epoch, perhaps after those who ask.
    """
    length, present = trainer.num_training_batches, trainer.accumulate_grad_batches
    scheduler = find_callback(trainer, GradientAccumulationScheduler)
    if scheduler is None:
        return epochs * math.ceil(length / present)
    steps, epoch = 0.0, trainer.current_epoch
    while epochs > 0:
        rest = epochs if epoch >= max(scheduler.epochs) else min(epochs, 1.0)  # it changes no more, or for an epoch
        steps += rest * math.ceil(length / scheduler.get_accumulate_grad_batches(epoch))
        epochs, epoch = epochs - rest, epoch + 1
    return steps


def rest_of_run(trainer: "pl.Trainer", pl_module: "pl.LightningModule", into_epoch: int = 0) -> dict[str, int]:
    """What is left until ``max_epochs`` or ``max_steps``; empty if neither tells.

    Args:
        trainer: The running Trainer.
        pl_module: Its module.
        into_epoch: Batches of the present epoch that are done.

    Returns:
        ``{"steps": n}`` of the optimizer. With manual optimization nobody knows when it steps, so batches until
        ``max_epochs``, and as ``"run"`` steps of all optimizers until ``max_steps``: what comes first is the end.
    """
    length, max_epochs = batches_per_epoch(trainer), trainer.max_epochs
    automatic, found = pl_module.automatic_optimization, {}
    if max_epochs is not None and max_epochs != -1 and length is not None:
        epochs = max_epochs - trainer.current_epoch
        if automatic:
            found["steps"] = round(steps_of_epochs(trainer, epochs)) - into_epoch // trainer.accumulate_grad_batches
        else:
            found["batches"] = epochs * length - into_epoch
    if trainer.max_steps != -1:
        rest = trainer.max_steps - trainer.global_step
        if automatic:
            found["steps"] = min(rest, found.get("steps", rest))
        else:
            found["run"] = rest
    return found
