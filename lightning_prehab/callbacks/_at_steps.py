"""A callback that acts around the steps of optimizers, those that Lightning does not announce as well."""

from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._steps import WeightSteps, are_of_now


class ActsAtSteps(OnlyOne):
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
        self._stop_watching()
        manual, before = not pl_module.automatic_optimization, partial(self._before_step, trainer, pl_module)
        self._weight_steps = WeightSteps(trainer.optimizers, manual, before, self._after_step)

    def _begin_batch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", weights: Sequence[Tensor]) -> None:
        """Looks at the weights before a batch, and watches the optimizers of now if somebody has made them anew."""
        if self._weight_steps is None:
            return
        if not are_of_now(self._weight_steps.watches, trainer.optimizers):
            self._stop_watching()
            self._watch_steps(trainer, pl_module)
        self._weight_steps.begin_batch(weights)

    def _stop_watching(self) -> None:
        if self._weight_steps is not None:
            self._weight_steps.remove()
        self._weight_steps = None

    def _before_step(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer) -> None:
        """Once before each step of an optimizer: its gradients are there."""

    def _after_step(self) -> None:
        """Once after each step."""
