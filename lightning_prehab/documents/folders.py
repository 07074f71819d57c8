"""Folders that are made around an output, and go again if nothing comes of it."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def missing_around(path: Path) -> list[Path]:
    """The folders around a path that are not there yet, from the innermost on."""
    return [folder for folder in path.absolute().parents if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of the folders, from the innermost on, that hold nothing."""
    for folder in folders:
        with suppress(OSError):  # it holds something, or is gone
            folder.rmdir()
