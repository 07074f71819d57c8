"""How the teacher of a run is made of the model, kept, written into checkpoints and made again."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, distributed, nn

from lightning_prehab.distillation.teacher import Teacher, bytes_of_copy, check_copy, copy_of, rebuilt
from lightning_prehab.errors import CheckpointError, UnsupportedError

Precision = Literal["auto", "half", "full"]


class Keeper:
    """Of a model that each process has as a whole.

    Args:
        who: For messages.
        precision: Of the teacher.
        device: Of the teacher; None means that of the module.
    """

    def __init__(self, who: str, precision: Precision, device: torch.device | None) -> None:
        self._who, self._precision, self._device = who, precision, device

    def check(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Raises :class:`UnsupportedError` if the model of now could not become the teacher; before the training."""
        check_copy(pl_module)

    def size(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> str:
        """What the teacher is going to take, in words."""
        size = bytes_of_copy(pl_module, self.half(trainer)) / 1e6
        where = pl_module.device if self._device is None else self._device
        return f"{size:,.1f} MB on {where} beside the model"

    def keep(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Teacher:
        """The model of now as teacher.

        Raises:
            UnsupportedError: If it cannot be copied.
        """
        half = self.half(trainer)
        teacher = Teacher(copy_of(pl_module, self._device, half), half=half)
        same_buffers_(trainer, teacher.module)
        return teacher

    def rebuild(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", tensors: Mapping[str, Tensor], given: bool = False
    ) -> Teacher:
        """A teacher of weights.

        Args:
            trainer: The running Trainer.
            pl_module: Its module, cut or not.
            tensors: By name.
            given: They are those of a dense model, not what :meth:`stored` has returned of a teacher.

        Raises:
            CheckpointError: If they are not those of the dense form of the model.
        """
        if not isinstance(tensors, Mapping):
            raise CheckpointError(
                "The checkpoint comes from a sharded run, and its teacher lies in a folder of its own, which only a "
                "ModelParallelStrategy reads. Give one: RehabDistillation(teacher='dense.ckpt')."
            )
        half = self.half(trainer)
        module = rebuilt(pl_module, tensors, self._device)
        return Teacher(copy_of(module, half=half) if given and half is not None else module, half=half)

    def take(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", module: nn.Module) -> Teacher:
        """A module that was given, as it is."""
        device = pl_module.device if self._device is None else self._device
        by_name = isinstance(module, pl.LightningModule)
        return Teacher(module, device=device, half=self.half_of_given(trainer), by_name=by_name)

    def stored(self, teacher: Teacher) -> Any:
        """What goes into the state of the callback in a checkpoint."""
        return teacher.tensors()

    def close(self) -> None:
        """The fit is over."""

    def half(self, trainer: "pl.Trainer") -> torch.dtype | None:
        """The dtype of autocast that the teacher computes under, in which weights of layers are kept."""
        plugin = trainer.precision_plugin
        mixed = isinstance(plugin, MixedPrecision)
        if self._precision == "full" or (self._precision == "auto" and not mixed):
            return None
        fp16 = isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed"
        on_cpu = self._device is not None and self._device.type == "cpu"
        return torch.float16 if fp16 and not on_cpu else torch.bfloat16

    def half_of_given(self, trainer: "pl.Trainer") -> torch.dtype | None:
        """The same for a module that was given, whose weights are left as they are."""
        return self.half(trainer) if self._precision == "half" else None


def same_buffers_(trainer: "pl.Trainer", module: nn.Module) -> None:
    """Running statistics of each process are its own; checkpoints hold those of the first one."""
    if trainer.world_size > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


def refuse_shared(who: str, pl_module: "pl.LightningModule", module: nn.Module) -> None:
    """Raises :class:`UnsupportedError` for a teacher that would be trained, too."""
    own = {id(parameter) for parameter in pl_module.parameters()}
    if any(id(parameter) in own for parameter in module.parameters()):
        raise UnsupportedError(
            f"The teacher of {who} is the model that is trained, or shares weights with it; give a copy "
            "(copy.deepcopy), or a checkpoint."
        )
