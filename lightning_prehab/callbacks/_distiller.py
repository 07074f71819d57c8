"""The teacher beside a training step: asked what the step asks, its pull added where the step's answers are.

The step itself is not touched. Hooks note what it calls; before the backward pass the teacher is asked the same, and
the distance goes into the loss. With manual optimization, where there may be several losses of which each knows some of
the answers, a hook on each answer adds the gradient of its distance when that of a loss comes by.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_prehab.callbacks._keeper import Keeper, Precision, refuse_shared
from lightning_prehab.callbacks._lessons import Lessons, each_time
from lightning_prehab.callbacks._sharded_keeper import ShardedKeeper
from lightning_prehab.callbacks._trainer import loss_scale, shards
from lightning_prehab.distillation.calls import Call, Calls, autocast_of, named
from lightning_prehab.distillation.comparison import Comparison
from lightning_prehab.distillation.replay import WAY_OUT, Pair, check_calls, features_of, pairs_of
from lightning_prehab.distillation.teacher import Teacher
from lightning_prehab.distillation.values import held
from lightning_prehab.documents.checks import check_kind
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, NumericalError, StatisticsError, UnsupportedError
from lightning_prehab.refinement.blocks import find_blocks
from lightning_prehab.refinement.distance import answer_in
from lightning_prehab.statistics.batches import to_device
from lightning_prehab.statistics.collector import recompile, unseen
from lightning_prehab.targets.locate import low_rank_layers
from lightning_prehab.targets.names import Patterns, match_names

Form = Literal["logits", "features"]
#: Calls a model on a batch and returns its logits.
Forward = Callable[[nn.Module, Any], Any]


class Distiller:
    """A teacher, and what it takes to learn from it in the steps of a Trainer.

    Args:
        who: For messages.
        form: What is compared.
        temperature: Of the predictions.
        module: Dotted name of the module whose outputs are compared; None takes those that ``training_step`` calls.
        forward: ``(module, batch) -> logits``, called for both instead of looking at what ``training_step`` calls.
        feature_modules: Names or patterns of the modules whose outputs are compared as features; None takes the blocks.
        precision: Of the teacher.
        device: Of the teacher; None means that of the module.

    Attributes:
        teacher: It, or None.
    """

    def __init__(
        self,
        who: str,
        *,
        form: Form = "logits",
        temperature: float = 1.0,
        module: str | None = None,
        forward: Forward | None = None,
        feature_modules: Patterns = None,
        precision: Precision = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        check_kind("module", module, str, "the dotted name of a module", optional=True)
        self._who, self._form, self._temperature = who, form, temperature
        self._module, self._forward, self._feature_modules = module, forward, feature_modules
        self._precision: Precision = precision
        self._device = None if device is None else _device(device)
        self._keeper = Keeper(who, precision, self._device)
        self.teacher: Teacher | None = None
        self._stored = True  # in checkpoints
        self._lent: Teacher | None = None  # a module of the user's
        self._calls: Calls | None = None
        self.forget()

    def forget(self) -> None:
        """Lets go of the teacher and of what was found out with it."""
        self._comparison = Comparison(self._temperature, relative=self._form == "features")
        self._lessons = Lessons(self._comparison)
        self.close()
        self.teacher = None
        self._features: list[str] = []
        self._checked = self._looked = False
        self._batch: Any = None

    def check_names(self, pl_module: "pl.LightningModule") -> None:
        """Raises :class:`TargetError` for names of modules that are not there; before anything has been trained."""
        if self._module is not None:
            named(pl_module, self._module)
        if self._form == "features":
            self._choose_features(pl_module)

    def begin_fit(self, trainer: "pl.Trainer") -> None:
        """Knows how a model of this Trainer is kept; in ``setup``.

        Raises:
            UnsupportedError: If the teacher of a sharded model shall lie elsewhere than the model.
        """
        if not shards(trainer):
            self._keeper = Keeper(self._who, self._precision, self._device)
            return
        if self._device is not None:
            raise UnsupportedError(
                f"{self._who}(device={str(self._device)!r}): the teacher of a sharded model is sharded like it, and "
                "lies where that does (on the CPU with CPUOffloadPolicy). Leave device out."
            )
        name = f"{self._who.partition('(')[0]}_teacher"
        self._keeper = ShardedKeeper(self._who, self._precision, trainer, name, self._tensors_to_store)

    def end_fit(self) -> None:
        """Nothing of a Trainer is held any more."""
        self._keeper.close()

    def check_model(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Raises :class:`UnsupportedError` if the model of now could not become the teacher."""
        self._keeper.check(trainer, pl_module)

    def announce(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", when: str) -> None:
        """Says what the teacher is going to take."""
        rank_zero_info(
            f"{self._who}: the model as it is {when} becomes the teacher, {self._keeper.size(trainer, pl_module)}; "
            "its weights are written into each checkpoint from then on, which grows by as much."
        )

    def announce_size(self) -> None:
        """Says what a teacher takes that is there already."""
        assert self.teacher is not None
        rank_zero_info(f"{self._who}: the teacher takes {self.teacher.bytes / 1e6:,.1f} MB on {self.teacher.device}.")

    def keep(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Makes the model of now the teacher.

        Raises:
            UnsupportedError: If it cannot be copied.
        """
        self._adopt(trainer, self._keeper.keep(trainer, pl_module))

    def rebuild(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", tensors: Any, given: bool = False
    ) -> None:
        """Makes a teacher of weights.

        Args:
            trainer: The running Trainer.
            pl_module: Its module, cut or not.
            tensors: As :meth:`state_dict` has them of a teacher; or those of a dense model, by name.
            given: They are the latter, and are not written into checkpoints.

        Raises:
            CheckpointError: If they are not those of the dense form of the model.
        """
        self._adopt(trainer, self._keeper.rebuild(trainer, pl_module, tensors, given))
        self._stored = not given

    def take(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", module: nn.Module) -> None:
        """Makes a module that was given the teacher, as it is; it is not stored."""
        refuse_shared(self._who, pl_module, module)
        self._lent = self.teacher = self._keeper.take(trainer, pl_module, module)
        self._stored = False

    def _adopt(self, trainer: "pl.Trainer", teacher: Teacher) -> None:
        if isinstance(teacher.module, pl.LightningModule):
            teacher.module.trainer = trainer
            teacher.module.log = teacher.module.log_dict = _ignore  # type: ignore[method-assign]
        self.teacher, self._stored = teacher, True

    def _tensors_to_store(self) -> Mapping[str, Tensor] | None:
        return None if self.teacher is None or not self._stored else self.teacher.tensors()

    @property
    def watches(self) -> bool:
        """Whether this batch is looked at."""
        return self._batch is not None

    def begin_batch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any) -> None:
        """A batch begins that the teacher has a part in."""
        self._batch = held(batch)
        if self._forward is not None:
            return
        compiled = _is_compiled(pl_module)  # then hooks have to stay, or all is compiled anew at each batch
        if self._calls is None:
            if self._form == "features" and not self._features:
                self._features = self._choose_features(pl_module)
            self._calls = Calls(pl_module, self._module, self._features)
            if compiled:
                recompile()
        if not (compiled and self._calls.attached):
            self._calls.attach()
        self._calls.begin(wrapped=trainer.strategy.model is not trainer.strategy.lightning_module)

    def before_backward(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor, strength: float, task: float = 1.0
    ) -> Tensor | None:
        """The gradient will be that of ``task * loss + strength * distance``.

        Args:
            trainer: The running Trainer.
            pl_module: Its module.
            loss: What is about to be backpropagated, in whatever scale it has here.
            strength: Factor of the distance.
            task: Factor of the loss.

        Returns:
            The distance, a scalar without graph; None if there was nothing to compare.
        """
        if self._calls is not None:
            self._calls.listening = False  # checkpointing calls modules again in the backward pass
        if not loss.requires_grad:
            return None
        scale = strength * loss_scale(trainer)
        pairs = self._asked(trainer, pl_module)
        if pl_module.automatic_optimization:
            found = self._lessons.add_to_loss_(loss, pairs, self._batch, scale, task)
        else:  # of several losses, each backpropagated by itself
            if task != 1.0:
                each_time(loss, lambda gradient: gradient * task)
            if not pairs:
                return None  # another one of them has taken the calls
            found = self._lessons.add_to_gradients(pairs, self._batch, scale)
        self._check(found, sorted({pair.name for pair in pairs}))
        return found

    def begin_look(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any) -> bool:
        """A batch begins before the teacher has a part: whether it is looked at, since nobody has looked yet.

        Compiled modules are not, which hooks would make compile anew. A ``forward`` is called here and now.
        """
        if self._looked or _is_compiled(pl_module):
            return False
        if self._forward is None:
            self.begin_batch(trainer, pl_module, batch)
            return True
        self._looked = True
        with _undisturbed(pl_module), trainer.precision_plugin.forward_context():
            answer_in(self._forward(pl_module, held(batch)))
        return False

    def look(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Finds out, before anything is trained, if a teacher could be asked what this step has asked of the model.

        Raises:
            StatisticsError: If there is nothing to compare.
            UnsupportedError: If a teacher could not be asked the same.
        """
        assert self._calls is not None
        self._calls.listening = False
        calls = self._calls.take()
        if not loss.requires_grad or not (calls or pl_module.automatic_optimization):
            return
        self._looked = True
        if not calls:
            raise StatisticsError(f"{self._who}: training_step calls no module of the model. {WAY_OUT}")
        if self.teacher is None:
            check_calls(pl_module, calls, self._features if self._form == "features" else None)
            return
        self._lessons.try_out(self._pairs(pl_module, calls), self._batch)  # a teacher that was given answers at once

    def after_backward(self) -> None:
        """With manual optimization the step goes on."""
        if self._calls is not None and self._calls.attached:
            self._calls.listening = True

    def end_batch(self, pl_module: "pl.LightningModule") -> None:
        """Takes the hooks off."""
        self._batch = None
        if self._calls is not None:
            self._calls.listening = False
            self._calls.take()
            if not _is_compiled(pl_module):
                self._calls.detach()

    def end_epoch(self) -> None:
        """Looks whether anything was learned.

        Raises:
            UnsupportedError: If no loss has come by the answers that were compared, in an epoch.
        """
        if self._lessons.in_vain:
            raise UnsupportedError(
                f"{self._who}: no loss of training_step depends on the outputs that were compared. {WAY_OUT}"
            )
        self._lessons.forget()

    def close(self) -> None:
        """Takes all hooks off, and gives back a module of the user's as it was."""
        if self._lent is not None:
            self._lent.give_back()
            self._lent = None
        self._lessons.forget()
        self._batch = None
        if self._calls is not None:
            self._calls.detach()
            self._calls = None

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights, unless it was given, and what was found out; plain data and tensors only."""
        stored = self.teacher if self._stored else None
        return {
            "teacher": None if stored is None else self._keeper.stored(stored),
            "measure": self._comparison.measure,
            "shifted": self._comparison.shifted,
            "second": self._comparison.second,
            "compared": self._compared(),
        }

    def _compared(self) -> list[Any]:
        return [self._form, self._module, self._forward is not None]

    def load_state_dict(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", state: dict[str, Any]) -> None:
        """The teacher as it was when the state was written, unless another one was given now.

        What was found out about the answers holds if the same ones are compared.
        """
        if state.get("compared", self._compared()) == self._compared():
            found = self._comparison
            found.measure, found.shifted, found.second = state["measure"], state["shifted"], state.get("second", False)
        given = self.teacher is not None and not self._stored
        if state["teacher"] is not None and not given:
            self.rebuild(trainer, pl_module, state["teacher"])

    def _choose_features(self, pl_module: "pl.LightningModule") -> list[str]:
        if self._feature_modules is None:
            return [name for name, _ in find_blocks(pl_module)]
        inner = {id(part) for _, layer in low_rank_layers(pl_module) for part in list(layer.modules())[1:]}
        names = [name for name, one in pl_module.named_modules() if name and id(one) not in inner]
        return match_names(self._feature_modules, names, "feature_modules")

    def _asked(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> list[Pair]:
        """The answers of both to what the step has asked, or forward does."""
        assert self.teacher is not None
        if self._forward is not None:
            return [self._answers_of_forward(trainer, pl_module, self._forward)]
        assert self._calls is not None
        calls = self._calls.take()
        if not calls:
            if pl_module.automatic_optimization:
                raise StatisticsError(f"{self._who}: training_step calls no module of the model. {WAY_OUT}")
            return []
        return self._pairs(pl_module, calls)

    def _pairs(self, pl_module: "pl.LightningModule", calls: list[Call]) -> list[Pair]:
        assert self.teacher is not None
        if self._form == "features":
            return features_of(pl_module, self.teacher, calls, self._features)
        return pairs_of(pl_module, self.teacher, calls)

    def _answers_of_forward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", forward: Forward) -> Pair:
        assert self.teacher is not None
        with trainer.precision_plugin.forward_context():
            autocast = autocast_of(pl_module)
            answer = answer_in(forward(pl_module, held(self._batch)))
        with self.teacher.at_work(autocast):
            output = forward(self.teacher.module, to_device(held(self._batch), self.teacher.device))
        return Pair("forward", [], answer, answer_in(output).to(answer.device), output, self.teacher.module)

    def _check(self, value: Tensor, names: list[str]) -> None:
        """Once: says what is compared, and that it is a number."""
        if self._checked:
            return
        self._checked = True
        if not bool(torch.isfinite(value)):
            raise NumericalError(
                f"{self._who}: the distance to the teacher is {float(value)}. Its outputs, or those of the model, hold "
                "NaN or Inf: see whether training has diverged before, or give the teacher precision='full'."
            )
        if self._form == "features":
            what = f"the outputs of {len(self._features)} modules, {self._features[0]} to {self._features[-1]}"
        else:
            kind = "predictions (logits)" if self._comparison.measure == "divergence" else "outputs (squared error)"
            where = ", ".join(name or "the module itself" for name in names)
            what = f"the {kind} of {where}"
        rank_zero_info(f"{self._who} compares {what} with the teacher's.")


@contextmanager
def _undisturbed(pl_module: "pl.LightningModule") -> Iterator[None]:
    """Inside, the module answers as in evaluation; nothing of it is seen afterwards."""
    modes = {module: module.training for module in pl_module.modules()}
    device = pl_module.device
    try:
        pl_module.eval()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), unseen():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _device(wish: str | torch.device) -> torch.device:
    try:
        return torch.device(wish)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device must be one that torch knows ('cpu', 'cuda:0', ...), got {show(wish)}.") from error


def _is_compiled(pl_module: "pl.LightningModule") -> bool:
    """Whether ``trainer.fit`` was given ``torch.compile(module)``: then training_step is compiled as a whole."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for ``log`` on the teacher."""
