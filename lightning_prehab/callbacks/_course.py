"""What a run with prehab goes through, noted on the way and told in the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_prehab.callbacks._figures import figures
from lightning_prehab.callbacks._regularized import RegularizedLayer
from lightning_prehab.callbacks._trainer import callbacks_of
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.course import Moment, PrehabCourse

#: Steps that a training loss is smoothed over.
_STEPS = 32


class CourseNotes:
    """Notes of one fit. They cost one addition in a step; spectra come from whoever computes them anyway."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None  # stays where it is: reading it back in each step would wait for the device
        self._count = 0
        self._start: Moment | None = None
        self._spectra: dict[str, float | None] = {}
        self._validation: dict[str, float] = {}

    def note_loss(self, trainer: "pl.Trainer", outputs: Any) -> None:
        """Takes in the loss of one batch, if it says one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        loss = loss.detach().reshape(()).float() * trainer.accumulate_grad_batches  # Lightning has divided it
        self._count = min(self._count + 1, _STEPS)
        self._loss = loss.clone() if self._loss is None else self._loss.to(loss).lerp(loss, 1.0 / self._count)
        if self._start is not None and self._start.loss is None:
            self._start = replace(self._start, loss=float(loss))

    def note_validation(self, trainer: "pl.Trainer") -> None:
        """Takes in what a validation has logged."""
        if not trainer.sanity_checking:
            logged = {name: _finite(value) for name, value in trainer.callback_metrics.items()}
            self._validation = {
                name: value for name, value in logged.items() if name.startswith("val") and value is not None
            }

    def note_spectra(self, trainer: "pl.Trainer", spectra: Mapping[str, Tensor]) -> None:
        """Takes in where the spectra are; the first time is the start of prehab."""
        self._spectra = {name: _finite(value) for name, value in spectra.items()}
        if self._start is None:
            self._start = self._now(trainer)

    def at_the_cut(self, trainer: "pl.Trainer", report: CompressionReport) -> CompressionReport:
        """The report with the course up to now, if there was a prehab; from here on all is counted anew."""
        course = None if self._start is None else PrehabCourse(self._start, self._now(trainer))
        self._loss, self._count, self._spectra, self._validation, self._start = None, 0, {}, {}, None
        return replace(report, prehab=course)

    def at_the_end(self, trainer: "pl.Trainer", report: CompressionReport) -> CompressionReport:
        """The report with the whole course, said in one line; the same one if that is not for this fit to tell.

        That is so without a prehab, and once a fit has ended: a later one is another run.
        """
        if report.prehab is None or report.prehab.end is not None:
            return report
        course = replace(report.prehab, end=self._now(trainer))
        rank_zero_info(f"prehab: {course.summary()}")
        return replace(report, prehab=course)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        loss = None if self._loss is None else float(self._loss)
        start = None if self._start is None else asdict(self._start)
        known = {"spectra": dict(self._spectra), "validation": dict(self._validation)}
        return {"loss": loss, "count": self._count, "start": start, **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` has written."""
        self._loss = None if state["loss"] is None else torch.tensor(state["loss"])
        self._start = None if state["start"] is None else Moment.from_dict(state["start"])
        self._count = state["count"]
        self._spectra, self._validation = dict(state["spectra"]), dict(state["validation"])

    def _now(self, trainer: "pl.Trainer") -> Moment:
        loss = None if self._loss is None else _finite(self._loss)
        return Moment(trainer.global_step, loss, dict(self._validation), **self._spectra)


def note_spectra(trainer: "pl.Trainer", layers: Sequence[RegularizedLayer]) -> dict[str, Tensor]:
    """Tells whoever takes notes of this run where the spectra of the weights are now, in means over the layers.

    Returns:
        What of it is logged.
    """
    stable, effective, tails = (
        torch.stack(values) for values in zip(*figures(trainer, layers, RegularizedLayer.spectrum), strict=True)
    )
    means = {"stable_rank": stable.mean().float(), "effective_rank": effective.mean().float()}
    for notes in _all_notes(trainer):
        notes.note_spectra(trainer, {**means, "tail_energy": tails.nanmean()})
    return {f"prehab/{name}": value for name, value in means.items()}


def note_start(trainer: "pl.Trainer", layers: Sequence[RegularizedLayer]) -> None:
    """Notes the spectra when the regularizer begins to act, if anybody takes notes: it is a decomposition of each."""
    if _all_notes(trainer):
        note_spectra(trainer, layers)


def _all_notes(trainer: "pl.Trainer") -> list[CourseNotes]:
    found = (getattr(callback, "_course", None) for callback in callbacks_of(trainer))
    return [notes for notes in found if isinstance(notes, CourseNotes)]


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
