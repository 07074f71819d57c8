"""Shows progress while it is made: a thread of its own draws, so that nothing slow is ever without a sign of life."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from lightning_prehab.progress.events import Progress, listening
from lightning_prehab.progress.faces import LEAST, Bars, Face, Lines, WrittenOver
from lightning_prehab.progress.words import Phase

#: Seconds of work before anything is shown: what is quick stays quiet.
QUIET = 1.5
#: Seconds from one drawing to the next.
TICK = 0.25
#: Seconds that the end waits for a drawing that does not come to an end, such as into a pipe that nobody reads.
PATIENCE = 5.0

_one = threading.Lock()  # held by the display of this process: two would write into each other
_drawing = threading.Lock()
if hasattr(os, "register_at_fork"):  # a worker of a DataLoader must not begin with what a drawing has locked
    os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release, after_in_child=_drawing.release)


@contextmanager
def shown(enabled: bool = True, *, write: Callable[[str], object] | None = None) -> Iterator[None]:
    """Inside, what this thread works on is shown: what is being done, how many of how many, time left, memory.

    On a terminal a bar for each phase, by rich where it is installed, else one line that is written over. In files,
    pipes and notebooks a line when a phase begins and ends, and every half minute. All of it goes to standard error.
    Work that is over in a second or two shows nothing. Whatever goes wrong in showing, the work goes on.

    Inside of another ``shown`` it adds nothing. Where several processes work together, the first one alone shows.

    Args:
        enabled: Whether to show anything.
        write: Takes lines, each without its end, instead of standard error.

    >>> import torch
    >>> import lightning_prehab as lp
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> with lp.progress.shown():
    ...     plan = lp.make_plan(lp.find_targets(model), 0.5, lp.SVD())
    """
    if not enabled or not _is_first_process() or not _one.acquire(blocking=False):
        yield
        return
    try:
        display = Display(lambda now: _face(write, now))
        with listening(display.hear), _drawn(display):
            yield
    finally:
        _one.release()


class Display:
    """What is heard of the progress, and drawn from time to time.

    Args:
        make_face: Called with the time of the first drawing's beginning; None shows nothing.
        clock: The time in seconds.
    """

    def __init__(self, make_face: Callable[[float], Face | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._make_face, self._clock = make_face, clock
        self._began = clock()
        self._process = os.getpid()
        self._noting = threading.Lock()
        self._running: list[Phase] = []  # each a part of the one before
        self._over: list[Phase] = []  # since the last drawing
        self._face: Face | None = None
        self._useless = False

    def hear(self, told: Progress) -> None:
        """Takes note; this alone happens in the thread that works."""
        if os.getpid() != self._process:
            return
        now = self._clock()
        with self._noting:
            names = [phase.name for phase in self._running]
            if told.phase in names and told.done >= self._running[names.index(told.phase)].done:
                place = names.index(told.phase)
                began = self._running[place].began
            else:
                place = names.index(told.phase) if told.phase in names else len(names)
                began = now
            phase = Phase(told.phase, began, told.done, told.total, told.what)
            self._running[place:] = [phase]  # parts of it that were left by an error are gone too
            if told.done == told.total:
                self._running.pop()
                if now - began >= LEAST:
                    self._over.append(replace(phase, ended=now))

    def draw(self) -> None:
        """Shows the state of now, unless it is too early. An error is the end of showing, not of the work."""
        now = self._clock()
        if self._useless or now - self._began < QUIET:
            return
        with self._noting:
            over, self._over = self._over, []
            running = list(self._running)
        self._carefully(lambda: self._put(over, running, now))

    def close(self) -> None:
        """Shows how it has ended, if anything was shown."""
        self.draw()
        if self._face is not None:
            self._carefully(self._face.close)

    def _put(self, over: Sequence[Phase], running: Sequence[Phase], now: float) -> None:
        if self._face is None:
            self._face = self._make_face(self._began)
        if self._face is None:
            self._useless = True
        else:
            self._face.draw(over, running, now)

    def _carefully(self, work: Callable[[], None]) -> None:
        try:
            with _drawing:
                work()
        except Exception:  # a closed file, a broken pipe: whatever a terminal leads to
            self._useless = True


@contextmanager
def _drawn(display: Display) -> Iterator[None]:
    """Inside, a thread draws."""
    over = threading.Event()

    def draw() -> None:
        while not over.wait(TICK):
            display.draw()

    thread = threading.Thread(target=draw, name="lightning_prehab.progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)
        if not thread.is_alive():
            display.close()


def _face(write: Callable[[str], object] | None, began: float) -> Face | None:
    """What suits the place where it is shown."""
    if write is not None:
        return Lines(write, began)
    stream = sys.stderr
    if stream is None:
        return None
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return Lines(lambda line: print(line, file=stream, flush=True), began)
    try:
        import rich.console
    except ImportError:
        return WrittenOver(stream, began)
    return Bars(rich.console.Console(file=stream))


def _is_first_process() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    first: bool = torch.distributed.get_rank() == 0
    return first
