"""After the cut the model learns from the dense one that it was."""

from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_prehab.callbacks._checkpoint import check_version
from lightning_prehab.callbacks._distiller import Distiller, Form, Forward
from lightning_prehab.callbacks._keeper import Precision
from lightning_prehab.callbacks._only_one import OnlyOne
from lightning_prehab.callbacks._schedules import Shape, between
from lightning_prehab.callbacks._self_distillation import SelfDistillation
from lightning_prehab.callbacks._timeline import rest_of_run, steps_of_epochs
from lightning_prehab.callbacks._trainer import (
    batches_per_epoch,
    check_strategy,
    closes_window,
    find_callback,
    log_number,
    shards,
)
from lightning_prehab.callbacks.compression import CompressionCallback
from lightning_prehab.distillation.teacher import weights_in_file
from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.rank_policies.base import check_choice
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.targets.locate import low_rank_layers
from lightning_prehab.targets.names import Patterns

#: Of the state in checkpoints.
STATE_VERSION = 1


class RehabDistillation(OnlyOne):
    """Lets the cut model learn from the dense one: what the teacher answers to the same inputs is added to the loss.

    Total loss = ``task_strength`` x task loss + ``strength`` x distance to the teacher. The teacher is the model as it
    was right before the (first) cut, in eval mode; beside ``PrehabCallback(self_distillation=...)`` it is the model
    from before prehab, which has not paid for the cut yet. ``training_step`` is not touched: hooks note which modules
    it calls, the teacher is asked the same once for each step, without gradients, and the distance is added to the loss
    (with manual optimization its gradient, where a loss depends on the answers). The optimizer sees exactly the
    gradient of that sum, whatever the precision, gradient accumulation, clipping and strategy; the loss that the user
    logs is untouched.

    For logits the distance is ``T^2 KL(teacher || student)`` in nats, the mean over all predictions: logits are an
    output's ``.logits``, and a tensor that fits to class labels or tokens in the batch; of other outputs it is the mean
    squared error. Positions that an ``attention_mask`` leaves out do not count, nor those whose label is -100.

    Memory: the teacher takes as much as the dense model, half of it in half precision; what it takes is logged when fit
    starts. Its weights lie in each checkpoint from the cut on, so that one file is enough to resume bit by bit; with
    ``teacher=`` they do not. Time: a forward pass of the dense model for each step; validation takes none.

    Under FSDP2 (``ModelParallelStrategy``) the teacher is sharded like the model, and nothing is gathered to make it:
    each process keeps its part, and while the teacher answers, one unit of it at a time is whole. In a distributed
    checkpoint it lies in a folder of its own, in a full one as a whole.

    Logged: ``rehab/distillation`` (the distance), ``rehab/teacher`` (its factor).

    Args:
        strength: Factor on the distance, at least 0.
        task_strength: Factor on the loss of ``training_step``, at least 0; 0 learns from the teacher alone.
        form: ``"logits"`` compares what the model answers. ``"features"`` compares what its blocks return, by the
            squared error relative to the square of the teacher's, the mean over the blocks: for models without outputs
            that compare.
        temperature: Of the predictions, above 0.
        fade_steps: Optimizer steps after the cut over which the strength falls to 0, and the task_strength comes to 1;
            then the teacher is let go of. With manual optimization they are batches.
        fade_epochs: The same in epochs, may be a fraction. With neither the teacher stays to the end.
        shape: Of that course: ``"linear"`` or ``"cosine"``.
        teacher: Another teacher: the path of a checkpoint (``.ckpt``) of the dense model, a LightningModule with
            modules of the same names, or any module that is called on the same inputs. Then there need not be a cut in
            this run: without a CompressionCallback it begins at once.
        module: Dotted name of the module whose outputs are compared, where ``training_step`` calls several, or one that
            lies deeper than two levels.
        forward: ``(module, batch) -> logits``, called for the module and for the teacher instead of looking at what
            ``training_step`` calls: a second forward pass of the student for each step. Not with manual optimization.
        feature_modules: Names or fnmatch patterns of the modules for ``form="features"``; None takes the blocks.
        precision: Of the teacher. ``"half"`` keeps the weights of layers in half precision and computes under autocast,
            ``"full"`` does not; ``"auto"`` where the Trainer computes under autocast anyway.
        device: Where the teacher is kept and computes, for example ``"cpu"`` (slow); None means beside the model.

    Raises:
        ArgumentError: If a value is out of range.
        CheckpointError: When fit starts, if a teacher's weights do not fit.
        TargetError: When fit starts, if ``module`` or ``feature_modules`` name nothing, or there are no blocks.
        StatisticsError: At the first step of the fit, if the outputs hold nothing to be compared, or those of a teacher
            that was given have another shape.
        UnsupportedError: When fit starts, for strategies other than one device, DDP and FSDP2, without a teacher to be
            had, or if the model cannot be copied (one that is tensor parallel cannot); at the first step of the fit, if
            a teacher cannot be asked the same; after the cut, if no loss of a manual optimization depends on what was
            compared.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531
        Self-referential distillation after SVD: SparseKD, 2026, https://arxiv.org/abs/2602.00372

    Example::

        trainer = L.Trainer(callbacks=[CompressionCallback(epoch=6, keep=0.4), RehabDistillation()])
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        task_strength: float = 1.0,
        form: Form = "logits",
        temperature: float = 1.0,
        fade_steps: int | None = None,
        fade_epochs: float | None = None,
        shape: Shape = "linear",
        teacher: str | Path | nn.Module | None = None,
        module: str | None = None,
        forward: Forward | None = None,
        feature_modules: Patterns = None,
        precision: Precision = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_real("strength", strength, "[0, inf)")
        check_real("task_strength", task_strength, "[0, inf)")
        check_real("temperature", temperature, "(0, inf)")
        if fade_steps is not None and fade_epochs is not None:
            raise ArgumentError("Give fade_steps or fade_epochs, not both.")
        check_whole("fade_steps", fade_steps, 1, optional=True)
        check_real("fade_epochs", fade_epochs, "(0, inf)", optional=True)
        check_choice("form", form, get_args(Form))
        check_choice("shape", shape, get_args(Shape))
        check_choice("precision", precision, get_args(Precision))
        if not isinstance(teacher, str | Path | nn.Module | None):
            raise ArgumentError(f"teacher must be the path of a checkpoint or a module, got {show(teacher)}.")
        if forward is not None and (not callable(forward) or isinstance(forward, nn.Module)):
            raise ArgumentError(f"forward must be a function (module, batch) -> logits, got {show(forward)}.")
        if forward is not None and (form == "features" or module is not None):
            raise ArgumentError("forward gives the logits itself; leave out module= and form='features'.")
        if feature_modules is not None and form != "features":
            raise ArgumentError("feature_modules are for form='features'; give that too, or leave them out.")
        self.strength, self.task_strength = strength, task_strength
        self.form, self.temperature = form, temperature
        self.fade_steps, self.fade_epochs, self.shape = fade_steps, fade_epochs, shape
        self.teacher, self.module, self.forward = teacher, module, forward
        self.feature_modules, self.precision, self.device = feature_modules, precision, device
        self._distiller = Distiller(
            type(self).__name__,
            form=form,
            temperature=temperature,
            module=module,
            forward=forward,
            feature_modules=feature_modules,
            precision=precision,
            device=device,
        )
        self._module: pl.LightningModule | None = None
        self._steps: int | None = None  # since it has begun
        self._length: int | None = None
        self._restored: dict[str, Any] = {}
        self._fits = self._looking = self._new_fade = False
        self._loaded_late: tuple[pl.Trainer, pl.LightningModule] | None = None

    def _settings(self) -> dict[str, Any]:
        own = {"device": None, "teacher": None if self.teacher is None else "given"}  # paths and devices are its own
        return {**super()._settings(), **own}

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Refuses what cannot work, before anything has been trained."""
        super().setup(trainer, pl_module, stage)
        self._fits = stage == "fit"
        if not self._fits:
            return
        self.refuse_others(trainer, RehabDistillation, "both would teach the same model. Keep one of them.")
        check_strategy(trainer, self, sharded=True)
        self._distiller.begin_fit(trainer)
        self._restored = {}
        if self._module is not pl_module or not any(isinstance(part, LowRankLayer) for part in pl_module.modules()):
            self._distiller.forget()
            self._module, self._steps, self._length = pl_module, None, None
        if self.teacher is None and find_callback(trainer, CompressionCallback) is None:
            raise UnsupportedError(
                "RehabDistillation learns from the model before a cut; add a CompressionCallback, or give a teacher: "
                "RehabDistillation(teacher='dense.ckpt')."
            )
        if self.forward is not None and not pl_module.automatic_optimization:
            raise UnsupportedError(
                "RehabDistillation(forward=...) does not know which of the losses of a manual optimization is to be "
                "added to. Leave forward out, so that the outputs of training_step are compared (module= names whose)."
            )

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Says what the teacher takes, and makes it if it was given or lies in the checkpoint."""
        self._distiller.check_names(pl_module)
        if isinstance(self.teacher, nn.Module):
            self._distiller.take(trainer, pl_module, self.teacher)
        elif self._distiller.teacher is None:
            self._distiller.check_model(trainer, pl_module)
            if self.teacher is not None:
                in_parts = shards(trainer) and Path(self.teacher).is_dir()
                weights = self.teacher if in_parts else weights_in_file(self.teacher)
                self._distiller.rebuild(trainer, pl_module, weights, given=True)
        if self._restored:
            self._go_on(trainer, pl_module)
        if not shards(trainer):
            self._announce(trainer, pl_module)

    def _go_on(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        state, self._restored = self._restored, {}
        self._steps, self._length = state["steps"], state["length"]
        self._new_fade = state.get("fade", self._fade()) != self._fade()
        self._distiller.load_state_dict(trainer, pl_module, state)

    def _announce(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        compression = find_callback(trainer, CompressionCallback)
        if self._distiller.teacher is not None:
            self._distiller.announce_size()
        elif compression is None or compression.done or self._steps is not None:
            return
        elif find_callback(trainer, SelfDistillation) is not None:
            rank_zero_info(
                "RehabDistillation: the teacher of PrehabCallback(self_distillation=...) stays after the cut."
            )
        else:
            self._distiller.announce(trainer, pl_module, "right before the cut")
            if low_rank_layers(pl_module):
                rank_zero_warn(
                    "RehabDistillation: the model has been cut already, so that its teacher will not be the dense one. "
                    "Give that one: RehabDistillation(teacher='dense.ckpt')."
                )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begins at once where no cut is to come."""
        if shards(trainer):  # only now a checkpoint is loaded
            self._announce(trainer, pl_module)
        if self.fade_epochs is not None and batches_per_epoch(trainer) is None:
            raise UnsupportedError("The length of an epoch is not known here; give RehabDistillation(fade_steps=...).")
        if self._new_fade and self._steps is not None:
            self._measure(trainer)
        self._new_fade = False
        compression = find_callback(trainer, CompressionCallback)
        if not (compression is None or compression.done):
            return
        if self._distiller.teacher is None and not self.is_over:
            raise UnsupportedError(
                "The model has been cut already, and the checkpoint holds no teacher (it was written without "
                "RehabDistillation, or with save_weights_only=True). Give one: RehabDistillation(teacher='dense.ckpt')."
            )
        if self._steps is None:
            self._begin(trainer)

    def on_before_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """The model of now becomes the teacher, or that from before prehab if it is there; at the first cut only."""
        if self.teacher is not None or self._distiller.teacher is not None or self._steps is not None:
            return
        earlier = find_callback(trainer, SelfDistillation)
        if earlier is not None and earlier.teacher is not None:
            self._distiller.teacher = earlier.teacher
        else:
            self._distiller.keep(trainer, pl_module)

    def on_surgery(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: CompressionReport) -> None:
        """Begins; after a second cut anew, with the teacher of the first."""
        self._begin(trainer)
        self._warn_of_too_little_time(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Looks at what the step is going to call; once before the cut, too, to say in time what cannot be taught."""
        self._looking = False
        if self.factor > 0.0 or self._task_factor != 1.0:
            self._distiller.begin_batch(trainer, pl_module, batch)
        elif self._steps is None:
            self._looking = self._distiller.begin_look(trainer, pl_module, batch)

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Asks the teacher."""
        if not self._distiller.watches:
            return
        if self._looking:
            self._distiller.look(trainer, pl_module, loss)
            return
        found = self._distiller.before_backward(trainer, pl_module, loss, self.factor, self._task_factor)
        if found is not None:
            log_number(pl_module, "rehab/distillation", found)
            log_number(pl_module, "rehab/teacher", self.factor)

    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """With manual optimization the step goes on."""
        self._distiller.after_backward()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts steps; lets go of the teacher when its time is over."""
        self._distiller.end_batch(pl_module)
        if self._steps is None:
            return
        self._steps += not pl_module.automatic_optimization or closes_window(trainer, batch_idx)
        compression = find_callback(trainer, CompressionCallback)
        if self.is_over and (compression is None or compression.done):
            self._distiller.forget()

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Something must have been learned."""
        self._distiller.end_epoch()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off."""
        self._distiller.close()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Takes the hooks off."""
        self._distiller.close()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Lets go of the Trainer."""
        if stage == "fit":
            self._distiller.end_fit()

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, and the teacher's weights unless it was given; plain data and tensors only."""
        own = {"version": STATE_VERSION, "steps": self._steps, "length": self._length, "fade": self._fade()}
        return {**own, **self._distiller.state_dict()}

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """A sharded model is loaded after fit has started, and may be cut right afterwards."""
        self._loaded_late = (trainer, pl_module) if shards(trainer) else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the start of fit, unless that is over; nothing else needs a teacher."""
        late, self._loaded_late = self._loaded_late, None
        if self._fits:
            check_version(state_dict, STATE_VERSION, type(self).__name__)
            self._restored = state_dict
            if late is not None:
                self._go_on(*late)

    @property
    def factor(self) -> float:
        """What the distance is multiplied by at the next step; 0 before the cut and when the teacher's time is over."""
        if self._steps is None or self._distiller.teacher is None:
            return 0.0
        return self.strength if self._length is None else self._course(self.strength, 0.0)

    @property
    def is_over(self) -> bool:
        """Whether the teacher has faded out."""
        return self._steps is not None and self._length is not None and self._steps >= self._length

    @property
    def _task_factor(self) -> float:
        if self._steps is None or self._distiller.teacher is None:
            return 1.0
        return self.task_strength if self._length is None else self._course(self.task_strength, 1.0)

    def _course(self, start: float, end: float) -> float:
        assert self._steps is not None
        assert self._length is not None
        return between(start, end, self._steps / self._length, self.shape)

    def _begin(self, trainer: "pl.Trainer") -> None:
        self._steps = 0
        self._measure(trainer)

    def _warn_of_too_little_time(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        compression = find_callback(trainer, CompressionCallback)
        if compression is None or not compression.done or getattr(trainer, "fast_dev_run", False):
            return
        rest = rest_of_run(trainer, pl_module)
        left = rest.get("steps", rest.get("batches"))
        if self._length is not None and left is not None and left < self._length:
            rank_zero_warn(
                f"RehabDistillation: the teacher fades over {self._length} steps, and {left} are left of the run after "
                "the cut: it stays to the end. Give a shorter fade_steps or fade_epochs, cut earlier, or train longer."
            )

    def _measure(self, trainer: "pl.Trainer") -> None:
        self._length = self.fade_steps
        if self.fade_epochs is not None:
            self._length = max(round(steps_of_epochs(trainer, self.fade_epochs)), 1)

    def _fade(self) -> list[float | None]:
        return [self.fade_steps, self.fade_epochs]
