"""What happens to processes of examples/cluster: callbacks that a configuration adds to it."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed


class Once(pl.Callback):
    """A signal to one process of its own, between a gradient and its step.

    Args:
        folder: Remembers that it has happened.
        step: Before which one.
        signal_name: Of the signal.
    """

    def __init__(self, folder: str, step: int, signal_name: str) -> None:
        self.mark, self.step, self.signal = Path(folder, "happened"), step, signal.Signals[signal_name]

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step and not self.mark.exists():
            self.mark.write_text(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
            os.kill(os.getpid(), self.signal)


class Float64(pl.Callback):
    """The model and its data in float64, which Lightning's precision is not for a sharded model."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        torch.set_default_dtype(torch.float64)  # the module is not built yet
        for data in (trainer.datamodule.train, trainer.datamodule.val):
            images, labels = data.tensors
            data.tensors = images.double(), labels


class SameOnAllRanks(pl.Callback):
    """The weights of the end are the same on all processes, bit by bit, where each holds all of them."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, tensor in pl_module.state_dict().items():
            if type(tensor.detach()) is torch.Tensor:
                found = [torch.empty_like(tensor) for _ in range(trainer.world_size)]
                distributed.all_gather(found, tensor.contiguous())
                assert all(torch.equal(one, tensor) for one in found), name
