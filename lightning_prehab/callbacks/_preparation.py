"""What a regularizer has to know before it can act: the metric and the target rank of each layer."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prehab.callbacks._checkpoint import dump_statistics, restore_statistics_
from lightning_prehab.callbacks._distributed import data_group, data_ranks, decide_on_rank_zero, sum_statistics_
from lightning_prehab.callbacks._plan_of_shards import plan_of_shards
from lightning_prehab.callbacks._regularized import RegularizedLayer, Space, is_reached, matrices, wanted_in
from lightning_prehab.callbacks._said import saying_what_to_do
from lightning_prehab.callbacks._sharded_layers import ShardedLayer, share_out_
from lightning_prehab.callbacks._showing import showing
from lightning_prehab.callbacks._trainer import loss_scale, uses_loss_scaling
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.plan.compression_plan import CompressionPlan
from lightning_prehab.plan.layer_plan import LayerPlan
from lightning_prehab.progress import counted
from lightning_prehab.sharded.engine import is_sharded, reshard_
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.forms import form_name, form_of_shape


class Preparation:
    """Statistics of some ordinary training steps, then metrics and a provisional plan.

    Args:
        trainer: The running Trainer.
        targets: The layers to be regularized.
        space: The metric.
        source: The callback whose plan gives the target ranks, or None.
        planned: What the ranks are planned for: all targets of the surgery; empty without a source.
        batches: Number of batches to watch.
        only_cut: Leave out the layers that the plan leaves dense.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        targets: Targets,
        space: Space,
        source: CompressionCallback | None,
        planned: Targets,
        batches: int,
        only_cut: bool,
    ) -> None:
        self._targets, self._space, self._source, self._planned = targets, space, source, planned
        self._only_cut = only_cut
        self.batches = batches
        self.seen = 0
        self._group, self._rank = data_group(trainer), data_ranks(trainer)[0]
        self.wanted = wanted_in(space) if source is None else wanted_in(space).union(source.recipe.wanted)
        self._collector: Collector | None = None
        if any(self.wanted):
            layers = {**planned, **targets}
            scaling = uses_loss_scaling(trainer)
            self._collector = Collector(layers, self.wanted, drop_overflow=scaling, batches=batches)
            self._collector.attach()

    @property
    def is_complete(self) -> bool:
        """Whether nothing more has to be watched."""
        return self._collector is None or self.seen >= self.batches

    def begin_batch(self, batch: Any) -> None:
        """Starts counting what this step sends through the layers."""
        if self._collector is not None:
            self._collector.begin_batch(batch, self.seen)

    def note_loss_scale(self, trainer: "pl.Trainer") -> None:
        """Notes the scale of this loss, to take it out of the gradients again."""
        if self._collector is not None:
            self._collector.loss_scale = loss_scale(trainer)

    def end_batch(self) -> None:
        """Stops counting until the next batch."""
        if self._collector is not None:
            self._collector.end_batch()
        self.seen += 1

    def detach(self) -> None:
        """Takes the hooks off; the sums stay."""
        if self._collector is not None:
            self._collector.detach()

    def close(self) -> dict[str, LayerStatistics] | None:
        """Takes the hooks off; returns the sums."""
        collector, self._collector = self._collector, None
        if collector is None:
            return None
        collector.detach()
        return collector.statistics

    def warn_of_lost_time(self) -> None:
        """Says that the time for the regularizer was over before it could begin."""
        rank_zero_warn(
            f"PrehabCallback was still collecting statistics ({self.seen} batches) when its time was over: nothing was "
            "regularized. Train longer, or lower calibration_batches of the CompressionCallback."
        )

    def finish(self, trainer: "pl.Trainer") -> list[RegularizedLayer]:
        """The layers to regularize: those that the plan cuts and the statistics have reached."""
        with showing(trainer):
            return self._layers(trainer)

    def _layers(self, trainer: "pl.Trainer") -> list[RegularizedLayer]:
        statistics, source, kind = self.close(), self._source, RegularizedLayer
        if is_sharded(trainer.lightning_module):
            reshard_(trainer.lightning_module)
            kind = ShardedLayer
        if statistics is not None:
            sum_statistics_(trainer, statistics)
        cuts: Mapping[str, LayerPlan] = {}
        if source is not None:
            with saying_what_to_do():
                plan = self._plan(trainer, source, statistics)
            cuts = {layer.name: layer for layer in plan.layers if layer.rank is not None}
        layers = []
        for name, target in counted(self._targets.items(), "prepare"):
            cut = cuts.get(name)
            if cut is None and self._only_cut:
                continue
            form = target if cut is None else form_of_shape(target, (cut.out_features, cut.in_features))
            for group, view in matrices({form_name(name, form): form}).items():
                if is_reached(self._space, group, statistics):
                    rank = None if cut is None else cut.rank
                    layers.append(kind.seen_in(self._space, group, view, rank, statistics))
        share_out_([layer for layer in layers if isinstance(layer, ShardedLayer)])
        return layers

    def _plan(
        self,
        trainer: "pl.Trainer",
        source: CompressionCallback,
        statistics: Mapping[str, LayerStatistics] | None,
    ) -> CompressionPlan:
        """Rank 0 decides; sharded layers are decomposed where they are whole for a moment."""
        if is_sharded(trainer.lightning_module):
            return plan_of_shards(trainer, source.recipe.without_probes(), self._planned, statistics)
        return decide_on_rank_zero(trainer, lambda: source.make_plan(self._planned, statistics))

    def state_dict(self, world_size: int) -> dict[str, Any]:
        """The sums so far, over all processes."""
        statistics = None if self._collector is None else self._collector.statistics
        dumped = dump_statistics(statistics, world_size, self._group)
        return {"seen": self.seen, "wanted": list(self.wanted), "statistics": dumped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was called, if it belongs to the same settings."""
        if self._collector is not None and Wanted(*state["wanted"]) == self.wanted:
            self.seen = state["seen"]
            restore_statistics_(self._collector.statistics, state["statistics"], self._rank)
