"""The display, with a clock of our own; what is real is a pseudo-terminal, a pipe, and the thread that draws."""

import io
import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from lightning_prehab.progress import counted, display, doing, listening, naming_items, shown
from lightning_prehab.progress.display import Display
from lightning_prehab.progress.events import Progress
from lightning_prehab.progress.faces import EVERY, Face, Lines, WrittenOver
from lightning_prehab.progress.words import _PHASES, Phase, memory_in_use

PACKAGE = Path(display.__file__).parents[1]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def told(script):
    """The lines about a script of ``(seconds that pass, event or None)``, drawn after each of them."""
    clock, lines = Clock(), []
    shows = Display(lambda began: Lines(lines.append, began), clock)
    for seconds, event in script:
        clock.now += seconds
        if event is not None:
            shows.hear(Progress(*event))
        shows.draw()
    shows.close()
    return [re.sub(r", \d+\.\d GB of memory$", "", line) for line in lines]


def test_quick_work_says_nothing():
    assert told([(0.0, ("calibrate", 0, 2)), (0.7, ("calibrate", 1, 2)), (0.7, ("calibrate", 2, 2))]) == []


def test_lines_at_the_beginning_and_at_the_end_of_each_phase():
    script = [
        (0.0, ("read", 0, 1)),
        (2.0, ("read", 1, 1)),
        (0.0, ("calibrate", 0, 3)),
        (3.0, ("calibrate", 1, 3)),
        (3.0, ("calibrate", 2, 3)),
        (3.0, ("calibrate", 3, 3)),
        (0.0, ("factorize", 0, 9)),  # not worth a line
        (0.5, ("factorize", 9, 9)),
        (0.0, ("decompose", 0, 2, "fc1")),
        (0.9, None),
        (0.2, None),
    ]
    assert told(script) == [
        "reading the model: done in 0:02",
        "calibrating: batch 2 of 3, 0:03, 0:06 left",
        "calibrating: 3 batches in 0:09",
        "decomposing: layer 1 of 2 (fc1), 0:01",
    ]


def test_nothing_is_silent_for_longer_than_half_a_minute():
    inside = [(0.0, ("decompose", 0, 2, "fc1")), *[(1.0, None)] * 95]
    lines = told(inside)
    assert [line.rpartition(", ")[2] for line in lines] == ["0:02", "0:32", "1:02", "1:32"]
    between = [(0.0, ("calibrate", 0, 1)), (2.0, ("calibrate", 1, 1)), *[(1.0, None)] * 61]
    assert told(between) == ["calibrating: 1 batch in 0:02", "working, 0:32", "working, 1:02"]
    assert EVERY <= 30


def test_parts_are_told_with_what_they_are_a_part_of():
    script = [
        (0.0, ("block", 0, 2)),
        (0.0, ("calibrate", 0, None)),
        (2.0, ("calibrate", 1, None)),
        (2.0, ("calibrate", 1, 1)),
        (2.0, ("block", 1, 2)),
        (0.0, ("calibrate", 0, None)),
        (2.0, ("calibrate", 1, None)),
        (2.0, ("block", 2, 2)),  # an error has left the calibration
    ]
    assert told(script) == [
        "in parts: part 1 of 2; calibrating: batch 2, 0:02",
        "calibrating: 1 batch in 0:04",
        "in parts: part 2 of 2; calibrating: batch 2, 0:02",
        "in parts: 2 parts in 0:10",
    ]


def test_a_phase_that_begins_again_counts_from_there():
    script = [(0.0, ("try", 0, 6)), (9.0, ("try", 5, 6)), (1.0, ("try", 0, 6)), (2.0, ("try", 2, 2))]
    assert told(script)[-1] == "trying the cut: 2 passes in 0:02"
    given_up = [(0.0, ("try", 0, 6)), (9.0, ("try", 0, 0)), (0.0, ("write", 0, 1)), (2.0, None)]
    assert told(given_up)[-1] == "writing, 0:02"


def test_every_phase_that_is_told_of_has_words():
    files = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "progress"]
    said = {word for file in files for word in re.findall(r'(?:tell|doing|counted)\([^"\n]*"(\w+)"', file.read_text())}
    assert {"calibrate", "decompose", "try", "read", "write", "time"} <= said
    assert said <= set(_PHASES)
    assert Phase("of_somebody_else", 0.0, 1, 4).title == "of_somebody_else"
    assert Phase("of_somebody_else", 0.0, 1, 4).count == "2 of 4"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not say it")
