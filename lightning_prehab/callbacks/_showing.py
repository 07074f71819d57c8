"""Progress of our own work in the middle of a training run: lines above the Trainer's bar, or in its log."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

from lightning_prehab.progress import shown


def showing(trainer: "pl.Trainer") -> AbstractContextManager[None]:
    """Inside, what takes longer than a second or two is told of in lines, by the first process alone.

    They stand above the progress bar, which stays as it is; without one they are log messages.
    """
    return shown(trainer.is_global_zero, write=_writer(trainer.progress_bar_callback))


def _writer(bar: ProgressBar | None) -> Callable[[str], object]:
    if bar is None or not getattr(bar, "is_enabled", True):
        return rank_zero_info
    if isinstance(bar, TQDMProgressBar):  # its own print is silent before its first bar
        return lambda line: Tqdm.write(line, file=sys.stderr)
    return bar.print
