"""Callbacks of which a Trainer takes one, with the same settings on all processes: else fit does not start."""

import inspect
import itertools
from typing import Any

import lightning.pytorch as pl

from lightning_prehab.callbacks._same_settings import check_same_settings
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
        """Takes the key that checkpoints have. The first of these callbacks compares the settings of all of them."""
        self._number = None
        all_of_them = [one for one in callbacks_of(trainer) if isinstance(one, OnlyOne)]
        if stage == "fit" and self is next(iter(all_of_them), None):
            check_same_settings(trainer, ((type(one).__name__, one._settings()) for one in all_of_them))

    def _settings(self) -> dict[str, Any]:
        """What has to be the same on all processes, by the name of the argument; not what a subclass has added."""
        package = __name__.partition(".")[0]
        kinds = [kind for kind in type(self).__mro__ if kind.__module__.partition(".")[0] == package]
        names = {name for kind in kinds for name in inspect.signature(kind).parameters}
        return {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}

    @staticmethod
    def refuse_others(trainer: "pl.Trainer", kind: type[pl.Callback], way_out: str) -> None:
        """Raises :class:`UnsupportedError` if the Trainer has several callbacks of a kind."""
        names = [type(other).__name__ for other in callbacks_of(trainer) if isinstance(other, kind)]
        if len(names) > 1:
            raise UnsupportedError(f"The Trainer has {' and '.join(names)}; {way_out}")
