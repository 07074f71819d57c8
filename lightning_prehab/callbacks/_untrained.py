"""Says which targets nobody trains, when a fit starts."""

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prehab.callbacks._trainer import find_callback
from lightning_prehab.surgery.untrained import frozen, held_by_none
from lightning_prehab.targets.locate import Target


def warn_of_unheld(trainer: "pl.Trainer", targets: Mapping[str, Target]) -> None:
    """Warns if optimizers hold some targets and not others, unless those are going to be unfrozen.

    Frozen ones are mentioned: nobody can tell a frozen backbone, which is a part of the model, from a teacher.
    """
    if find_callback(trainer, BaseFinetuning) is not None:
        return
    warning, still = held_by_none(targets, trainer.optimizers), frozen(targets)
    if warning is not None:
        rank_zero_warn(warning)
    if still and len(still) < len(targets):
        rank_zero_info(
            f"{len(still)} of {len(targets)} targets are frozen (first: {still[0]!r}). If they are a loss network or a "
            "teacher, name them in exclude_modules: a cut changes what they say."
        )
