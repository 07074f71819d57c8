"""The surgery of a checkpoint, made once more in a model that is dense yet: the same edits, with stored factors."""

from collections.abc import Callable, Mapping

import lightning.pytorch as pl

from lightning_prehab.callbacks._checkpoint import plan_of_factors
from lightning_prehab.callbacks._finetuning import StoredGroups
from lightning_prehab.callbacks._neighbours import refuse_finders
from lightning_prehab.callbacks._sharded_site import site_of
from lightning_prehab.factorizations import Factorization
from lightning_prehab.linalg.factors import Factors
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.surgery.holders import holders_named_later


def replay_(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", factors: Mapping[str, Factors], method: Factorization
) -> tuple[CompressionReport, Callable[[], None]]:
    """Edits modules and optimizers; nobody is told, since it is no new surgery.

    Args:
        trainer: The running Trainer.
        pl_module: Its module.
        factors: What the checkpoint holds, by the name of the layer.
        method: That they are said to be from.

    Returns:
        The report of it, and what names, later, those who hold something that has been replaced.
    """
    refuse_finders(trainer)
    with holders_named_later() as name_holders:
        groups = StoredGroups(trainer, pl_module)
        report = site_of(trainer, pl_module, 0).swap(plan_of_factors(pl_module, factors, method), factors)
        groups.complete_()
    return report, name_holders
