"""The surgery, at an epoch boundary of an ordinary training run."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.callbacks._checkpoint import (
    DenseShell,
    check_version,
    dump_statistics,
    follow_on_load,
    plan_of_factors,
    restore_statistics_,
)
from lightning_prehab.callbacks._distributed import (
    decide_on_rank_zero,
    decompose_together,
    merge,
    raise_together,
    rewrap,
    share_factors,
    sum_statistics_,
)
from lightning_prehab.callbacks._own_pass import collect_in_own_pass, probe_in_own_pass
from lightning_prehab.callbacks._report_logging import log_report
from lightning_prehab.callbacks._trainer import (
    batches_per_epoch,
    callbacks_of,
    check_launcher,
    check_strategy,
    loss_scale,
    move_to_front,
    reset_scores_,
    uses_loss_scaling,
)
from lightning_prehab.choices import RankOverride, added_parameters
from lightning_prehab.collector import Collector
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.factorizations import Decomposition, Factorization, Factors, KroneckerSVD
from lightning_prehab.forms import in_chosen_forms
from lightning_prehab.kinds import view_of
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.plan import CompressionPlan
from lightning_prehab.planning import (
    check_method,
    check_wish,
    choose_forms,
    default_policy,
    make_plan,
    plan_ranks,
    require_targets,
    usable_targets,
    wanted_statistics,
    without_probes,
)
from lightning_prehab.rank_policies import Probe, RankPolicy
from lightning_prehab.report import CompressionReport
from lightning_prehab.statistics import LayerStatistics, Wanted
from lightning_prehab.surgery import check_optimizer, swap_
from lightning_prehab.targets import Patterns, Targets, clean_name, find_targets

#: Of the state in checkpoints.
STATE_VERSION = 1
#: Training batches that a policy with probes is shown, for each layer.
PROBE_BATCHES = 8
#: Callbacks that hold a copy of the dense parameters and pair it with the live ones by position.
_AVERAGING = tuple(
    kind
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if (kind := getattr(pl_callbacks, name, None)) is not None
)


class CompressionCallback(pl.Callback):
    """Replaces layers by their low-rank factors at the start of an epoch, in the middle of training.

    In the epoch before, hooks ride on the last ``calibration_batches`` ordinary training steps and collect what the
    factorization needs; no extra data pass is made. (A surgery at epoch 0 makes a short pass of its own, on a copy of
    the module.) Then the ranks are planned, all factors computed, the modules swapped, the optimizers edited in place
    with their first moments carried over, and a DDP wrapper rebuilt. Learning-rate schedulers go on as if nothing had
    happened. If anything fails before the swap, the model is as it was. A table of what was done is printed once;
    ``compression/keep`` and ``compression/model_keep`` are logged; TensorBoard, W&B and MLflow get the table and the
    figures too.

    Any callback or the LightningModule may define ``on_surgery(trainer, pl_module, report)``; it is called right after.

    Args:
        epoch: The surgery happens before the first batch of this epoch (counted from 0). ``"auto"``: at the first epoch
            boundary at which the forecast of a :class:`~lightning_prehab.PrehabCallback` in the loss space is below
            ``forecast_below``, before the last epoch in any case.
        keep: Share of the targets' weight parameters to keep, in ``(0, 1]``: 0.4 keeps 40 %. Ignored if a policy is
            given.
        policy: Rank policy; None means one global :class:`~lightning_prehab.ParameterBudget` for factorizations whose
            spectra compare between layers (the default one), :class:`~lightning_prehab.RankRatio` for the others.
        factorization: How factors are computed; None means :class:`~lightning_prehab.KroneckerSVD`.
        calibration_batches: Training batches whose statistics are used, at least 1; at most the length of one epoch
            (twice this number of the last batches where the length of an epoch is not known).
        target_modules: Names or fnmatch patterns of the layers to cut; None takes all that can be cut, but for
            projections to a vocabulary, see :func:`~lightning_prehab.find_targets`.
        exclude_modules: Names or fnmatch patterns of the layers to leave.
        rank_overrides: ``{pattern: rank}``: an int is a rank, a float a share of the layer's parameters, ``"dense"``
            keeps it.
        rank_multiple_of: Ranks are multiples of this; multiples of 8 to 32 run faster on most hardware.
        reset_scores: Make ModelCheckpoint and EarlyStopping forget the scores of the dense model at the surgery; files
            that are written already stay. Otherwise "best" can remain a dense checkpoint, and patience counts on.
        forecast_below: With ``epoch="auto"``: predicted increase of the loss, in its units, at which the cut counts as
            free; positive.
        split_fused: Cut the parts of fused projections (queries, keys and values; gate and up) each for itself; else
            they are one matrix.

    Attributes:
        report: The :class:`~lightning_prehab.CompressionReport` once the surgery is done, else None.

    Raises:
        ArgumentError: If a value is out of range, or ``epoch`` is never reached.
        TargetError: When fit starts, if no layer matches.
        UnsupportedError: When fit starts, for strategies, optimizers or callbacks that cannot follow a change of
            parameters.

    Example::

        trainer = L.Trainer(max_epochs=12, callbacks=[CompressionCallback(epoch=6, keep=0.4)])
    """

    def __init__(
        self,
        epoch: int | Literal["auto"],
        keep: float = 0.5,
        *,
        policy: RankPolicy | None = None,
        factorization: Factorization | None = None,
        calibration_batches: int = 64,
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
        rank_overrides: Mapping[str, RankOverride] | None = None,
        rank_multiple_of: int = 1,
        reset_scores: bool = False,
        forecast_below: float = 0.01,
        split_fused: bool = False,
    ) -> None:
        super().__init__()
        if epoch != "auto" and (not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0):
            raise ArgumentError(f"epoch counts from 0, or is 'auto', got {epoch!r}.")
        if not 0.0 < forecast_below < math.inf:
            raise ArgumentError(f"forecast_below must be positive and finite, got {forecast_below}.")
        if calibration_batches < 1:
            raise ArgumentError(f"calibration_batches must be at least 1, got {calibration_batches}.")
        if not isinstance(rank_multiple_of, int) or rank_multiple_of < 1:
            raise ArgumentError(f"rank_multiple_of must be at least 1, got {rank_multiple_of!r}.")
        check_method(factorization, policy)
        self._auto = epoch == "auto"
        self.epoch = 0 if isinstance(epoch, str) else epoch  # with "auto" the last possible one, until it is decided
        self.forecast_below = forecast_below
        self.factorization = KroneckerSVD() if factorization is None else factorization
        self.policy = default_policy(keep, self.factorization) if policy is None else policy
        self.calibration_batches = calibration_batches
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.rank_overrides = rank_overrides
        self.rank_multiple_of = rank_multiple_of
        self.reset_scores = reset_scores
        self.split_fused = split_fused
        self.report: CompressionReport | None = None
        self._collector: Collector | None = None
        self._older: dict[str, LayerStatistics] | None = None
        self._restored: dict[str, Any] = {}
        self._shell: DenseShell | None = None
        self._following: RemovableHandle | None = None
        self._world_size = 1

    @property
    def done(self) -> bool:
        """Whether the surgery has happened."""
        return self.report is not None

    @property
    def wanted(self) -> Wanted:
        """What calibration has to collect."""
        return wanted_statistics(self.factorization, self.policy)

    def find_targets(self, pl_module: "pl.LightningModule") -> Targets:
        """The layers that this callback is going to cut, and why others are left."""
        return find_targets(pl_module, self.target_modules, self.exclude_modules, split_fused=self.split_fused)

    def make_plan(self, targets: Targets, statistics: Mapping[str, LayerStatistics] | None) -> CompressionPlan:
        """What the surgery would do, given these statistics.

        A policy that needs probes measures them at the surgery only; until then one budget for all layers stands in.
        """
        policy = without_probes(self.policy)
        return make_plan(targets, policy, self.factorization, statistics, self.rank_overrides, self.rank_multiple_of)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work, before anything has been trained, and prepares for what may be loaded."""
        if stage != "fit":
            self._following = follow_on_load(pl_module)
            return
        check_strategy(trainer, self)
        check_launcher(trainer, self)
        if self._auto:
            self.epoch = self._last_possible_epoch(trainer)
        limit = None if getattr(trainer, "fast_dev_run", False) else trainer.max_epochs
        if limit is not None and limit != -1 and self.epoch >= limit:
            raise ArgumentError(
                f"CompressionCallback(epoch={self.epoch}) is never reached: epochs count from 0 and max_epochs is "
                f"{limit}. Choose an epoch from 0 to {limit - 1}."
            )
        for other in callbacks_of(trainer):
            if isinstance(other, _AVERAGING):
                raise UnsupportedError(
                    f"{type(other).__name__} pairs a copy of the dense parameters with the live ones by position and "
                    "cannot follow the surgery. Remove it, or average in a second run after the compression."
                )
        if getattr(trainer.strategy, "_ddp_comm_state", None) is not None:
            raise UnsupportedError(
                "A DDP communication hook with state remembers the dense gradients; remove ddp_comm_state, or compress "
                "in a run without it."
            )
        cuts = [] if self.report is None else [name for name, rank in self.report.ranks.items() if rank is not None]
        modules = {clean_name(name): module for name, module in pl_module.named_modules()}
        if not all(isinstance(modules.get(name), LowRankLayer) for name in cuts):
            self.report, cuts = None, []  # another module, or one that has followed a dense checkpoint since
        self._stop_collecting()
        self._restored, self._world_size, self._older = {}, trainer.world_size, None
        self._shell = DenseShell(pl_module, cuts)
        move_to_front(trainer, self)  # others then see the compressed model from its first epoch on

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Repeats the surgery that a loaded checkpoint has had; else checks targets and optimizers."""
        assert self._shell is not None
        loaded, factors = self._shell.loaded, self._shell.close()
        if loaded:
            self.report = None
        if factors:
            for other in callbacks_of(trainer):
                if isinstance(other, pl_callbacks.LearningRateFinder | pl_callbacks.BatchSizeFinder):
                    raise UnsupportedError(
                        f"{type(other).__name__} trains and rolls back before the optimizer state of a compressed "
                        "checkpoint is restored; remove it from the run that resumes."
                    )
            self._replay(trainer, pl_module, factors)
        if not self.done:
            targets = self.find_targets(pl_module)
            check_wish(targets, self.policy, self.factorization, self.rank_overrides, self.rank_multiple_of)
            split = [view_of(t).parameter for t in targets.values() if added_parameters(t, self.factorization)]
            for optimizer in trainer.optimizers:
                check_optimizer(optimizer, split)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Operates at epoch 0, and on a resume that enters an epoch without its start hook."""
        if not self.done and self._fits(self._restored):
            self._collector = self._new_collector(trainer, pl_module)
            restore_statistics_(self._collector.statistics, self._restored["statistics"], trainer.global_rank)
            if self._restored["older"]:
                self._older = self._new_collector(trainer, pl_module, attach=False).statistics
                restore_statistics_(self._older, self._restored["older"], trainer.global_rank)
        self._restored = {}
        self._operate_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Operates when the epoch has come: the last checkpoint of the epoch before is a whole dense model."""
        self._operate_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Starts counting what this step sends through the targets, shortly before the surgery."""
        if self._auto and not self.done:
            self._decide_on_epoch(trainer, batch_idx)
        if self.done or trainer.current_epoch != self.epoch - 1 or not any(self.wanted):
            return
        length = batches_per_epoch(trainer)
        if length is not None and batch_idx < length - self.calibration_batches:
            return
        if self._collector is not None and length is None and batch_idx % self.calibration_batches == 0:
            self._older = self._stop_collecting()  # unknown length: the last full window and the running one
        if self._collector is None:
            self._collector = self._new_collector(trainer, pl_module)
        self._collector.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: torch.Tensor) -> None:
        """Notes the scale of this loss, to take it out of the gradients again."""
        if self._collector is not None:
            self._collector.loss_scale = loss_scale(trainer)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops counting, so that validation batches are not counted."""
        if self._collector is not None:
            self._collector.end_batch()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off if training ended before the surgery."""
        self._stop_collecting()
        if not self.done:
            rank_zero_warn(
                f"Training ended in epoch {trainer.current_epoch}, before the surgery at epoch {self.epoch}: the model "
                "is still dense."
            )

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off; what was collected stays for a checkpoint that is written now."""
        if self._collector is not None:
            self._collector.detach()
        self._close()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the loading hooks off."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the report, and the sums that were being collected; plain data only."""
        collecting = None if self._collector is None else self._collector.statistics
        return {
            "version": STATE_VERSION,
            "report": None if self.report is None else self.report.to_dict(),
            "epoch": self.epoch,
            "wanted": list(self.wanted),
            "statistics": dump_statistics(collecting, self._world_size),
            "older": dump_statistics(self._older, self._world_size),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the start of fit; the structure itself is read from the weights."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        self._restored = state_dict
        if self._auto:
            self.epoch = min(self.epoch, state_dict["epoch"])

    def _last_possible_epoch(self, trainer: "pl.Trainer") -> int:
        """With ``epoch="auto"``: the last one, if there is one and somebody forecasts."""
        asked = [getattr(other, "forecasts", None) for other in callbacks_of(trainer)]
        if not any(callable(forecasts) and forecasts(self) for forecasts in asked):
            raise ArgumentError(
                "CompressionCallback(epoch='auto') waits for a forecast of what the cut will cost: add "
                "PrehabCallback(..., space='loss') with forecast_every_n_steps above 0, or give an epoch."
            )
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ArgumentError(
                "CompressionCallback(epoch='auto') needs max_epochs: the cut comes before the last one."
            )
        return trainer.max_epochs - 1

    def _decide_on_epoch(self, trainer: "pl.Trainer", batch_idx: int) -> None:
        """Brings the surgery forward to the next epoch, right before its statistics have to be collected."""
        length = batches_per_epoch(trainer)
        if length is None or batch_idx != max(length - self.calibration_batches, 0):
            return
        forecasts = [getattr(other, "forecast", None) for other in callbacks_of(trainer)]
        if any(forecast is not None and forecast < self.forecast_below for forecast in forecasts):
            self.epoch = min(self.epoch, trainer.current_epoch + 1)

    def _fits(self, state: Mapping[str, Any]) -> bool:
        """Whether stored sums are those that the surgery wants: of the epoch before it, and of the same kind."""
        return bool(state.get("statistics")) and state["epoch"] == self.epoch and state["wanted"] == list(self.wanted)

    def _replay(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", factors: Mapping[str, Factors]) -> None:
        """The same edits of modules and optimizers, with stored factors; nobody is told, since it is no new surgery."""
        report = swap_(pl_module, plan_of_factors(pl_module, factors, self.factorization), factors, trainer.optimizers)
        rewrap(trainer, pl_module)
        stored = self._restored.get("report")
        self.report = report if stored is None else CompressionReport.from_dict(stored, self.factorization)

    def _close(self) -> None:
        if self._shell is not None:
            self._shell.close()
        if self._following is not None:
            self._following.remove()
        self._shell = self._following = None

    def _new_collector(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", attach: bool = True) -> Collector:
        targets = self.find_targets(pl_module)
        collector = Collector(
            targets,
            self.wanted,
            drop_overflow=uses_loss_scaling(trainer),
            batches=min(self.calibration_batches, batches_per_epoch(trainer) or self.calibration_batches),
        )
        if attach:
            collector.attach()
            megabytes = collector.memory() / 1e6
            rank_zero_info(f"Calibration of {len(targets)} layers: at most {megabytes:.1f} MB of sums.")
        return collector

    def _operate_if_due(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self.done and trainer.current_epoch >= self.epoch:
            self._operate(trainer, pl_module)

    def _operate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        targets = self.find_targets(pl_module)
        statistics = self._statistics(trainer, pl_module, targets)
        forms = usable_targets(targets, self.policy, self.factorization, statistics)
        require_targets(forms)
        components = self.policy.needs_weight_gradients
        mine, spectra = decompose_together(trainer, forms, self.factorization, statistics, components)
        wishes = self.rank_overrides, self.rank_multiple_of
        chosen = decide_on_rank_zero(
            trainer, lambda: choose_forms(targets, forms, self.policy, self.factorization, spectra, *wishes)
        )
        usable = in_chosen_forms(forms, chosen)
        mine = {name: mine[form] for name, form in chosen.items() if form in mine}
        spectra = {name: spectra[form] for name, form in chosen.items()}
        probes = self._probes(trainer, pl_module, usable, mine) if self.policy.needs_probes else None
        plan = decide_on_rank_zero(
            trainer,
            lambda: plan_ranks(targets, usable, self.policy, self.factorization, spectra, *wishes, probes=probes),
        )
        factors = share_factors(trainer, pl_module, plan, usable, mine)
        report = swap_(pl_module, plan, factors, trainer.optimizers)
        report = report.with_spectra({name: found.singular_values for name, found in spectra.items()})
        rewrap(trainer, pl_module)
        self.report = report
        if self.reset_scores:
            reset_scores_(trainer)
        pl_module.print(f"\n{report}")
        pl_module.log_dict({"compression/keep": report.keep, "compression/model_keep": report.model_keep}, batch_size=1)
        log_report(trainer, report)
        for listener in (*callbacks_of(trainer), pl_module):
            on_surgery = getattr(listener, "on_surgery", None)
            if callable(on_surgery):
                on_surgery(trainer, pl_module, report)

    def _statistics(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", targets: Targets
    ) -> dict[str, LayerStatistics] | None:
        """What the ride has collected, or a pass of our own, summed over the processes."""
        if not any(self.wanted):
            return None
        statistics, older = self._stop_collecting(), self._older
        self._older = None
        if statistics is None:
            statistics = self._own_pass(trainer, pl_module, targets)
        elif older is not None:
            statistics = {name: layer.merge_(older[name]) for name, layer in statistics.items()}
        sum_statistics_(trainer, statistics)
        _warn_if_few_tokens(statistics)
        return statistics

    def _probes(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", usable: Targets, mine: Mapping[str, Decomposition]
    ) -> dict[str, Probe]:
        """Each rank measures its own layers, on its own batches."""
        probes: dict[str, Probe] = {}
        error = None
        try:
            batches = min(self.calibration_batches, PROBE_BATCHES)
            own = Targets({name: usable[name] for name in mine}, {}, None)
            probes = probe_in_own_pass(trainer, pl_module, own, mine, self.policy.probe_keep, batches)
        except Exception as caught:
            error = caught
        raise_together(trainer, error)
        return merge(trainer, probes)

    def _own_pass(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", targets: Targets
    ) -> dict[str, LayerStatistics]:
        statistics, error = None, None
        try:
            statistics = collect_in_own_pass(trainer, pl_module, targets, self.wanted, self.calibration_batches)
        except Exception as caught:
            error = caught
        raise_together(trainer, error)
        assert statistics is not None
        return statistics

    def _stop_collecting(self) -> dict[str, LayerStatistics] | None:
        collector, self._collector = self._collector, None
        if collector is None:
            return None
        collector.detach()
        return collector.statistics


def _warn_if_few_tokens(statistics: Mapping[str, LayerStatistics]) -> None:
    layers = dict.fromkeys(name.partition(":")[0] for name in statistics)  # without form and group
    seen_little = (name for name, layer in statistics.items() if 0 < int(layer.tokens) < 4 * layer.in_features)
    few = list(dict.fromkeys(name.partition(":")[0] for name in seen_little))
    if few:
        rank_zero_warn(
            f"{len(few)} of {len(layers)} layers saw fewer calibration tokens than four times their input size "
            f"(first: {few[0]!r}). Raise calibration_batches, or the shrinkage of the factorization."
        )
