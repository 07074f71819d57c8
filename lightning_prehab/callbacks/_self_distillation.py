"""The model from before prehab teaches the one whose tail is taken off."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_prehab.callbacks._checkpoint import check_version
from lightning_prehab.callbacks._distiller import Distiller
from lightning_prehab.callbacks._trainer import callbacks_of, find_callback, log_number, set_callbacks, shards
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.distillation.teacher import Teacher

#: Of the state in checkpoints.
STATE_VERSION = 1


class SelfDistillation(pl.Callback):
    """Stands in the Trainer beside a PrehabCallback, with a state of its own.

    Args:
        strength: Factor on the distance to the teacher.
        in_season: Whether prehab acts in an epoch.
    """

    def __init__(self, strength: float, in_season: Callable[["pl.Trainer"], bool]) -> None:
        self._strength, self._in_season = strength, in_season
        self._distiller = Distiller("PrehabCallback(self_distillation=...)")
        self._done = self._looking = False
        self._restored: dict[str, Any] = {}
        self._loaded_late: tuple[pl.Trainer, pl.LightningModule] | None = None

    def begin_fit(self, trainer: "pl.Trainer") -> None:
        """Stands for ``setup``, which is over when it comes into the Trainer."""
        self._distiller.begin_fit(trainer)

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Says what the teacher takes, or takes it from the checkpoint."""
        if not self._done:
            self._distiller.check_model(trainer, pl_module)
        if self._restored:
            self._go_on(trainer, pl_module)
        if not shards(trainer):
            self._announce(trainer, pl_module)

    def _go_on(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        state, self._restored = self._restored, {}
        self._done = state["done"]
        self._distiller.load_state_dict(trainer, pl_module, state)

    def _announce(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._done and self._distiller.teacher is None:
            self._distiller.announce(trainer, pl_module, "before prehab")

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """The same for a sharded model, whose checkpoint is loaded only now."""
        if shards(trainer):
            self._announce(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keeps the model when prehab begins; looks at what the step is going to call."""
        self._looking = False
        if self._done:
            return
        if not self._in_season(trainer):
            self._looking = self._distiller.teacher is None and self._distiller.begin_look(trainer, pl_module, batch)
            return
        if self._distiller.teacher is None:
            self._distiller.keep(trainer, pl_module)
        self._distiller.begin_batch(trainer, pl_module, batch)

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Asks the teacher."""
        if self._looking:
            self._distiller.look(trainer, pl_module, loss)
        elif self._distiller.watches:
            found = self._distiller.before_backward(trainer, pl_module, loss, self._strength)
            if found is not None:
                log_number(pl_module, "prehab/distillation", found)

    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """With manual optimization the step goes on."""
        self._distiller.after_backward()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the hooks off."""
        self._distiller.end_batch(pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Something must have been learned."""
        self._distiller.end_epoch()

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: Any) -> None:
        """Prehab is over; lets go of the teacher, which a RehabDistillation has taken before.

        A cut that no prehab has come before is waited out: there has been no teacher yet.
        """
        compression = find_callback(trainer, CompressionCallback)
        self._done = self._distiller.teacher is not None or compression is None or compression.done
        self._distiller.forget()

    @property
    def teacher(self) -> Teacher | None:
        """The model from before prehab, until the cut."""
        return self._distiller.teacher

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Lets go of the teacher."""
        self._distiller.forget()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Lets go of the Trainer."""
        if stage == "fit":
            self._distiller.end_fit()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off."""
        self._distiller.close()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights; plain data and tensors only."""
        return {"version": STATE_VERSION, "done": self._done, **self._distiller.state_dict()}

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """A sharded model is loaded after fit has started, and may be cut right afterwards."""
        self._loaded_late = (trainer, pl_module) if shards(trainer) else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the start of fit, unless that is over."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        late, self._loaded_late = self._loaded_late, None
        self._restored = state_dict
        if late is not None:
            self._go_on(*late)


def put_beside(trainer: "pl.Trainer", strength: float, in_season: Callable[["pl.Trainer"], bool]) -> None:
    """Puts a new :class:`SelfDistillation` into the Trainer, in the place of an earlier one; none for strength 0."""
    own = [SelfDistillation(strength, in_season)] if strength > 0.0 else []
    for one in own:
        one.begin_fit(trainer)
    others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, SelfDistillation)]
    set_callbacks(trainer, [*others, *own])
