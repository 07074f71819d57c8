"""Callbacks of which a Trainer takes one: a second one is refused when fit starts, with the way out."""

import itertools

import lightning.pytorch as pl

from lightning_prehab.callbacks._trainer import callbacks_of
from lightning_prehab.errors import UnsupportedError

_NUMBERS = itertools.count(1)


class OnlyOne(pl.Callback):
    """A callback with a state under one key.

    Lightning refuses two callbacks of one key when the Trainer is made, and cannot say what to do. So each has a key of
    its own until it is set up, and :meth:`refuse_others` says it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._number: int | None = next(_NUMBERS)  # until it is set up

    @property
    def state_key(self) -> str:
        """The name of the class, in all checkpoints."""
        key: str = super().state_key
        return key if self._number is None else f"{key} {self._number}"

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the key that checkpoints have."""
        self._number = None

    @staticmethod
    def refuse_others(trainer: "pl.Trainer", kind: type[pl.Callback], way_out: str) -> None:
        """Raises :class:`UnsupportedError` if the Trainer has several callbacks of a kind."""
        names = [type(other).__name__ for other in callbacks_of(trainer) if isinstance(other, kind)]
        if len(names) > 1:
            raise UnsupportedError(f"The Trainer has {' and '.join(names)}; {way_out}")