def test_memory_is_said():
    assert re.fullmatch(r"\d+\.\d GB of memory(, \d+\.\d GB on the GPU)?", memory_in_use())


class Broken(Face):
    def __init__(self):
        self.drawn = 0

    def draw(self, over, running, now):
        self.drawn += 1
        raise BrokenPipeError

    def close(self):
        raise ValueError("I/O operation on closed file")


def test_what_goes_wrong_in_showing_hurts_nobody_and_is_not_tried_again():
    clock, face = Clock(), Broken()
    shows = Display(lambda began: face, clock)
    for _ in range(3):
        clock.now += 5
        shows.hear(Progress("calibrate", 0, 3))
        shows.draw()
    shows.close()
    assert face.drawn == 1


@pytest.fixture
def at_once(monkeypatch):
    """Everything is shown, however quick; drawn by the thread as often as it can."""
    monkeypatch.setattr(display, "QUIET", 0.0)
    monkeypatch.setattr(display, "TICK", 0.001)


def drawers():
    return [thread for thread in threading.enumerate() if thread.name == "lightning_prehab.progress"]


class Recorder(Face):
    """Lets the work wait until it has been drawn."""

    def __init__(self):
        self.running, self.seen, self.closed = [], threading.Event(), 0

    def draw(self, over, running, now):
        self.running.append(list(running))
        if running:
            self.seen.set()

    def close(self):
        self.closed += 1


@pytest.fixture
def recorder(monkeypatch, at_once):
    face = Recorder()
    monkeypatch.setattr(display, "_face", lambda write, began: face)
    return face


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_the_thread_draws_while_nothing_is_told_and_ends_with_the_context(recorder, error):
    with nullcontext() if error is None else pytest.raises(error):  # noqa: SIM117
        with shown(), naming_items("decompose", ["fc1"]):
            for _ in counted([0], "decompose"):
                assert len(drawers()) == 1
                assert recorder.seen.wait(600)
                if error is not None:
                    raise error
    assert drawers() == []
    assert recorder.closed == 1
    assert ("decompose", "fc1") in {(phase.name, phase.what) for running in recorder.running for phase in running}
    with shown():  # and there can be another one
        assert len(drawers()) == 1


def test_one_inside_another_adds_nothing(recorder):
    with shown():
        with shown(), shown(enabled=False), doing("read"):
            assert len(drawers()) == 1
            assert recorder.seen.wait(600)
        assert recorder.closed == 0
    assert recorder.closed == 1


