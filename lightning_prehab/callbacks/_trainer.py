"""What the callbacks need to know of a Trainer, in one place."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.progress import length_of

CallbackT = TypeVar("CallbackT", bound=pl.Callback)
#: For ``log`` of what is equal on all processes: nothing is sent between them, and Lightning does not ask for it.
EQUAL: Mapping[str, Any] = {"sync_dist": True, "rank_zero_only": True}


def check_strategy(trainer: "pl.Trainer", who: pl.Callback, *, sharded: bool = False) -> None:
    """Raises :class:`UnsupportedError` for a strategy that a callback cannot follow.

    Args:
        trainer: Of the run.
        who: The callback.
        sharded: Whether it can work on weights that FSDP2 shards, too.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if whole or (sharded and shards(trainer)):  # Lightning derives DeepSpeedStrategy from DDPStrategy
        return
    both = " supports one device, DDP and FSDP2 (ModelParallelStrategy), not "
    raise UnsupportedError(
        f"{type(who).__name__}{both if sharded else ' supports one device and DDP, not '}{type(strategy).__name__}"
        + ("" if shards(trainer) else ": its flat pieces of weights and optimizer states are no matrices any more")
        + ". Work in two phases: compress with compress_folder or compress_() outside of this strategy, and go on "
        "under it with the compressed structure built in configure_model; docs/howto/cluster.md shows how."
    )


def shards(trainer: "pl.Trainer") -> bool:
    """Whether the strategy is the one for FSDP2 and tensor parallelism."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_launcher(trainer: "pl.Trainer", who: pl.Callback) -> None:
    """Raises :class:`UnsupportedError` where training happens in forked or spawned copies of the script's process."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UnsupportedError(
            f"{type(who).__name__}: after ddp_spawn, ddp_fork and ddp_notebook Lightning copies the weights back into "
            "the dense module of the main process, and the factors would be lost without a word. Use strategy='ddp'."
        )


def callbacks_of(trainer: "pl.Trainer") -> list[pl.Callback]:
    """``trainer.callbacks``, an attribute that Lightning sets without declaring it."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def set_callbacks(trainer: "pl.Trainer", callbacks: list[pl.Callback]) -> None:
    """Replaces the list; it is not edited, since Lightning may be iterating over it."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def find_callback(trainer: "pl.Trainer", kind: type[CallbackT]) -> CallbackT | None:
    """The first callback of a kind in ``trainer.callbacks``, or None."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def move_to_front(trainer: "pl.Trainer", callback: pl.Callback) -> None:
    """Makes a callback act before the others."""
    set_callbacks(trainer, [callback, *(other for other in callbacks_of(trainer) if other is not callback)])


def batches_per_epoch(trainer: "pl.Trainer") -> int | None:
    """Training batches of an epoch, or None if a loader does not tell its length (a limit is only a bound)."""
    combined = trainer.fit_loop._combined_loader
    length = trainer.num_training_batches
    if combined is None or not isinstance(length, int):
        return None
    return None if any(length_of(loader) is None for loader in combined.flattened) else length


def epochs_begun(trainer: "pl.Trainer") -> int:
    """Epochs that have been trained, the last one perhaps in part."""
    return int(trainer.fit_loop.epoch_progress.current.ready)


def reset_scores_(trainer: "pl.Trainer") -> None:
    """Makes ModelCheckpoint and EarlyStopping start comparing anew; nothing on disk is touched."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        elif isinstance(callback, ModelCheckpoint):
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


def gradient_scale(trainer: "pl.Trainer") -> float | Tensor:
    """The factor of the GradScaler in fp16 training, 1 otherwise.

    A tensor on the device of the Trainer there: to read it would wait for all that the device has still to do.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0
    factor: Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
    return factor


def loss_scale(trainer: "pl.Trainer") -> float | Tensor:
    """The factor by which the loss in ``on_before_backward`` differs from the loss that the user returned."""
    return gradient_scale(trainer) / trainer.accumulate_grad_batches


def log_number(pl_module: "pl.LightningModule", name: str, value: float | Tensor, prog_bar: bool = False) -> None:
    """Logs a number. One that Python knows stays on the CPU: Lightning would bring it to the device, and wait."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.get_default_dtype(), device="cpu")
    pl_module.log(name, value, batch_size=1, prog_bar=prog_bar)


def uses_loss_scaling(trainer: "pl.Trainer") -> bool:
    """Whether gradients may overflow by design (fp16 with a GradScaler)."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def closes_window(trainer: "pl.Trainer", batch_idx: int) -> bool:
    """Whether the optimizer steps at this batch, given gradient accumulation."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
