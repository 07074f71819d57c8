"""A spectral regularizer in an ordinary training run, until the surgery."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prehab.callbacks._arguments import (
    changed_for_penalties,
    check_regularizer,
    check_when_and_where,
    default_strength,
)
from lightning_prehab.callbacks._checkpoint import check_version
from lightning_prehab.callbacks._course import note_spectra, note_start
from lightning_prehab.callbacks._decisions import (
    ONE_PREHAB,
    Injection,
    check_target_rank,
    choose_rank_source,
    choose_space,
    choose_targets,
    default_regularizer,
    injects_into_loss,
    penalty_without_an_end,
    planned_by,
    settled,
)
from lightning_prehab.callbacks._forecast import Forecast
from lightning_prehab.callbacks._injection import Pull, add_to_gradients_, add_to_loss_, penalty_of, pull_of
from lightning_prehab.callbacks._preparation import Preparation
from lightning_prehab.callbacks._regularized import RegularizedLayer, Space
from lightning_prehab.callbacks._schedules import ramp
from lightning_prehab.callbacks._seasons import ActsInSeason
from lightning_prehab.callbacks._self_distillation import put_beside
from lightning_prehab.callbacks._shared_work import own_part, reshard_if_sharded_, restored, shrink_together_, states_of
from lightning_prehab.callbacks._timeline import batches_to_watch, check_season
from lightning_prehab.callbacks._trainer import (
    EQUAL,
    check_strategy,
    closes_window,
    find_callback,
    gradient_scale,
    log_number,
    loss_scale,
)
from lightning_prehab.callbacks._way import Way
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.documents.checks import check_real
from lightning_prehab.regularizers import GradientRatio, Penalty, Shrinkage
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.names import Patterns

#: Of the state in checkpoints.
STATE_VERSION = 1


class PrehabCallback(ActsInSeason):
    """Regularizes the spectra of the weights in training, so that they lose little when they are cut.

    With a penalty, total loss = task loss + ``strength(t)`` x mean over the targets of ``R(M)``, where ``M`` is the
    weight ``W`` or the weight in another metric. The optimizer sees exactly the gradient of that sum, whatever the
    precision, gradient accumulation, clipping and strategy. The loss that the user logs is untouched. With a shrinkage,
    the weights are changed after each optimizer step instead, and nothing is added to the loss. With a
    :class:`~lightning_prehab.CompressionCallback` beside it, the regularizer stops at the surgery by itself, acts on
    the same targets (those with a trainable weight), and aims at the planned ranks; of several surgeries at each.

    Logged: ``prehab/penalty`` (mean of R) and ``prehab/strength``, or ``prehab/progress`` for a shrinkage; every
    ``forecast_every_n_steps`` steps, where target ranks are known, ``prehab/tail_energy`` (share of the energy that the
    cut would drop now, mean over the layers) and in the loss space ``prehab/forecast`` (what the cut would add now to
    the loss that ``training_step`` returns; tried on a copy of the module, and in the progress bar too); at the end of
    each epoch ``prehab/stable_rank`` and ``prehab/effective_rank`` (means over the targets, of the weights themselves).

    Args:
        regularizer: A penalty or a shrinkage. None means :class:`~lightning_prehab.TailShrinkage` toward the planned
            ranks, which makes the cut itself free; where there is no CompressionCallback to plan them, or a setting is
            given that penalties alone have (a warning says so), or the end of the time before the cut cannot be
            foreseen, :class:`~lightning_prehab.StableRank`. As measured (``benchmarks/prehab_gpt.py``,
            ``prehab_sst2.py``) the default is ahead right after the cut, but in the end not better than cutting first
            and training all those steps after the cut: use it where the moment of the cut counts.
        strength: Factor on the mean penalty, at least 0; None means the ``default_strength`` of the penalty. Shrinkages
            have none.
        ramp_steps: Optimizer steps over which the strength rises linearly to its full value.
        space: ``"weight"``: M = W. ``"activation"``: M = W S with S S^T = E[x x^T]. ``"loss"``: M = L^T W S with L L^T
            = E[g g^T], the metric in which the default surgery cuts. None means the metric of the planned cut for a
            regularizer that aims at planned ranks, else ``"weight"``. The last two collect statistics in the first
            ordinary training steps (as many as the ``calibration_batches`` of the CompressionCallback, else 64), and
            the regularizer starts after them. So does one that aims at planned ranks, if the planned factorization
            reads statistics.
        start_epoch: First epoch with the regularizer, counted from 0.
        stop_epoch: First epoch without it; None means the surgery, or the end.
        every_n_steps: The penalty is added at every n-th optimizer step only, with the same strength.
        injection: ``"loss"`` adds the penalty in place to the loss in ``on_before_backward``; ``"gradient"`` adds its
            gradient in ``on_before_optimizer_step``. ``"auto"`` takes the first, and the second where the first cannot
            be right: manual optimization (several backward passes may make one step), DDP with
            ``find_unused_parameters`` (a parameter would be reduced twice), sharded weights, and a
            ``strength_share``. The gradients are
            the same. At the end of an epoch that the accumulation does not divide, Lightning shrinks the task gradient
            of the incomplete step; ``"loss"`` shrinks the penalty with it, ``"gradient"`` does not.
        target_modules: Names or fnmatch patterns; None means the targets of the CompressionCallback, else all that can
            be cut.
        exclude_modules: Names or fnmatch patterns of layers to leave out.
        strength_share: Instead of a strength, the share of the task gradient's norm that the penalty's gradient shall
            have over the targets, for example 0.1: penalties have no common scale, shares have. Measured at each step
            and smoothed.
        update_steps: Optimizer steps after which statistics, metric and planned ranks are taken anew; 0 means never.
        forecast_every_n_steps: Optimizer steps between two forecasts; 0 means none.
        self_distillation: Factor on the distance to the model from before prehab, which is then kept as a teacher, in
            memory and in checkpoints, up to the cut: see :class:`~lightning_prehab.RehabDistillation`. 0 means none.
            Logged as ``prehab/distillation``.

    Attributes:
        forecast: The last ``prehab/forecast``, or None.

    Raises:
        ArgumentError: If a value is out of range.
        TargetError: When fit starts, if no trainable layer matches.
        UnsupportedError: When fit starts, for strategies other than one device, DDP and ModelParallelStrategy (FSDP2),
            for ``injection="loss"`` under the last, or for a shrinkage whose end cannot be foreseen; at the end of the
            first epoch, if weights move and no step of their optimizer is ever seen (steps are what the optimizers of
            the Trainer do, and those inside of them, announced or not).

    Reference:
        Qin et al., "Low-Rank Prehab: Preparing Neural Networks for SVD Compression", 2025, https://arxiv.org/abs/2512.01980

    Example::

        trainer = L.Trainer(max_epochs=12, callbacks=[PrehabCallback(), CompressionCallback(epoch=6, keep=0.4)])
    """

    def __init__(
        self,
        regularizer: Penalty | Shrinkage | None = None,
        strength: float | None = None,
        *,
        ramp_steps: int = 0,
        space: Space | None = None,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        every_n_steps: int = 1,
        injection: Injection = "auto",
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
        strength_share: float | None = None,
        update_steps: int = 200,
        forecast_every_n_steps: int = 50,
        self_distillation: float = 0.0,
    ) -> None:
        super().__init__()
        penalty = strength, strength_share, ramp_steps, every_n_steps, injection
        self._implying = changed_for_penalties(*penalty) if regularizer is None else {}  # settings that ask for one
        self._open = regularizer is None and not self._implying  # decided when the Trainer is known
        if regularizer is None:
            regularizer = default_regularizer(planned=self._open)
        check_regularizer(regularizer, *penalty)
        self.regularizer: Penalty | Shrinkage = regularizer
        self.strength = default_strength(regularizer) if strength is None else strength
        check_when_and_where(space, start_epoch, stop_epoch, update_steps, forecast_every_n_steps)
        self._asked_space: Space | None = space
        self.space: Space = "weight" if space is None else space
        self.start_epoch, self.stop_epoch = start_epoch, stop_epoch
        self.ramp_steps, self.every_n_steps = ramp_steps, every_n_steps
        self.injection: Injection = injection
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.strength_share = strength_share
        self.update_steps, self.forecast_every_n_steps = update_steps, forecast_every_n_steps
        check_real("self_distillation", self_distillation, "[0, inf)")
        self.self_distillation = self_distillation
        self._preparation: Preparation | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        """Forgets what an earlier fit has left, that of another module perhaps."""
        self._begin_count()
        self._release()
        self._into_loss, self._world_size, self._global_rank = True, 1, 0

    def _begin_count(self) -> None:
        self.forecast: float | None = None
        self._ratio = None if self.strength_share is None else GradientRatio(self.strength_share)
        self._way = Way()
        self._restored: dict[str, Any] = {}

    def _release(self) -> None:
        """Lets go of the model and of the optimizers."""
        preparation, self._preparation = self._preparation, None
        if preparation is not None:
            preparation.close()
        self._stop_watching()
        self._targets: Targets | None = None
        self._planned: Targets | None = None  # what the ranks are planned for: all targets of the surgery
        self._layers: list[RegularizedLayer] = []
        self._outlook = Forecast()
        self._way.ready = False

    def forecasts(self, compression: CompressionCallback) -> bool:
        """Whether the loss increase of a cut is predicted during training."""
        regularizer = default_regularizer(planned=True) if self._open else self.regularizer
        return choose_space(self._asked_space, regularizer, compression) == "loss" and self.forecast_every_n_steps > 0

    def renew_forecast(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Tries the cut on a batch, with the weights of now: for whoever decides by ``forecast``."""
        if self._targets is not None and self._way.ready:
            arguments = trainer, pl_module, self._targets, self._layers, batch, batch_idx
            self.forecast = self._outlook.try_now(*arguments)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work, before anything has been trained."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.refuse_others(trainer, PrehabCallback, ONE_PREHAB)
        check_strategy(trainer, self, sharded=True)
        self._start_anew()
        self._world_size, self._global_rank = trainer.world_size, trainer.global_rank
        compression = find_callback(trainer, CompressionCallback)
        self.regularizer = settled(self.regularizer, self._open, self._implying, compression)
        self.strength = default_strength(self.regularizer) if self._open else self.strength
        self.space = choose_space(self._asked_space, self.regularizer, compression)
        check_target_rank(self.regularizer, compression)
        put_beside(trainer, self.self_distillation, self._in_season)

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Finds the targets and decides where to inject."""
        reshard_if_sharded_(pl_module)
        if not self._is_over(trainer):
            check_season(trainer, self.start_epoch, type(self).__name__, self.goes_on)
            self._look(trainer, pl_module)
        if self._restored and self._targets is not None:
            self._restore(pl_module, self._targets)

    def _look(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        compression = find_callback(trainer, CompressionCallback)
        self._targets = choose_targets(pl_module, compression, self.target_modules, self.exclude_modules)
        self._planned = planned_by(self._rank_source(trainer), pl_module)
        self._into_loss = injects_into_loss(trainer, pl_module, self.regularizer, self.injection, self.strength_share)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watches the optimizers, and goes on with a preparation that was under way."""
        if reshard_if_sharded_(pl_module):  # what such a module holds, and our state, have been loaded since
            self._release()
            self.on_fit_start(trainer, pl_module)
        if self._targets is not None:
            self._watch_steps(trainer, pl_module)
        if isinstance(self.regularizer, Shrinkage) and self._remaining(trainer, -1) is None:
            self.regularizer = penalty_without_an_end(self.regularizer, may_replace=self._open)
            self.strength = default_strength(self.regularizer)
            self.space = choose_space(self._asked_space, self.regularizer, find_callback(trainer, CompressionCallback))
        under_way, self._restored = self._restored.get("preparation"), {}
        if under_way is not None and self._targets is not None:
            self._preparation = self._new_preparation(trainer)
            self._preparation.load_state_dict(under_way)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Prepares, or starts counting what this step sends through the targets."""
        if self._targets is not None and self._in_season(trainer):
            due = self._way.steps % max(self.forecast_every_n_steps, 1) == self.forecast_every_n_steps - 1
            self._outlook.follow(trainer, pl_module, self._targets, self._layers, batch, batch_idx, look=due)
            if self._preparation is None and (not self._way.ready or self._update_is_due(trainer, batch_idx)):
                self._preparation = self._new_preparation(trainer)
                if not self._way.ready and self._preparation.is_complete:
                    self._take_over(trainer, batch_idx - 1)
            if self._preparation is not None:
                self._preparation.begin_batch(batch)
        self._begin_batch(trainer, pl_module, self._weights())

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Adds the penalty to the loss, in the scale that the loss has here."""
        if self._preparation is not None:
            self._preparation.note_loss_scale(trainer)
        # A loss without a graph is the user's mistake; adding to it would hide that and train on the penalty alone.
        if not self._into_loss or not self._acts(trainer) or not loss.requires_grad:
            return
        with torch.autocast(loss.device.type, enabled=False):
            assert isinstance(self.regularizer, Penalty)
            mine = own_part(self._layers, self._global_rank, self._world_size)
            penalty, mean = penalty_of(self.regularizer, self._layers, mine, self._world_size) or (None, None)
            if penalty is None or mean is None:
                return
            pl_module.log("prehab/penalty", mean, batch_size=1, sync_dist=self._world_size > 1)
            strength = self.strength * self._ramp()
            log_number(pl_module, "prehab/strength", strength)
            add_to_loss_(loss, penalty, strength * loss_scale(trainer))

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shrinks, counts steps, and takes over metrics and ranks when enough statistics are there."""
        stepped = self._weight_steps is not None and self._weight_steps.end_batch(self._weights())
        if self._way.ready and self._in_season(trainer):
            last = self._remaining(trainer, batch_idx) == 0  # all has to be done, whoever steps in this batch
            if stepped or last:
                self._shrink(trainer, pl_module, batch_idx)
            self._way.steps += stepped
            every = self.forecast_every_n_steps
            if (stepped or last) and every > 0 and (last or self._way.is_due(every)):
                self.forecast = self._outlook.log(pl_module, self._layers, self.forecast)
        if self._preparation is not None:
            self._preparation.end_batch()
            if self._preparation.is_complete and closes_window(trainer, batch_idx):
                self._take_over(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Logs how far the spectra have come; no step of an optimizer may have gone unseen."""
        if self._weight_steps is not None:
            self._weight_steps.check_seen(self)
        if not self._way.ready or not self._in_season(trainer):
            return
        pl_module.log_dict(note_spectra(trainer, self._layers), batch_size=1, **EQUAL)

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: Any) -> None:
        """The work is done, until the next surgery; lets go of the layers, and takes the forecast out of the bar."""
        trainer.progress_bar_metrics.pop("prehab/forecast", None)
        if self._preparation is not None and not self._way.ready:
            self._preparation.warn_of_lost_time()
        self._release()
        self._go_on(trainer, pl_module, report)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off, as the surgery does."""
        self.on_surgery(trainer, pl_module, None)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off; what was collected stays for a checkpoint that is written now."""
        if self._preparation is not None:
            self._preparation.detach()
        self._stop_watching()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit: steps, metrics, ranks, warm starts; plain data only."""
        preparation = self._preparation
        owned = self._into_loss and isinstance(self.regularizer, Penalty)
        return {
            "version": STATE_VERSION,
            **self._way.state_dict(),
            "forecast": self.forecast,
            "outlook": self._outlook.state_dict(),
            "ratio": None if self._ratio is None else self._ratio.state_dict(),
            "layers": states_of(self._layers, owned, self._global_rank, self._world_size),
            "preparation": None if preparation is None else preparation.state_dict(self._world_size),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the start of fit, when the targets are known."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        self._restored = state_dict

    def _restore(self, pl_module: "pl.LightningModule", targets: Targets) -> None:
        """All but a preparation under way, which waits for the start of training."""
        state = self._restored
        self._way, self.forecast = Way.from_state_dict(state), state["forecast"]
        self._outlook.load_state_dict(state.get("outlook", self._outlook.state_dict()))
        if self._ratio is not None and state["ratio"] is not None:
            self._ratio.load_state_dict(state["ratio"])
        self._layers = restored(pl_module, targets, state["layers"], self.regularizer)

    def _acts(self, trainer: "pl.Trainer") -> bool:
        """Whether a penalty is due at this step."""
        acts = self._way.ready and self._in_season(trainer) and isinstance(self.regularizer, Penalty)
        return acts and self._way.is_due(self.every_n_steps)

    def _ramp(self) -> float:
        return ramp(self._way.steps, self.ramp_steps)

    def _weights(self) -> list[Tensor]:
        return [layer.parameter for layer in self._layers]

    def _before_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the gradient of the penalty for the weights of this optimizer."""
        if self._into_loss or not self._acts(trainer):
            return
        # Lightning leaves the gradients of a fused optimizer scaled; the optimizer unscales them itself.
        scale = gradient_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        full = self.strength if self._ratio is None else self._ratio
        pull = partial(self._pull, trainer, pl_module)
        used = add_to_gradients_(optimizer, self._layers, pull, full, self._ramp(), scale)
        if used is not None:
            log_number(pl_module, "prehab/strength", used)

    def _pull(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", layers: Sequence[RegularizedLayer]
    ) -> Pull | None:
        """What :func:`pull_of` says; the mean is logged."""
        assert isinstance(self.regularizer, Penalty)
        found, mean = pull_of(trainer, self.regularizer, self._layers, layers) or (None, None)
        if mean is not None:
            pl_module.log("prehab/penalty", mean, batch_size=1)
        return found

    def _shrink(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch_idx: int) -> None:
        """Applies a shrinkage to the trainable weights that an optimizer has stepped."""
        if not isinstance(self.regularizer, Shrinkage) or self._weight_steps is None:
            return
        progress = self._way.share_done(self._remaining(trainer, batch_idx))
        log_number(pl_module, "prehab/progress", progress)
        shrink_together_(trainer, self._layers, self.regularizer, progress, self._weight_steps.rates)

    def _rank_source(self, trainer: "pl.Trainer") -> CompressionCallback | None:
        compression = find_callback(trainer, CompressionCallback)
        return choose_rank_source(compression, self.regularizer, self.space, self.forecast_every_n_steps > 0)

    def _update_is_due(self, trainer: "pl.Trainer", batch_idx: int) -> bool:
        """Whether metric and ranks, if there are any to find, are to be found anew."""
        if not self._way.is_old(self.update_steps):
            return False
        if self.space == "weight" and self._rank_source(trainer) is None:
            return False
        return self._way.leaves_time(self._remaining(trainer, batch_idx))

    def _new_preparation(self, trainer: "pl.Trainer") -> Preparation:
        assert self._targets is not None
        planned, source = self._planned or Targets({}, {}, None), self._rank_source(trainer)
        again = self.update_steps // 4 if self._way.ready else None
        batches = batches_to_watch(trainer, self.start_epoch, self.stop_epoch, again)
        only_cut = source is not None and self.regularizer.needs_rank
        return Preparation(trainer, self._targets, self.space, source, planned, batches, only_cut)

    def _take_over(self, trainer: "pl.Trainer", batch_idx: int) -> None:
        """From now on the regularizer acts with the metric and the target rank that the preparation has found."""
        assert self._preparation is not None
        layers, self._preparation = self._preparation.finish(trainer), None
        if not layers:
            rank_zero_warn("PrehabCallback has nothing to do: no target was reached in training, or all stay dense.")
            self._release()
            return
        if not self._way.ready:
            self._way.begin(self._remaining(trainer, batch_idx))
            note_start(trainer, layers)
        self._layers, self._way.planned_at = layers, self._way.steps
        if self.space == "loss" and self.forecast_every_n_steps > 0:
            self._outlook.begin()
