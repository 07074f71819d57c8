"""Who hears of a surgery that has been made: the console, the loggers, callbacks and the module."""

import lightning.pytorch as pl

from lightning_prehab.callbacks._distributed import together
from lightning_prehab.callbacks._listeners import tell_listeners
from lightning_prehab.callbacks._printing import show
from lightning_prehab.callbacks._report_logging import log_report
from lightning_prehab.callbacks._trainer import EQUAL
from lightning_prehab.report.compression_report import CompressionReport


def announce(trainer: "pl.Trainer", pl_module: "pl.LightningModule", report: CompressionReport, number: int) -> None:
    """Prints the report, logs its numbers, gives it to loggers, and calls ``on_surgery`` of whoever has it.

    If a listener fails on one process, all of them raise. The model has been cut by then.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        report: Of the surgery.
        number: Which one of the run, from 1.
    """
    show(pl_module, report)
    shares = {"compression/keep": report.keep, "compression/model_keep": report.model_keep}
    pl_module.log_dict(shares, batch_size=1, **EQUAL)
    log_report(trainer, report, number)
    together(trainer, lambda: tell_listeners(trainer, pl_module, "on_surgery", report))
