"""Calibration that rides on the last ordinary training steps before a surgery."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed

from lightning_prehab.callbacks._checkpoint import dump_statistics, restore_statistics_
from lightning_prehab.callbacks._distributed import data_group, data_ranks
from lightning_prehab.callbacks._targets import targets_of
from lightning_prehab.callbacks._trainer import batches_per_epoch, loss_scale, uses_loss_scaling
from lightning_prehab.plan.recipe import Recipe
from lightning_prehab.sharded.engine import reshard_
from lightning_prehab.statistics.collector import MANY_BATCHES, Collector
from lightning_prehab.statistics.kept import KeptBatches
from lightning_prehab.statistics.sums import LayerStatistics


class Ride:
    """What training steps send through the targets, from so many batches before the end of an epoch on.

    Args:
        batches: So many; where the length of an epoch is not known, the last full window of them and the running one.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._collector: Collector | None = None
        self._older: dict[str, LayerStatistics] | None = None
        self._kept = KeptBatches()
        self._group: distributed.ProcessGroup | None = None  # of processes that see different data; None: all

    def begin_batch(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", recipe: Recipe, batch: Any, batch_idx: int
    ) -> None:
        """Starts counting what this step sends through the targets, if it is time to."""
        length = batches_per_epoch(trainer)
        if length is not None and batch_idx < length - self._batches:
            return
        if self._collector is not None and length is None and batch_idx % self._batches == 0:
            self._older = self.stop()
        if self._collector is None:
            self._collector = self._new_collector(trainer, pl_module, recipe)
        first = 0 if length is None else max(length - self._batches, 0)
        self._collector.begin_batch(batch, batch_idx - first)
        if recipe.factorization_or_default.comparable:
            self._kept.keep(batch, batch_idx)

    def note_loss_scale(self, trainer: "pl.Trainer") -> None:
        """Notes the scale of this loss, to take it out of the gradients again."""
        if self._collector is not None:
            self._collector.loss_scale = loss_scale(trainer)

    def end_batch(self) -> None:
        """Stops counting, so that validation batches are not counted."""
        if self._collector is not None:
            self._collector.end_batch()

    def detach(self) -> None:
        """Takes the hooks off; what was collected stays for a checkpoint that is written now."""
        if self._collector is not None:
            self._collector.detach()

    def take(self) -> tuple[dict[str, LayerStatistics] | None, Sequence[tuple[Any, int]]]:
        """What was collected, of this process alone, and some of the batches; None without a ride."""
        statistics, older, kept = self.stop(), self._older, self._kept
        self.forget()
        if statistics is not None and older is not None:
            statistics = {name: layer.merge_(older[name]) for name, layer in statistics.items()}
        return statistics, kept

    def stop(self) -> dict[str, LayerStatistics] | None:
        """Takes the hooks off; returns the sums of the running window."""
        collector, self._collector = self._collector, None
        if collector is None:
            return None
        collector.detach()
        return collector.statistics

    def let_go(self) -> None:
        """Forgets the batches."""
        self._kept = KeptBatches()

    def forget(self) -> None:
        """Forgets everything."""
        self.stop()
        self._older = None
        self.let_go()

    def state_dict(self, world_size: int) -> dict[str, Any]:
        """The sums, over all processes."""
        collecting = None if self._collector is None else self._collector.statistics
        return {
            "statistics": dump_statistics(collecting, world_size, self._group),
            "older": dump_statistics(self._older, world_size, self._group),
        }

    def load_state_dict(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", recipe: Recipe, state: Mapping[str, Any]
    ) -> None:
        """Goes on where :meth:`state_dict` was called."""
        self._collector = self._new_collector(trainer, pl_module, recipe)
        restore_statistics_(self._collector.statistics, state["statistics"], data_ranks(trainer)[0])
        if state["older"]:
            self._older = self._new_collector(trainer, pl_module, recipe, attach=False).statistics
            restore_statistics_(self._older, state["older"], data_ranks(trainer)[0])

    def _new_collector(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", recipe: Recipe, attach: bool = True
    ) -> Collector:
        self._group = data_group(trainer)
        reshard_(pl_module)
        targets = targets_of(recipe, pl_module)
        collector = Collector(
            targets,
            recipe.wanted,
            drop_overflow=uses_loss_scaling(trainer),
            batches=min(self._batches, batches_per_epoch(trainer) or MANY_BATCHES - 1),  # none is left out
        )
        if attach:
            collector.attach()
            megabytes = collector.memory() / 1e6
            rank_zero_info(f"Calibration of {len(targets)} layers: at most {megabytes:.1f} MB of sums.")
        return collector
