"""Says which targets nobody trains, when a fit starts."""

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prehab.callbacks._trainer import find_callback
from lightning_prehab.surgery.untrained import held_by_none
from lightning_prehab.targets.locate import Target


def warn_of_unheld(trainer: "pl.Trainer", targets: Mapping[str, Target]) -> None:
    """Warns if optimizers hold some targets and not others, unless those are going to be unfrozen."""
    warning = held_by_none(targets, trainer.optimizers)
    if warning is not None and find_callback(trainer, BaseFinetuning) is None:
        rank_zero_warn(warning)