def test_two_threads_do_not_write_into_each_other(recorder):
    with shown():
        elsewhere = []

        def work():
            with shown(), doing("read"):
                elsewhere.append(len(drawers()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert elsewhere == [1]
    assert not any(phase.name == "read" for running in recorder.running for phase in running)


def test_disabled_is_without_a_thread_and_listeners_still_hear():
    heard = []
    with shown(enabled=False), listening(heard.append):
        assert drawers() == []
        list(counted([1], "calibrate"))
    assert len(heard) == 2


def test_the_second_of_several_processes_shows_nothing(monkeypatch, recorder):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        with shown():
            assert len(drawers()) == 1 - rank


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_neither_shows_nor_waits_for_a_drawing(recorder):
    """As the workers of a DataLoader: forked while the other thread draws all the time."""
    with shown(), doing("read"):
        assert recorder.seen.wait(600)
        for _ in range(20):
            child = os.fork()
            if child == 0:
                free = display._drawing.acquire(timeout=600)
                list(counted([1], "calibrate"))
                os._exit(0 if free else 1)
            assert os.waitpid(child, 0)[1] == 0
    assert {phase.name for running in recorder.running for phase in running} == {"read"}


def test_without_standard_error_nothing_is_shown(monkeypatch, at_once):
    monkeypatch.setattr(sys, "stderr", None)
    with shown(), doing("read"):
        pass


def test_lines_for_somebody_else(monkeypatch, at_once, capsys):
    monkeypatch.setattr("lightning_prehab.progress.display.LEAST", 0.0)
    lines = []
    with shown(write=lines.append):
        list(counted([1, 2], "calibrate"))
    assert lines[-1].startswith("calibrating: 2 batches in 0:0")
    assert capsys.readouterr().err == ""


def test_a_line_that_is_written_over_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    face = WrittenOver(stream, 0.0)
    face.draw([], [Phase("decompose", 0.0, 1, 30, "a.very.long.name.of.a.layer.that.does.not.end.soon")], 9.0)
    face.draw([], [Phase("write", 9.0, 0, 1)], 10.0)
    face.draw([Phase("write", 9.0, 1, 1, ended=12.0)], [], 12.0)
    face.close()
    screen = [""]  # what a terminal makes of it
    for part in re.findall(r"\r|\n|[^\r\n]+", stream.getvalue()):
        if part == "\n":
            screen.append("")
            column = 0
        elif part == "\r":
            column = 0
        else:
            assert len(part) < 60
            screen[-1] = screen[-1][:column] + part + screen[-1][column + len(part) :]
            column += len(part)
    assert [line.strip() for line in screen] == ["writing: done in 0:03", ""]


SCRIPT = """
import sys, threading, types
package = sys.modules["lightning_prehab"] = types.ModuleType("lightning_prehab")  # this room alone: it is fast
package.__path__ = [sys.argv[1]]
from lightning_prehab.progress import counted, display, shown
if "no rich" in sys.argv:
    sys.modules["rich"] = sys.modules["rich.console"] = None
display.QUIET, display.LEAST, display.TICK = 0.0, 0.0, 0.01
drawn = threading.Condition()
put = display.Display._put
def noting(self, *state):
    put(self, *state)
    with drawn:
        drawn.notify_all()
display.Display._put = noting
def wait():
    with drawn:
        assert drawn.wait(600)
with shown():
    for _ in counted(range(2), "calibrate"):
        wait()
    print("a result")
    for _ in counted(range(3), "decompose"):
        wait(), wait()
print("the end")
"""


def on_a_terminal(*arguments, columns=80, output=None):
    """What a child writes to a pseudo-terminal; its standard output goes there too, or to a file."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(PACKAGE), *arguments],
        stdin=slave,
        stdout=slave if output is None else output,
        stderr=slave,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(slave)
    written = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        written += part
    os.close(master)
    assert child.wait() == 0, written.decode()
    return written.decode()


needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


@needs_pty
@pytest.mark.parametrize("columns", [80, 100])
def test_bars_on_a_terminal(columns):
    written = on_a_terminal(columns=columns)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    lines = [line for part in plain.splitlines() for line in part.split("\r")]
    assert any(re.match(r"calibrating +[━╸╺ ]+ batch [12] of 2 +0:0\d", line) for line in lines)
    assert any(re.match(r"decomposing +[━╸╺ ]+ layer 2 of 3 +0:0\d, 0:0\d left", line) for line in lines)
    assert any(re.match(r"decomposing +━+ +3 layers +0:0\d", line) for line in lines)
    assert any(re.match(r"\d\.\d GB of memory", line) for line in lines) or not memory_in_use()
    assert max(map(len, lines)) <= columns
    assert lines.count("a result") == 1
    assert [line for line in lines if line][-1] == "the end"
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0  # the cursor is there again


@needs_pty
def test_one_line_on_a_terminal_without_rich():
    written = on_a_terminal("no rich")
    assert "\x1b" not in written
    lines = [line.strip() for part in written.splitlines() for line in part.split("\r")]
    assert any(line.startswith("calibrating: batch 2 of 2, 0:0") for line in lines)
    assert any(line.startswith("decomposing: 3 layers in 0:0") for line in lines)
    assert max(map(len, lines)) < 80
    assert lines[-1] == "the end" or lines[-2] == "the end"


@needs_pty
def test_results_go_to_their_file_whatever_is_shown(tmp_path):
    with (tmp_path / "out").open("w") as output:
        written = on_a_terminal(output=output)
    assert (tmp_path / "out").read_text() == "a result\nthe end\n"
    assert "a result" not in written
    assert "decomposing" in written


def test_lines_in_a_pipe():
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(PACKAGE)], capture_output=True, text=True, check=True)
    assert run.stdout == "a result\nthe end\n"
    assert [re.sub(r"\d:\d+", "TIME", line) for line in run.stderr.splitlines() if "in 0:" in line] == [
        "calibrating: 2 batches in TIME",
        "decomposing: 3 layers in TIME",
    ]
    assert "\x1b" not in run.stderr
