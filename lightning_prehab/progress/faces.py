"""How progress looks: lines, one line that is written over, bars."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TextIO

from lightning_prehab.progress.words import Phase, clock_time, memory_in_use, status, summary

if TYPE_CHECKING:
    import rich.console

#: Seconds after which a phase is spoken of; shorter ones are not worth a line.
LEAST = 1.0
#: Seconds without a line after which there is another one.
EVERY = 30.0


class Face(ABC):
    """Shows how the work is going. It is drawn again and again, by one thread at a time."""

    @abstractmethod
    def draw(self, over: Sequence[Phase], running: Sequence[Phase], now: float) -> None:
        """Shows the state of now.

        Args:
            over: Phases that have ended since the last time, of some length.
            running: Those that go on, each a part of the one before.
            now: The time.
        """

    def close(self) -> None:  # noqa: B027  # most have nothing to put away
        """Leaves the screen in order; nothing is drawn any more."""


class Lines(Face):
    """Whole lines, for files, pipes and logs: when a phase begins and ends, and every half minute.

    Args:
        write: Takes a line, without its end.
        began: The time at the start.
    """

    def __init__(self, write: Callable[[str], object], began: float) -> None:
        self._write = write
        self._began = self._said = began
        self._announced: set[tuple[str, float]] = set()

    def draw(self, over: Sequence[Phase], running: Sequence[Phase], now: float) -> None:
        """Says what is new, or what takes long."""
        for phase in over:
            self._write(summary(phase))
            self._said = now
        newest = {(phase.name, phase.began) for phase in running[-1:] if phase.seconds(now) >= LEAST}
        if newest - self._announced or now - self._said >= EVERY:
            self._announced |= {(phase.name, phase.began) for phase in running}
            self._write(self._status(running, now))
            self._said = now

    def _status(self, running: Sequence[Phase], now: float) -> str:
        said = status(running, now) if running else f"working, {clock_time(now - self._began)}"
        return ", ".join(filter(None, (said, memory_in_use())))


class WrittenOver(Lines):
    """One line of a terminal that is written over, and one for each phase that is over."""

    def __init__(self, stream: TextIO, began: float) -> None:
        super().__init__(self._write_line, began)
        self._stream = stream
        self._shown = 0  # letters that stand there

    def draw(self, over: Sequence[Phase], running: Sequence[Phase], now: float) -> None:
        """Writes the line anew."""
        for phase in over:
            self._write_line(summary(phase))
        columns = get_terminal_size().columns - 1
        self._put(self._status(running, now)[:columns])

    def close(self) -> None:
        """Takes the line away."""
        self._put("")

    def _write_line(self, line: str) -> None:
        self._put(line)
        self._stream.write("\n")
        self._shown = 0

    def _put(self, line: str) -> None:
        self._stream.write(f"\r{line.ljust(self._shown)}" + ("" if line else "\r"))
        self._stream.flush()
        self._shown = len(line)


class Bars(Face):
    """A bar for each phase, by rich; what others print meanwhile stands above."""

    def __init__(self, console: "rich.console.Console") -> None:
        import rich.live

        # What goes to a file by standard output must not come to the terminal of standard error.
        both = sys.stdout is not None and sys.stdout.isatty()
        self._live = rich.live.Live(console=console, auto_refresh=False, redirect_stdout=both)
        self._phases: dict[str, Phase] = {}

    def draw(self, over: Sequence[Phase], running: Sequence[Phase], now: float) -> None:
        """All phases so far, the last time of each, and beneath what is being worked on."""
        gone = {name for name, phase in self._phases.items() if phase.ended is None}
        latest = {phase.name: phase for phase in (*over, *running)}
        self._phases.update(latest)
        for name in gone - set(latest):
            del self._phases[name]  # too short to be remembered
        if not self._live.is_started:
            self._live.start()
        self._live.update(self._picture(running, now), refresh=True)

    def close(self) -> None:
        """Leaves the bars as they are."""
        self._live.stop()

    def _picture(self, running: Sequence[Phase], now: float) -> "rich.console.RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            table.add_column(no_wrap=True)
        width = max(min(self._live.console.width - 60, 40), 5)
        for phase in self._phases.values():
            whole = phase.ended is not None
            bar = ProgressBar(
                total=1 if whole else max(phase.total or 1, 1),
                completed=1 if whole else phase.done,
                width=width,
                pulse=not whole and (phase.total is None or phase.total == 1),
                animation_time=now,
            )
            table.add_row(phase.title, bar, Text(phase.count, style="cyan"), Text(phase.times(now), style="dim"))
        if not running:
            return table
        beneath = ", ".join(filter(None, (memory_in_use(), running[-1].what)))
        return Group(table, Text(beneath, style="dim", no_wrap=True, overflow="ellipsis"))
