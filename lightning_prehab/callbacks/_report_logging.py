"""The report in experiment loggers, by what they offer; none of them is imported.

TensorBoard, W&B and MLflow get the table and the figures (those only with matplotlib); others, CSVLogger among them,
keep the two numbers that are logged in any case.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prehab.errors import PrehabError
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.figures import to_pixels


def log_report(trainer: "pl.Trainer", report: CompressionReport, number: int = 1) -> None:
    """Writes the report to each logger of rank zero; one that fails is named in a warning, and training goes on.

    Args:
        trainer: The Trainer.
        report: Of a surgery.
        number: Which one of the run, from 1; files of a run have names of their own from the second on.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        _try_to_log(logger, trainer.global_step, report, number)


def _try_to_log(logger: Any, step: int, report: CompressionReport, number: int) -> None:
    try:
        _log_to(logger, step, report, number)
    except Exception as error:  # a logger's network or disk is no reason to lose the run
        rank_zero_warn(
            f"The compression report could not be written to {type(logger).__name__} "
            f"({type(error).__name__}: {error}); it is in CompressionCallback.report all the same."
        )


def _log_to(logger: Any, step: int, report: CompressionReport, number: int) -> None:
    if _offers(logger, "log_text", "log_image"):  # W&B: the logger itself
        table = report.table(every_layer=True)
        columns = [*table.columns, "why"]
        rows = [[row.get(column, "") for column in columns] for row in (*table.rows, table.footer)]
        logger.log_text("compression/report", columns=columns, data=rows, step=step)
        for name, figure in _figures(report).items():
            logger.log_image(f"compression/{name}", [to_pixels(figure)], step=step)
        return
    experiment = logger.experiment
    if _offers(experiment, "add_text", "add_figure"):  # TensorBoard: its text is markdown, where this is code
        code = "\n".join(f"    {line}" for line in str(report).splitlines())
        experiment.add_text("compression/report", code, step)
        for name, figure in _figures(report).items():
            experiment.add_figure(f"compression/{name}", figure, step)
    elif _offers(experiment, "log_text", "log_figure") and hasattr(logger, "run_id"):  # MLflow: files of a run
        folder = "compression" if number == 1 else f"compression-{number}"
        experiment.log_text(logger.run_id, f"{report}\n", f"{folder}/report.txt")
        for name, figure in _figures(report).items():
            experiment.log_figure(logger.run_id, figure, f"{folder}/{name}.png")


def _offers(found: object, *names: str) -> bool:
    return all(callable(getattr(found, name, None)) for name in names)


def _figures(report: CompressionReport) -> dict[str, Any]:
    """All figures by name; none without matplotlib, which is an extra."""
    try:
        return {name: report.figure(name) for name in report.figure_names}
    except PrehabError:
        return {}
