"""What long work says of itself, to whoever listens, and the display of it."""

from lightning_prehab.progress.display import shown
from lightning_prehab.progress.events import (
    Listener,
    Progress,
    counted,
    doing,
    ends_the_work,
    length_of,
    listening,
    naming_items,
    quiet,
    tell,
)
from lightning_prehab.progress.words import clock_time

__all__ = [
    "Listener",
    "Progress",
    "clock_time",
    "counted",
    "doing",
    "ends_the_work",
    "length_of",
    "listening",
    "naming_items",
    "quiet",
    "shown",
    "tell",
]
