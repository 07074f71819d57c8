"""A spectral penalty in an ordinary training run, until the surgery."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_prehab.callbacks._checkpoint import check_version, dump_statistics, restore_statistics_
from lightning_prehab.callbacks._distributed import decide_on_rank_zero, sum_statistics_
from lightning_prehab.callbacks._penalized import PenalizedLayer, Space, is_reached, wanted_in
from lightning_prehab.callbacks._trainer import (
    batches_per_epoch,
    check_strategy,
    closes_window,
    find_callback,
    gradient_scale,
    loss_scale,
    uses_loss_scaling,
)
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.collector import Collector
from lightning_prehab.errors import ArgumentError, CheckpointError, TargetError, UnsupportedError
from lightning_prehab.regularizers import Penalty, StableRank
from lightning_prehab.schedules import ramp
from lightning_prehab.statistics import LayerStatistics, Wanted
from lightning_prehab.targets import Patterns, Targets, find_targets

Injection = Literal["auto", "loss", "gradient"]

#: Of the state in checkpoints.
STATE_VERSION = 1
#: Training batches that statistics are taken from where no CompressionCallback says how many.
CALIBRATION_BATCHES = 64


class PrehabCallback(pl.Callback):
    """Adds a spectral penalty to the training loss, so that the weights lose little when they are cut.

    Total loss = task loss + ``strength(t)`` x mean over the targets of ``R(M)``, where ``M`` is the weight ``W`` or the
    weight in another metric. The optimizer sees exactly the gradient of that sum, whatever the precision, gradient
    accumulation, clipping and strategy. The loss that the user logs is untouched. With a
    :class:`~lightning_prehab.CompressionCallback` beside it, the penalty stops at the surgery by itself, acts on the
    same targets (those with a trainable weight), and aims at the planned ranks.

    Logged: ``prehab/penalty`` (mean of R), ``prehab/strength``, and at the end of each epoch ``prehab/stable_rank`` and
    ``prehab/effective_rank`` (means over the targets, of the weights themselves).

    Args:
        regularizer: The penalty R; None means :class:`~lightning_prehab.StableRank`.
        strength: Factor on the mean penalty, at least 0; None means the ``default_strength`` of the penalty.
        ramp_steps: Optimizer steps over which the strength rises linearly to its full value.
        space: ``"weight"``: M = W. ``"activation"``: M = W S with S S^T = E[x x^T]. ``"loss"``: M = L^T W S with L L^T
            = E[g g^T], the metric in which the default surgery cuts. The last two collect statistics in the first
            ordinary training steps (as many as the ``calibration_batches`` of the CompressionCallback, else 64), and
            the penalty starts after them. So does a penalty that aims at planned ranks, if the planned factorization
            reads statistics.
        start_epoch: First epoch with the penalty, counted from 0.
        stop_epoch: First epoch without it; None means the surgery, or the end.
        every_n_steps: The penalty is added at every n-th optimizer step only, with the same strength.
        injection: ``"loss"`` adds the penalty in place to the loss in ``on_before_backward``; ``"gradient"`` adds its
            gradient in ``on_before_optimizer_step``. ``"auto"`` takes the first, and the second where the first cannot
            be right: manual optimization (several backward passes may make one step), and DDP with
            ``find_unused_parameters`` (a parameter would be reduced twice). The gradients are the same. At the end of
            an epoch that the accumulation does not divide, Lightning shrinks the task gradient of the incomplete step;
            ``"loss"`` shrinks the penalty with it, ``"gradient"`` does not.
        target_modules: Names or fnmatch patterns; None means the targets of the CompressionCallback, else all that can
            be cut.
        exclude_modules: Names or fnmatch patterns of layers to leave out.

    Raises:
        ArgumentError: If a value is out of range.
        TargetError: When fit starts, if no trainable layer matches.
        UnsupportedError: When fit starts, for strategies other than one device and DDP.

    Reference:
        Qin et al., "Low-Rank Prehab: Preparing Neural Networks for SVD Compression", 2025, https://arxiv.org/abs/2512.01980

    Example::

        trainer = L.Trainer(max_epochs=12, callbacks=[PrehabCallback(), CompressionCallback(epoch=6, keep=0.4)])
    """

    def __init__(
        self,
        regularizer: Penalty | None = None,
        strength: float | None = None,
        *,
        ramp_steps: int = 0,
        space: Space = "weight",
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        every_n_steps: int = 1,
        injection: Injection = "auto",
        target_modules: Patterns = None,
        exclude_modules: Patterns = None,
    ) -> None:
        super().__init__()
        self.regularizer = StableRank() if regularizer is None else regularizer
        self.strength = self.regularizer.default_strength if strength is None else strength
        if not 0 <= self.strength < math.inf:
            raise ArgumentError(f"strength must be finite and not negative, got {strength}.")
        if ramp_steps < 0:
            raise ArgumentError(f"ramp_steps must not be negative, got {ramp_steps}.")
        if space not in ("weight", "activation", "loss"):
            raise ArgumentError(f"space must be 'weight', 'activation' or 'loss', got {space!r}.")
        if start_epoch < 0 or (stop_epoch is not None and stop_epoch <= start_epoch):
            raise ArgumentError(
                f"start_epoch must not be negative and stop_epoch must come after it, got {start_epoch} and "
                f"{stop_epoch}."
            )
        if every_n_steps < 1:
            raise ArgumentError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        if injection not in ("auto", "loss", "gradient"):
            raise ArgumentError(f"injection must be 'auto', 'loss' or 'gradient', got {injection!r}.")
        self.ramp_steps = ramp_steps
        self.space: Space = space
        self.start_epoch = start_epoch
        self.stop_epoch = stop_epoch
        self.every_n_steps = every_n_steps
        self.injection: Injection = injection
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self._steps = 0  # batches with an optimizer step, since the penalty is ready
        self._global_step = 0  # of the Trainer, at the end of the last batch
        self._targets: Targets | None = None
        self._planned: Targets | None = None  # what the ranks are planned for: all targets of the surgery
        self._collector: Collector | None = None
        self._collected = 0  # batches
        self._layers: list[PenalizedLayer] = []
        self._ready = False
        self._into_loss = True
        self._restored: dict[str, Any] = {}
        self._world_size = 1

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work, before anything has been trained."""
        if stage != "fit":
            return
        check_strategy(trainer, self)
        self._restored, self._world_size = {}, trainer.world_size
        compression = find_callback(trainer, CompressionCallback)
        if self.regularizer.needs_rank and compression is None and getattr(self.regularizer, "rank", None) is None:
            raise ArgumentError(
                f"{self.regularizer} aims at a target rank: add a CompressionCallback to take it from, or give it a "
                "rank."
            )

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Finds the targets and decides where to inject."""
        self._release()
        compression = find_callback(trainer, CompressionCallback)
        if compression is not None and compression.done:
            return
        self._targets = self._find_targets(pl_module, compression)
        source = self._rank_source(trainer)
        self._planned = None if source is None else source.find_targets(pl_module)
        self._into_loss = self._injects_into_loss(trainer, pl_module)
        self._steps = 0
        if self._restored:
            self._restore(trainer)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Notes where the run stands."""
        self._global_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Prepares, or starts counting what this step sends through the targets."""
        if self._targets is None or not self._in_season(trainer):
            return
        if not self._ready:
            compression = self._rank_source(trainer)
            wanted = wanted_in(self.space)
            if compression is not None:
                wanted = wanted.union(compression.wanted)
            if not any(wanted):
                self._prepare(trainer, None)
            elif self._collector is None:
                self._collect(trainer, wanted)
        if self._collector is not None:
            self._collector.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Adds the penalty to the loss, in the scale that the loss has here."""
        if self._collector is not None:
            self._collector.loss_scale = loss_scale(trainer)
        # A loss without a graph is the user's mistake; adding to it would hide that and train on the penalty alone.
        if not self._into_loss or not self._acts(trainer) or not loss.requires_grad:
            return
        with torch.autocast(loss.device.type, enabled=False):
            penalty = self._penalty(pl_module, self._layers)
            if penalty is None:
                return
            try:
                loss.add_((penalty * (self._strength() * loss_scale(trainer))).to(loss.dtype))
            except RuntimeError as error:
                raise UnsupportedError(
                    f"This loss cannot be changed in place ({error}); use PrehabCallback(injection='gradient')."
                ) from error

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the gradient of the penalty for the weights of this optimizer."""
        if self._into_loss or not self._acts(trainer):
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = [
            layer for layer in self._layers if id(layer.module.weight) in held and layer.module.weight.requires_grad
        ]
        if all(layer.module.weight.grad is None for layer in layers):
            return  # no backward pass has been made
        weights = [layer.module.weight for layer in layers]
        with torch.enable_grad(), torch.autocast(weights[0].device.type, enabled=False):
            penalty = self._penalty(pl_module, layers)
            if penalty is None:
                return
            gradients = torch.autograd.grad(penalty * self._strength(), weights)
        # Lightning leaves the gradients of a fused optimizer scaled; the optimizer unscales them itself.
        scale = gradient_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight.grad is None:
                weight.grad = gradient.mul_(scale).to(weight.dtype)
            else:
                weight.grad.add_(gradient.to(weight.grad.dtype), alpha=scale)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts steps, and prepares when enough statistics are there."""
        if self._collector is not None:
            self._collector.end_batch()
            self._collected += 1
            if self._collected >= self._wanted_batches(trainer) and closes_window(trainer, batch_idx):
                self._prepare(trainer, self._stop_collecting())
        elif self._ready and self._in_season(trainer) and trainer.global_step > self._global_step:
            self._steps += 1
        self._global_step = trainer.global_step

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Logs how far the spectra have come."""
        if not self._ready or not self._in_season(trainer):
            return
        ranks = [layer.spectral_ranks() for layer in self._layers]
        stable, effective = (torch.stack(values).mean().float() for values in zip(*ranks, strict=True))
        pl_module.log_dict({"prehab/stable_rank": stable, "prehab/effective_rank": effective}, batch_size=1)

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: Any) -> None:
        """The work is done; lets go of the dense layers."""
        self._warn_if_never_ready()
        self._release()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off."""
        self._warn_if_never_ready()
        self._release()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit: steps, metrics, ranks, warm starts; plain data only."""
        collecting = None if self._collector is None else self._collector.statistics
        return {
            "version": STATE_VERSION,
            "steps": self._steps,
            "ready": self._ready,
            "layers": {layer.name: layer.state_dict() for layer in self._layers},
            "collected": self._collected,
            "statistics": dump_statistics(collecting, self._world_size),
            "wanted": None if self._collector is None else list(self._collector.wanted),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the start of fit, when the targets are known."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        self._restored = state_dict

    def _restore(self, trainer: "pl.Trainer") -> None:
        assert self._targets is not None
        state, self._restored = self._restored, {}
        self._steps, self._ready, self._collected = state["steps"], state["ready"], state["collected"]
        for name, stored in state["layers"].items():
            if name not in self._targets:
                raise CheckpointError(
                    f"PrehabCallback: the checkpoint holds the state of layer {name!r}, which is not a target now. "
                    "Resume with the target_modules and exclude_modules that the checkpoint was written with."
                )
            self._layers.append(PenalizedLayer.from_state_dict(name, self._targets[name], stored))
        if state["statistics"]:
            self._collect(trainer, Wanted(*state["wanted"]))
            assert self._collector is not None
            restore_statistics_(self._collector.statistics, state["statistics"], trainer.global_rank)

    def _collect(self, trainer: "pl.Trainer", wanted: Wanted) -> None:
        assert self._targets is not None
        seen = {**(self._planned or {}), **self._targets}
        batches, scaling = self._wanted_batches(trainer), uses_loss_scaling(trainer)
        self._collector = Collector(seen, wanted, drop_overflow=scaling, batches=batches)
        self._collector.attach()

    def _find_targets(self, pl_module: "pl.LightningModule", compression: CompressionCallback | None) -> Targets:
        own = self.target_modules is not None or self.exclude_modules is not None
        if compression is None or own:
            targets = find_targets(pl_module, self.target_modules, self.exclude_modules)
        else:
            targets = compression.find_targets(pl_module)
        for name in [name for name, layer in targets.items() if not layer.weight.requires_grad]:
            targets.skipped[name] = "its weight is frozen"
            del targets[name]
        if not targets:
            raise TargetError("PrehabCallback has nothing to train: the weights of all targets are frozen.")
        return targets

    def _injects_into_loss(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        if self.injection != "auto":
            return self.injection == "loss"
        why = None
        if not pl_module.automatic_optimization:
            why = "manual optimization"
        elif isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._ddp_kwargs.get("find_unused_parameters"):
            why = "find_unused_parameters"
        if why is not None:
            rank_zero_info(f"PrehabCallback adds the penalty to the gradients, not to the loss, because of {why}.")
        return why is None

    def _in_season(self, trainer: "pl.Trainer") -> bool:
        return self.start_epoch <= trainer.current_epoch < (math.inf if self.stop_epoch is None else self.stop_epoch)

    def _acts(self, trainer: "pl.Trainer") -> bool:
        return self._ready and self._in_season(trainer) and self._steps % self.every_n_steps == 0

    def _strength(self) -> float:
        return self.strength * ramp(self._steps, self.ramp_steps)

    def _penalty(self, pl_module: "pl.LightningModule", layers: list[PenalizedLayer]) -> Tensor | None:
        """Sum over the trainable ones of some layers, divided by the number of all; their mean is logged."""
        values = [layer.penalty(self.regularizer) for layer in layers if layer.module.weight.requires_grad]
        if not values:
            return None
        total = torch.stack(values).sum()
        pl_module.log("prehab/penalty", total.detach() / len(values), batch_size=1)
        pl_module.log("prehab/strength", self._strength(), batch_size=1)
        return total / len(self._layers)

    def _rank_source(self, trainer: "pl.Trainer") -> CompressionCallback | None:
        return find_callback(trainer, CompressionCallback) if self.regularizer.needs_rank else None

    def _wanted_batches(self, trainer: "pl.Trainer") -> int:
        """Batches to take statistics from: at most half of those that the penalty has in all."""
        compression = find_callback(trainer, CompressionCallback)
        wanted = CALIBRATION_BATCHES if compression is None else compression.calibration_batches
        length, ends = batches_per_epoch(trainer), [self.stop_epoch, compression.epoch if compression else None]
        ends.append(None if trainer.max_epochs == -1 else trainer.max_epochs)
        known = [end for end in ends if end is not None]
        if length is None or not known:
            return wanted
        return min(wanted, max((min(known) - self.start_epoch) * length // 2, 1))

    def _prepare(self, trainer: "pl.Trainer", statistics: dict[str, LayerStatistics] | None) -> None:
        """Fixes the metric and the target rank of each layer."""
        assert self._targets is not None
        targets, compression = self._targets, self._rank_source(trainer)
        if statistics is not None:
            sum_statistics_(trainer, statistics)
        ranks: Mapping[str, int | None] = {}
        if compression is not None and self._planned is not None:
            planned = self._planned
            plan = decide_on_rank_zero(trainer, lambda: compression.make_plan(planned, statistics))
            ranks = {name: rank for name, rank in plan.ranks.items() if rank is not None}
        self._layers = [
            PenalizedLayer.seen_in(self.space, name, module, ranks.get(name), statistics)
            for name, module in targets.items()
            if (compression is None or name in ranks) and is_reached(self.space, name, statistics)
        ]
        if not self._layers:
            rank_zero_warn(
                "PrehabCallback has nothing to do: no target was reached by the calibration, or all stay dense."
            )
            self._release()
            return
        self._ready = True

    def _stop_collecting(self) -> dict[str, LayerStatistics] | None:
        collector, self._collector = self._collector, None
        if collector is None:
            return None
        collector.detach()
        return collector.statistics

    def _warn_if_never_ready(self) -> None:
        if self._collector is not None:
            rank_zero_warn(
                f"PrehabCallback was still collecting statistics ({self._collected} batches) when its time was over: "
                "no penalty was applied. Train longer, or lower calibration_batches of the CompressionCallback."
            )

    def _release(self) -> None:
        self._stop_collecting()
        self._targets, self._planned, self._layers, self._ready, self._collected = None, None, [], False, 0
