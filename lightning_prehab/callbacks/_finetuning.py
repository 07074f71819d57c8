"""BaseFinetuning beside the surgery: it keeps names of parameters, and forgets what it has unfrozen.

A callback that adds parameter groups on the way (``unfreeze_and_add_param_group``) stores all groups by the names of
their parameters, to make them anew in a run that resumes. Groups from before the surgery held dense weights, later ones
hold factors. And it freezes what it freezes at the start of each run: in a run that resumes after the unfreezing nobody
unfreezes again, with or without a surgery.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

from lightning_prehab.callbacks._distributed import rewrap
from lightning_prehab.callbacks._trainer import callbacks_of
from lightning_prehab.errors import CheckpointError
from lightning_prehab.layers.linear import LowRankLayer

#: The entry of a checkpoint with the names of the frozen parameters; only beside a BaseFinetuning.
FROZEN = "lightning_prehab_frozen"


def rename_groups_(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """After a surgery: the stored groups take the names that the parameters of the live ones have now."""
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    for other in _finetuning(trainer):
        for index, stored in other._internal_optimizer_metadata.items():
            live = trainer.optimizers[index].param_groups if index < len(trainer.optimizers) else []
            for group, its in zip(stored, live, strict=False):
                group["params"] = [names[id(parameter)] for parameter in its["params"]]


class StoredGroups:
    """The groups that a checkpoint holds for BaseFinetuning, made anew on both sides of a surgery that is repeated.

    As in the run that wrote the checkpoint: groups of dense weights are there when the surgery comes, which edits them;
    groups of factors are there after it.

    Args:
        trainer: The Trainer, whose callbacks have loaded their states.
        pl_module: Its module, dense.
    """

    def __init__(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._trainer, self._pl_module = trainer, pl_module
        self._later: list[tuple[int, list[dict[str, Any]], bool]] = []
        known = dict(pl_module.named_parameters())
        for other in _finetuning(trainer):
            stored = other._internal_optimizer_metadata if other._restarting else {}
            other._restarting = False  # it has nothing to do any more
            for index, groups in stored.items():
                if index >= len(trainer.optimizers):
                    continue
                dense = next((i for i, one in enumerate(groups) if not set(one["params"]) <= set(known)), len(groups))
                if dense:
                    trainer.optimizers[index].param_groups = [_group(one, known) for one in groups[:dense]]
                self._later.append((index, groups[dense:], dense > 0))

    def complete_(self) -> None:
        """After the surgery: makes the groups of factors; if there were no others, in the place of all groups."""
        known = dict(self._pl_module.named_parameters())
        for index, groups, others in self._later:
            optimizer = self._trainer.optimizers[index]
            if groups:
                earlier = optimizer.param_groups if others else []
                optimizer.param_groups = [*earlier, *(_group(one, known) for one in groups)]


def note_frozen(trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
    """Writes the names of the frozen parameters into a checkpoint, if there is a BaseFinetuning."""
    if any(_finetuning(trainer)):
        checkpoint[FROZEN] = [name for name, one in pl_module.named_parameters() if not one.requires_grad]


def unfreeze_(trainer: "pl.Trainer", pl_module: "pl.LightningModule", frozen: list[str] | None) -> None:
    """Unfreezes what was not frozen when the checkpoint was written, if there is a BaseFinetuning."""
    if frozen is None or not any(_finetuning(trainer)):
        return
    again = [one for name, one in pl_module.named_parameters() if not one.requires_grad and name not in frozen]
    for parameter in again:
        parameter.requires_grad_()
    if again and any(isinstance(part, LowRankLayer) for part in pl_module.modules()):
        rewrap(trainer, pl_module)  # as the surgery did, after the unfreezing


def _finetuning(trainer: "pl.Trainer") -> Iterator[BaseFinetuning]:
    return (other for other in callbacks_of(trainer) if isinstance(other, BaseFinetuning))


def _group(stored: Mapping[str, Any], known: Mapping[str, Tensor]) -> dict[str, Any]:
    """A live parameter group of one that holds names."""
    for name in stored["params"]:
        if name not in known:
            raise CheckpointError(
                f"BaseFinetuning: the checkpoint holds a parameter group with {name!r}, which the model has not. Build "
                "the model as it was when the checkpoint was written."
            )
    return {**stored, "params": [known[name] for name in stored["params"]]}
