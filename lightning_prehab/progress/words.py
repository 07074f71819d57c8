"""Phases, times and memory in words."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: What is being done, what is counted, and the plural of that.
_PHASES = {
    "read": ("reading the model", "", ""),
    "block": ("in parts", "part", "parts"),
    "forward": ("running forward", "block", "blocks"),
    "calibrate": ("calibrating", "batch", "batches"),
    "prepare": ("preparing the regularizer", "layer", "layers"),
    "decompose": ("decomposing", "layer", "layers"),
    "alternate": ("choosing entries", "round", "rounds"),
    "probe": ("probing", "layer", "layers"),
    "budget": ("trying budgets", "trial", "trials"),
    "time": ("timing", "layer", "layers"),
    "factorize": ("factorizing", "layer", "layers"),
    "try": ("trying the cut", "pass", "passes"),
    "refine": ("refining", "step", "steps"),
    "refine blocks": ("refining", "block", "blocks"),
    "evaluate": ("evaluating", "batch", "batches"),
    "train": ("training", "step", "steps"),
    "run": ("running", "run", "runs"),
    "measure": ("measuring", "batch", "batches"),
    "sample": ("writing own samples", "token", "tokens"),
    "write": ("writing", "", ""),
}


@dataclass(frozen=True)
class Phase:
    """A phase of the work at one moment.

    Attributes:
        name: As it is told.
        began: Its first second, by some clock.
        done: How many are done.
        total: Of how many, or None.
        what: The one that is being worked on.
        ended: Its last second, or None while it goes on.
    """

    name: str
    began: float
    done: int = 0
    total: int | None = None
    what: str = ""
    ended: float | None = None

    @property
    def title(self) -> str:
        """What is being done."""
        return _PHASES.get(self.name, (self.name,))[0]

    @property
    def count(self) -> str:
        """Which one is worked on, or how many there were; empty for what cannot be counted.

        >>> Phase("calibrate", 0.0, 2, 40).count, Phase("decompose", 0.0, 2, 2, ended=1.0).count
        ('batch 3 of 40', '2 layers')
        """
        _, one, many = _PHASES.get(self.name, ("", "", ""))
        if self.ended is not None:
            return "" if not one or self.total is None else f"{self.total} {one if self.total == 1 else many}"
        if self.total is None:
            return f"{one} {self.done + 1}".strip()
        if self.total <= 1 and not one:
            return ""
        return f"{one} {min(self.done + 1, self.total)} of {self.total}".strip()

    def seconds(self, now: float) -> float:
        """How long it has taken so far, or in all."""
        return (now if self.ended is None else self.ended) - self.began

    def left(self, now: float) -> float | None:
        """How long it will take yet, if it goes on as it has; None if that cannot be known."""
        if self.total is None or self.ended is not None or not 0 < self.done < self.total:
            return None
        return self.seconds(now) / self.done * (self.total - self.done)

    def times(self, now: float) -> str:
        """How long it has taken, and what is left.

        >>> Phase("calibrate", 0.0, 10, 40).times(30.0)
        '0:30, 1:30 left'
        """
        left = self.left(now)
        return clock_time(self.seconds(now)) + ("" if left is None else f", {clock_time(left)} left")


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock_time(31.4), clock_time(3723)
    ('0:31', '1:02:03')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def in_words(seconds: float) -> str:
    """A time that is not known exactly.

    >>> in_words(7.2), in_words(100), in_words(1500), in_words(5000)
    ('less than a minute', '2 minutes', '25 minutes', '1.4 hours')
    """
    if seconds < 60:
        return "less than a minute"
    return f"{max(round(seconds / 60), 2)} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def memory_in_use() -> str:
    """Memory of this process, where the system says it (Linux), and what torch holds on GPUs; else empty."""
    found = []
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(f"{pages * _page_size() / 1e9:.1f} GB of memory")
    except (OSError, LookupError, ValueError):
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        held = sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
        found.append(f"{held / 1e9:.1f} GB on the GPU")
    return ", ".join(found)


def _page_size() -> int:
    import resource

    return resource.getpagesize()


def status(running: Sequence[Phase], now: float) -> str:
    """One line about what is being done, at least one phase: the innermost phase, after those that it is a part of.

    >>> status([Phase("block", 0.0, 1, 3), Phase("decompose", 1.0, 2, 9, "fc1")], 5.0)
    'in parts: part 2 of 3; decomposing: layer 3 of 9 (fc1), 0:04, 0:14 left'
    """
    parts = "; ".join(": ".join(filter(None, (phase.title, phase.count))) for phase in running)
    innermost = running[-1]
    what = f" ({innermost.what})" if innermost.what else ""
    return f"{parts}{what}, {innermost.times(now)}"


def summary(phase: Phase) -> str:
    """One line about a phase that is over.

    >>> summary(Phase("calibrate", 0.0, 40, 40, ended=92.0))
    'calibrating: 40 batches in 1:32'
    """
    return f"{phase.title}: {phase.count or 'done'} in {clock_time(phase.seconds(0.0))}"
