"""A callback that acts around the steps of optimizers, those that Lightning does not announce as well."""

from functools import partial

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_prehab.callbacks._steps import WeightSteps


class ActsAtSteps(pl.Callback):
    """Calls :meth:`_before_step` and :meth:`_after_step`, between :meth:`_watch_steps` and :meth:`_stop_watching`."""

    def __init__(self) -> None:
        super().__init__()
        self._weight_steps: WeightSteps | None = None

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Acts before a step that Lightning announces."""
        if self._weight_steps is not None:
            self._weight_steps.announce(optimizer)
        self._before_step(trainer, pl_module, optimizer)

    def _watch_steps(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        manual, before = not pl_module.automatic_optimization, partial(self._before_step, trainer, pl_module)
        self._weight_steps = WeightSteps(trainer.optimizers, manual, before, self._after_step)

    def _stop_watching(self) -> None:
        if self._weight_steps is not None:
            self._weight_steps.remove()
        self._weight_steps = None

    def _before_step(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer) -> None:
        """Once before each step of an optimizer: its gradients are there."""

    def _after_step(self) -> None:
        """Once after each step."""
