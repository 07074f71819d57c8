"""Learning-rate schedule after the surgery, on top of whatever scheduler the user has."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prehab.callbacks._checkpoint import check_version
from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._scaled_rates import RestoreRates, ScaledRates, check_groups
from lightning_prehab.callbacks._schedules import Shape, between
from lightning_prehab.callbacks._sharded_checkpoint import ShardedFollowing, followed_load
from lightning_prehab.callbacks._steps import are_of_now, check_seen
from lightning_prehab.callbacks._timeline import rest_of_run, steps_of_epochs
from lightning_prehab.callbacks._trainer import (
    batches_per_epoch,
    callbacks_of,
    find_callback,
    move_to_front,
    set_callbacks,
    shards,
)
from lightning_prehab.callbacks._warmup_and_decay import UNITS, Progress, WarmupAndDecay
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.targets.locate import low_rank_layers

#: Of the state in checkpoints.
STATE_VERSION = 1


class RehabSchedule(OnlyOne):
    """Schedules the learning rate after the surgery: effective rate = the user's rate times a factor.

    The factor rises from ``start_factor`` at the first step after the surgery to ``peak_factor`` at the end of the
    warm-up. There it stays, or falls to ``end_factor``. It is applied around ``optimizer.step`` alone and undone before
    any scheduler steps, so the user's scheduler runs exactly as without it and checkpoints hold the user's own rate;
    LearningRateMonitor shows the rate that is used. The surgery announces itself: there is no epoch number to repeat
    here. After each of several cuts the warm-up starts anew, and the decay comes after the last one. Without a
    CompressionCallback, in the training of a model that is cut already, the first step of the run is that after the
    surgery.

    Args:
        warmup_steps: Length in optimizer steps.
        warmup_epochs: Length in epochs, may be a fraction; one epoch if neither length is given. They are counted in
            the steps that these epochs are going to have, a GradientAccumulationScheduler included; with manual
            optimization in batches.
        start_factor: Factor at the first step, at least 0.
        peak_factor: Factor at the end of the warm-up, above 0.
        shape: ``"linear"`` or ``"cosine"``, of the warm-up and of the decay.
        end_factor: Factor at the end of the decay, at least 0; None means no decay. Like a scheduler of torch, it gets
            there after the last step.
        decay_steps: Length of the decay in optimizer steps, from the end of the warm-up on. Without a length it ends
            with the run, as ``max_epochs`` and ``max_steps`` of the Trainer say.
        decay_epochs: The same in epochs, counted as those of the warm-up.
        group_factors: ``{group: number}``: another factor for parameter groups, on top and from the surgery on. A group
            is told by its ``"name"`` (or an fnmatch pattern of it) or by its number, counted from 0 over all
            optimizers. Later keys win.

    Raises:
        ArgumentError: If a value is out of range, or both lengths are given; when training starts, if a key of
            ``group_factors`` is no group.
        UnsupportedError: When fit starts, if there is neither a CompressionCallback nor a low-rank layer, or another
            RehabSchedule; when training starts, if the length of an epoch or the end of the run is needed and not
            known; at the end of the first epoch, if parameters move and no step of their optimizer is ever seen.

    Example::

        trainer = L.Trainer(callbacks=[CompressionCallback(epoch=6), RehabSchedule(warmup_steps=200, end_factor=0.1)])
    """

    def __init__(
        self,
        warmup_steps: int | None = None,
        warmup_epochs: float | None = None,
        *,
        start_factor: float = 0.1,
        peak_factor: float = 1.0,
        shape: Shape = "linear",
        end_factor: float | None = None,
        decay_steps: int | None = None,
        decay_epochs: float | None = None,
        group_factors: Mapping[int | str, float] | None = None,
    ) -> None:
        super().__init__()
        for phase, steps, epochs in (("warmup", warmup_steps, warmup_epochs), ("decay", decay_steps, decay_epochs)):
            if steps is not None and epochs is not None:
                raise ArgumentError(f"Give {phase}_steps or {phase}_epochs, not both.")
            check_whole(f"{phase}_steps", steps, 0, optional=True)
            check_real(f"{phase}_epochs", epochs, "[0, inf)", optional=True)
            if phase == "decay" and end_factor is None and (steps is not None or epochs is not None):
                raise ArgumentError("A decay has to lead somewhere, and end_factor is None; give a number.")
        check_real("start_factor", start_factor, "[0, inf)")
        check_real("peak_factor", peak_factor, "(0, inf)")
        check_real("end_factor", end_factor, "[0, inf)", optional=True)
        if shape not in ("linear", "cosine"):
            raise ArgumentError(f"shape must be 'linear' or 'cosine', got {shape!r}.")
        if not isinstance(group_factors, Mapping | None):
            raise ArgumentError(f"group_factors is {{group: number}} or None, got {group_factors!r}.")
        for group, factor in (group_factors or {}).items():
            if not isinstance(group, str):
                check_whole("A group in group_factors", group, 0)
            check_real(f"group_factors[{group!r}]", factor, "[0, inf)")
        self.warmup_steps = warmup_steps
        self.warmup_epochs = 1.0 if warmup_steps is None and warmup_epochs is None else warmup_epochs
        self.start_factor = start_factor
        self.peak_factor = peak_factor
        self.shape: Shape = shape
        self.end_factor = end_factor
        self.decay_steps = decay_steps
        self.decay_epochs = decay_epochs
        self.group_factors = dict(group_factors or {})
        self._course: WarmupAndDecay | None = None  # once the surgery is done
        self._module: pl.LightningModule | None = None
        self._rates: list[ScaledRates] = []
        self._following: RemovableHandle | ShardedFollowing | None = None
        self._run_steps = 0  # that the Trainer has counted at the end of the last batch
        self._new_lengths = False  # than the checkpoint was written with

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Looks for the surgery, and moves before LearningRateMonitor."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.refuse_others(trainer, RehabSchedule, "both would scale the same learning rates. Keep one of them.")
        if self._module is not pl_module or not low_rank_layers(pl_module):
            self._module, self._course = pl_module, None  # nothing has been cut yet
        elif self._course is not None:
            self._course.forget_end()
        self._run_steps = 0
        if find_callback(trainer, CompressionCallback) is None:
            self._following = followed_load(trainer, pl_module)
        move_to_front(trainer, self)
        others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, RestoreRates)]
        set_callbacks(trainer, [*others, RestoreRates(self._restore)])

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuses a run without a surgery before it or in it."""
        if not shards(trainer):  # else a checkpoint is yet to be loaded
            self._check_cut(trainer, pl_module)

    def _check_cut(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._stop_following()
        if find_callback(trainer, CompressionCallback) is None and not low_rank_layers(pl_module):
            raise UnsupportedError(
                "RehabSchedule warms up after a surgery, and the model has no low-rank layer; add a "
                "CompressionCallback to the Trainer, or train a model that is cut already."
            )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Puts the step hooks on the optimizers; they are idle until the surgery."""
        if shards(trainer):
            self._check_cut(trainer, pl_module)
        self._check_lengths(trainer, pl_module)
        check_groups(trainer.optimizers, self.group_factors)
        self._follow(trainer)
        self._run_steps = trainer.global_step
        length = batches_per_epoch(trainer)
        into_epoch = trainer.fit_loop.epoch_loop.batch_progress.current.ready % length if length else 0
        if self._new_lengths and self._course is not None:
            self._course.take_lengths(*self._lengths(trainer))
            self._find_end(trainer, pl_module, into_epoch)
        self._new_lengths = False
        if self._course is None and find_callback(trainer, CompressionCallback) is None:
            self._begin(trainer, pl_module, last=True, into_epoch=into_epoch)
        elif self._course is not None and self._course.limits != _limits(trainer):
            self._find_end(trainer, pl_module, into_epoch)

    def _check_lengths(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for phase, epochs in (("warmup", self.warmup_epochs), ("decay", self.decay_epochs)):
            if epochs is not None and batches_per_epoch(trainer) is None:
                raise UnsupportedError(
                    f"The length of an epoch is not known here; give RehabSchedule({phase}_steps=...)."
                )
        if self._ends_with_run and not rest_of_run(trainer, pl_module):
            raise UnsupportedError(
                f"RehabSchedule(end_factor={self.end_factor}) decays to the end of the run, which is not known here: "
                "it takes max_steps, or max_epochs and loaders that tell their length. Give max_steps to the Trainer, "
                "or RehabSchedule(decay_steps=...)."
            )

    @property
    def _ends_with_run(self) -> bool:
        return self.end_factor is not None and self.decay_steps is None and self.decay_epochs is None

    def _follow(self, trainer: "pl.Trainer") -> None:
        """Scales the rates of the optimizers of now, which somebody may have made anew."""
        self._remove()
        count = len(trainer.optimizers)
        if self._course is not None and len(self._course.optimizers) != count:
            self._course.optimizers = [Progress() for _ in range(count)]
        self._rates, first = [], 0
        for index, optimizer in enumerate(trainer.optimizers):
            calls = partial(self._scale, index), partial(self._stepped, index)
            self._rates.append(ScaledRates(optimizer, *calls, self.group_factors, first))
            first += len(optimizer.param_groups)

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: CompressionReport) -> None:
        """Starts the warm-up."""
        surgeon = find_callback(trainer, CompressionCallback)
        self._begin(trainer, pl_module, last=surgeon is None or surgeon.done)
        self._apply()

    def _begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", last: bool, into_epoch: int = 0) -> None:
        """The next step is the first one after a cut."""
        warmup, decay = self._lengths(trainer)
        self._course = WarmupAndDecay(warmup, [Progress() for _ in trainer.optimizers], decay, last=last)
        self._find_end(trainer, pl_module, into_epoch)
        self._course.note_warm()
        if self._course.last and not getattr(trainer, "fast_dev_run", False):
            self._warn_of_too_little_time(rest_of_run(trainer, pl_module, into_epoch))

    def _lengths(self, trainer: "pl.Trainer") -> tuple[dict[str, int], dict[str, int] | None]:
        """Of the warm-up, and of the decay if it is known."""

        def length(steps: int | None, epochs: float | None, before: float = 0.0) -> dict[str, int]:
            if epochs is None:
                return {"steps": steps or 0}
            both, first = (round(steps_of_epochs(trainer, number)) for number in (before + epochs, before))
            return {self._unit_of(epochs): both - first}

        decays = self.decay_steps is not None or self.decay_epochs is not None
        decay = length(self.decay_steps, self.decay_epochs, self.warmup_epochs or 0.0) if decays else None
        return length(self.warmup_steps, self.warmup_epochs), decay

    def _given_lengths(self) -> list[float | bool | None]:
        return [self.warmup_steps, self.warmup_epochs, self.decay_steps, self.decay_epochs, self._ends_with_run]

    def _warn_of_too_little_time(self, rest: Mapping[str, int]) -> None:
        assert self._course is not None
        for unit, length in self._course.warmup.items():
            left = rest.get(unit, length)
            if left < length:
                reached = between(self.start_factor, self.peak_factor, max(left - 1, 0) / length, self.shape)
                decay = "" if self.end_factor is None else f" There is no decay to end_factor={self.end_factor:g}."
                rank_zero_warn(
                    f"RehabSchedule: the warm-up takes {length} {unit}, and {left} are left of the run after the cut. "
                    f"The learning rate comes to {reached:.3g} times yours in the last one, not to peak_factor="
                    f"{self.peak_factor:g}.{decay} Give a shorter warm-up (warmup_steps, warmup_epochs), cut earlier, "
                    "or train longer."
                )
                return
            both = length + (self._course.decay or {}).get(unit, 0)
            if left < both and unit in rest:
                rank_zero_warn(
                    f"RehabSchedule: warm-up and decay take {both} {unit}, and {left} are left of the run after the "
                    f"cut: the learning rate does not fall to end_factor={self.end_factor:g}. Give a shorter decay "
                    "(decay_steps, decay_epochs), or no length: then it ends with the run."
                )

    def _unit_of(self, epochs: float | None) -> str:
        """By hand an optimizer may step at every batch or at some: only batches tell how long an epoch is."""
        manual = self._module is not None and not self._module.automatic_optimization
        return "batches" if manual and epochs is not None else "steps"

    def _find_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", into_epoch: int) -> None:
        assert self._course is not None
        if self._ends_with_run and self._course.last:
            self._course.end_after(rest_of_run(trainer, pl_module, into_epoch), _limits(trainer))

    def factor(self, optimizer_index: int = 0) -> float:
        """The factor on the learning rate of the next step of an optimizer; 1 before the surgery.

        That of a group is on top of it.
        """
        if self._course is None:
            return 1.0
        path = self.start_factor, self.peak_factor, self.end_factor, self.shape
        return self._course.factor(optimizer_index, *path)

    def _scale(self, optimizer_index: int) -> float | None:
        """The same, but None before the surgery: groups have no factor either, then."""
        return None if self._course is None else self.factor(optimizer_index)

    def _stepped(self, optimizer_index: int) -> None:
        """Notes that an optimizer has made a step; called by its step hook."""
        if self._course is not None:
            self._course.count_step(optimizer_index)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Shows LearningRateMonitor the rate that the epoch starts with."""
        self._apply()

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Shows LearningRateMonitor the rate of the step to come."""
        if not are_of_now([rates.watch for rates in self._rates], trainer.optimizers):
            self._follow(trainer)
        for rates in self._rates:
            rates.watch.forget()
        self._apply()

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Applies the factor to a rate that ``training_step`` has set; takes it back where loss scaling may skip."""
        for rates in self._rates:
            if rates.optimizer is optimizer and rates.watch.in_step:
                rates.apply()
            elif rates.optimizer is optimizer:
                rates.restore()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Hands the user's own rates back, for checkpoints; counts what the Trainer counts."""
        self._restore()
        steps, self._run_steps = trainer.global_step - self._run_steps, trainer.global_step
        if self._course is not None:
            self._course.count_batch(steps)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hands the user's own rates back, for checkpoints; no step of an optimizer may have gone unseen."""
        self._restore()
        watches = [rates.watch for rates in self._rates]
        if are_of_now(watches, trainer.optimizers):
            check_seen(watches, self)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off the optimizers."""
        self._remove()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Takes the helper out of the Trainer."""
        self._stop_following()
        set_callbacks(trainer, [c for c in callbacks_of(trainer) if not isinstance(c, RestoreRates)])

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Hands the user's own rates back and takes the hooks off."""
        self._remove()
        self._stop_following()

    def state_dict(self) -> dict[str, Any]:
        """How far the rehab has come; plain data only."""
        course = None if self._course is None else self._course.to_dict()
        return {"version": STATE_VERSION, "course": course, "lengths": self._given_lengths()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written; lengths that are given anew count from the cut on."""
        check_version(state_dict, STATE_VERSION, type(self).__name__)
        if "course" not in state_dict:  # written before there was a decay
            length, unit = state_dict["length"], self._unit_of(self.warmup_epochs)
            made = [Progress({**dict.fromkeys(UNITS, 0), unit: done}) for done in state_dict["done"]]
            self._course = None if length is None else WarmupAndDecay({unit: length}, made)
            return
        self._new_lengths = state_dict.get("lengths", self._given_lengths()) != self._given_lengths()
        course = state_dict["course"]
        self._course = None if course is None else WarmupAndDecay.from_dict(course)

    def _apply(self) -> None:
        for rates in self._rates:
            rates.apply()

    def _restore(self) -> None:
        """Hands the user's own rates back."""
        for rates in self._rates:
            rates.restore()

    def _remove(self) -> None:
        for rates in self._rates:
            rates.remove()
        self._rates = []

    def _stop_following(self) -> None:
        if self._following is not None:
            self._following.remove()
            self._following = None


def _limits(trainer: "pl.Trainer") -> list[int | None]:
    return [trainer.max_epochs, trainer.max_steps]
