"""The report on the console, past a progress bar."""

import shutil
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


def show(pl_module: "pl.LightningModule", shown: Any) -> None:
    """Prints once, on rank zero: in colour and as wide as the terminal where there is one and rich is installed.

    Args:
        pl_module: Knows where to print, so that a progress bar stays whole.
        shown: Has a plain form, and one for rich.
    """
    text = _coloured(shown) if sys.stdout.isatty() else f"\n{shown}"
    trainer = pl_module.trainer
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:  # its own print is silent before its first bar
        if trainer.is_global_zero:
            Tqdm.write(text)
    else:
        pl_module.print(text)


def _coloured(shown: Any) -> Any:
    try:
        import rich.console
    except ImportError:
        return f"\n{shown}"
    width = shutil.get_terminal_size().columns
    console = rich.console.Console(width=width, force_terminal=True)
    with console.capture() as capture:
        console.print(shown)
    return f"\n{capture.get().rstrip()}"
