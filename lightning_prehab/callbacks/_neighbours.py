"""Callbacks beside the surgery that hold what it replaces: refused before anything is trained, with the way out."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor

from lightning_prehab.callbacks._trainer import callbacks_of
from lightning_prehab.errors import UnsupportedError

#: Callbacks that hold a copy of the dense parameters and pair it with the live ones by position.
_AVERAGING = tuple(
    kind
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if (kind := getattr(pl_callbacks, name, None)) is not None
)


def refuse_averaging(trainer: "pl.Trainer") -> None:
    """Raises :class:`UnsupportedError` for callbacks that average weights."""
    for other in callbacks_of(trainer):
        if isinstance(other, _AVERAGING):
            raise UnsupportedError(
                f"{type(other).__name__} pairs a copy of the dense parameters with the live ones by position and "
                "cannot follow the surgery. Remove it, or average in a second run after the compression."
            )


def refuse_communication_state(trainer: "pl.Trainer") -> None:
    """Raises :class:`UnsupportedError` for a DDP communication hook that remembers gradients."""
    if getattr(trainer.strategy, "_ddp_comm_state", None) is not None:
        raise UnsupportedError(
            "A DDP communication hook with state remembers the dense gradients; remove ddp_comm_state, or compress "
            "in a run without it."
        )


def refuse_finders(trainer: "pl.Trainer") -> None:
    """Raises :class:`UnsupportedError` for callbacks that train and roll back, in a run that resumes."""
    for other in callbacks_of(trainer):
        if isinstance(other, pl_callbacks.LearningRateFinder | pl_callbacks.BatchSizeFinder):
            raise UnsupportedError(
                f"{type(other).__name__} trains and rolls back before the optimizer state of a compressed "
                "checkpoint is restored; remove it from the run that resumes."
            )


def refuse_pruning(trainer: "pl.Trainer", pl_module: "pl.LightningModule", weights: Iterable[Tensor]) -> None:
    """Raises :class:`UnsupportedError` for a ModelPruning of layers that are to be cut, or that have been.

    Pruned before the surgery, a weight is no target any more; after it, the callback would prune the dense layer, which
    is no part of the model any more.

    Args:
        trainer: The Trainer; all callbacks have been set up.
        pl_module: Its module.
        weights: Those that the surgery is going to replace.
    """
    held = {id(weight) for weight in weights}
    names = {id(module): name for name, module in pl_module.named_modules()}
    layers = [
        module for module in pl_module.modules() if any(id(one) in held for one in module.parameters(recurse=False))
    ]
    cut = {id(part) for layer in layers for part in layer.modules()}
    for other in callbacks_of(trainer):
        for module, _ in getattr(other, "_parameters_to_prune", ()) if isinstance(other, ModelPruning) else ():
            if id(module) in cut or id(module) not in names:
                which = f"layer {names[id(module)]!r}, which is" if id(module) in names else "layers that have been"
                raise UnsupportedError(
                    f"{type(other).__name__} holds {which} replaced in the surgery, and cannot follow: it would prune "
                    "what is no part of the model any more. Remove it and prune in a second run, after the "
                    "compression, or give it parameters_to_prune of layers that are not cut (exclude_modules)."
                )
