"""Who is told of a surgery: the callbacks and the module that have a method for it."""

from typing import Any

import lightning.pytorch as pl

from lightning_prehab.callbacks._trainer import callbacks_of


def tell_listeners(trainer: "pl.Trainer", pl_module: "pl.LightningModule", hook: str, *facts: Any) -> None:
    """Calls ``hook(trainer, pl_module, *facts)`` of every callback that has it, then that of the module."""
    for listener in (*callbacks_of(trainer), pl_module):
        method = getattr(listener, hook, None)
        if callable(method):
            method(trainer, pl_module, *facts)
