"""What long work says of itself while it goes on, to whoever listens; without a listener it says nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Progress(NamedTuple):
    """How far one phase of the work has come.

    Attributes:
        phase: What is being done: ``"calibrate"``, ``"decompose"``, ``"probe"`` or
            ``"factorize"``.
        done: How many are done, from 0.
        total: Of how many, or None if that is not known.
    """

    phase: str
    done: int
    total: int | None


Listener = Callable[[Progress], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("lightning_prehab_listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` hears of the progress of whatever this thread does.

    What a listener raises ends the work. Nothing is told once a model begins to change, so the model is then as it was.

    >>> heard = []
    >>> with listening(heard.append):
    ...     batches = list(counted(["a", "b"], "calibrate"))
    >>> [(phase, done, total) for phase, done, total in heard]
    [('calibrate', 0, 2), ('calibrate', 1, 2), ('calibrate', 2, 2)]
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside nothing is told: for parts of something that tells of itself as a whole."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


def tell(phase: str, done: int, total: int | None = None) -> None:
    """Says that ``done`` of ``total`` are done."""
    for listener in _listeners.get():
        listener(Progress(phase, done, total))


def counted(items: Iterable[T], phase: str, total: int | None = None) -> Iterator[T]:
    """The same items; each is told of when the next one is asked for.

    Args:
        items: What the phase goes through, one after the other.
        phase: Its name.
        total: Their number; None takes their length, if they have one.
    """
    total = length_of(items) if total is None else total
    tell(phase, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        tell(phase, done, total)


def length_of(items: object) -> int | None:
    """``len(items)``, or None if that does not work: a DataLoader has a length or not, as its data set has.

    >>> length_of([1, 2]), length_of(iter([1, 2]))
    (2, None)
    """
    try:
        return len(items)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
