"""The teacher of a sharded model: sharded like it, and in a folder of its own in distributed checkpoints."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prehab.callbacks._distributed import together
from lightning_prehab.callbacks._keeper import Keeper, Precision, same_buffers_
from lightning_prehab.distillation.teacher import Teacher
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.sharded.copies import copy_of_sharded, skeleton_of
from lightning_prehab.sharded.engine import is_sharded, reshard_
from lightning_prehab.sharded.teacher import (
    ShardedTeacher,
    bytes_of_part,
    cast_anyway,
    fill_from_parts_,
    fill_from_whole_,
    gathered_tensors,
    kept_dtypes,
    save_parts,
)
from lightning_prehab.targets.locate import low_rank_layers

WAY_OUT = (
    "Give a teacher: teacher=, a module that is whole on each process, or that you have sharded yourself (it is called "
    "on the same inputs)."
)
#: Returns the tensors of a teacher, or None.
Parts = Callable[[], Mapping[str, Tensor] | None]
#: Of weights in a distributed checkpoint of Lightning.
_WEIGHTS = "state_dict."


class ShardedKeeper(Keeper):
    """Of a model under a ``ModelParallelStrategy``.

    Args:
        who: For messages.
        precision: Of the teacher.
        trainer: The Trainer, in ``setup``.
        name: Of the folder in checkpoints.
        parts: Called for the teacher's tensors of now, when a distributed checkpoint is written; None without one.
    """

    def __init__(
        self,
        who: str,
        precision: Precision,
        trainer: "pl.Trainer",
        name: str,
        parts: Parts,
    ) -> None:
        super().__init__(who, precision, None)
        self._strategy: Any = trainer.strategy
        self._name = name
        self._blank: nn.Module | None = None
        self._in_parts = bool(getattr(trainer.strategy, "_save_distributed_checkpoint", True))
        if self._in_parts:
            _write_beside(self._strategy, name, parts)

    def check(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Copies the modules of the model, without its weights: a teacher in a checkpoint would be made of them."""
        if low_rank_layers(pl_module):
            return
        self._blank = _copied(trainer, lambda: skeleton_of(pl_module))

    def size(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> str:
        """What the teacher is going to take, in words."""
        reshard_(pl_module)
        size = bytes_of_part(pl_module, self._dtypes(trainer, pl_module)) / 1e6
        return f"{size:,.1f} MB on each process, sharded like the model (while it answers, one unit of it is whole)"

    def keep(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Teacher:
        """The model of now as teacher."""
        self._blank = None
        reshard_(pl_module)
        module = _copied(trainer, lambda: copy_of_sharded(pl_module, self._dtypes(trainer, pl_module)))
        same_buffers_(trainer, module)
        return ShardedTeacher(module, device=trainer.strategy.root_device, half=self.half(trainer))

    def rebuild(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", tensors: Any, given: bool = False
    ) -> Teacher:
        """A teacher of whole weights, or of the parts in a folder.

        Args:
            trainer: The running Trainer.
            pl_module: Its module, cut or not.
            tensors: By name; or the name of the folder in the checkpoint that is resumed; or the path of another one.
            given: It is a dense model, not a teacher.

        Raises:
            CheckpointError: If they are not those of the dense form of the model.
            UnsupportedError: If the model has been cut before, and nothing is known of its dense form.
        """
        if self._blank is None:
            raise UnsupportedError(
                f"{self._who}: the teacher is made of the modules of the dense model, and this one is cut already. "
                f"Start from a model that configure_model makes dense. {WAY_OUT}"
            )
        blank, self._blank = self._blank, None
        device = _where(pl_module, trainer.strategy.root_device)
        dtypes = self._dtypes(trainer, blank) if given else {}
        agree = partial(together, trainer)
        if isinstance(tensors, Mapping):
            agree(lambda: fill_from_whole_(blank, tensors, device, dtypes))
        elif given:
            fill_from_parts_(blank, Path(tensors), device, dtypes, agree, _WEIGHTS)
        else:
            assert trainer.ckpt_path is not None  # the state comes from there
            fill_from_parts_(blank, Path(trainer.ckpt_path) / str(tensors), device, dtypes, agree)
        return ShardedTeacher(blank, device=trainer.strategy.root_device, half=self.half(trainer))

    def take(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", module: nn.Module) -> Teacher:
        """A module that was given, as it is: whole on each process, or sharded."""
        if not is_sharded(module):
            return super().take(trainer, pl_module, module)
        by_name, half = isinstance(module, pl.LightningModule), self.half_of_given(trainer)
        return ShardedTeacher(module, device=trainer.strategy.root_device, half=half, by_name=by_name)

    def stored(self, teacher: Teacher) -> Any:
        """Where the teacher lies in a distributed checkpoint; or its whole weights, on the process that writes."""
        if self._in_parts:
            return self._name
        assert isinstance(teacher, ShardedTeacher)
        return gathered_tensors(teacher, keep=self._strategy.global_rank == 0)

    def close(self) -> None:
        """The fit is over."""
        self._blank = None
        if self._in_parts:
            _no_longer_beside(self._strategy, self._name)

    def _dtypes(self, trainer: "pl.Trainer", model: nn.Module) -> dict[int, torch.dtype]:
        cast = {} if self._precision == "full" else cast_anyway(model)
        return {**kept_dtypes(model, self.half(trainer)), **cast}


def _copied(trainer: "pl.Trainer", work: Callable[[], nn.Module]) -> nn.Module:
    """What ``work`` returns; if it fails on one process, all are told the way out."""

    def explained() -> nn.Module:
        try:
            return work()
        except UnsupportedError as error:
            raise UnsupportedError(f"The model cannot become a teacher: {error} {WAY_OUT}") from error

    return together(trainer, explained)


def _where(model: nn.Module, device: torch.device) -> torch.device:
    """Where the parts of a model are kept: those that are offloaded, on the CPU."""
    first = next((one for one in model.parameters() if hasattr(one, "to_local")), None)
    return device if first is None else first.to_local().device


class _SavesBeside:
    """Stands for ``save_checkpoint`` of one strategy: writes what else belongs into the folder of a checkpoint.

    Args:
        strategy: The one.

    Attributes:
        parts: What is called for the tensors, by the name of their folder; None of them writes nothing.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy, self._original = strategy, strategy.save_checkpoint
        self.parts: dict[str, Parts] = {}

    def __call__(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self._strategy.broadcast(filepath))
        if path.is_file():
            path.unlink(missing_ok=True)
        for name, parts in self.parts.items():  # first: a folder is complete when Lightning has written its last file
            tensors = parts()
            if tensors is not None:
                save_parts(tensors, path / name)
        self._original(checkpoint, path, storage_options)


def _write_beside(strategy: Any, name: str, parts: Parts) -> None:
    found = vars(strategy).get("save_checkpoint")
    if not isinstance(found, _SavesBeside):
        found = strategy.save_checkpoint = _SavesBeside(strategy)
    found.parts[name] = parts


def _no_longer_beside(strategy: Any, name: str) -> None:
    found = vars(strategy).get("save_checkpoint")
    if isinstance(found, _SavesBeside) and found.parts.pop(name, None) is not None and not found.parts:
        del strategy.save_checkpoint
