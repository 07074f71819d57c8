"""What long work says of itself while it goes on, to whoever listens; without a listener it says nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Progress(NamedTuple):
    """How far one phase of the work has come.

    A phase begins with ``done`` 0 and is over when ``done`` is ``total``. What is told meanwhile of another phase is
    told of a part of it.

    Attributes:
        phase: What is being done: ``"read"``, ``"block"``, ``"calibrate"``, ``"decompose"``, ``"alternate"``,
            ``"probe"``, ``"time"``, ``"prepare"``, ``"factorize"``, ``"try"``, ``"evaluate"``, ``"measure"``,
            ``"sample"`` or ``"write"``.
        done: How many are done, from 0.
        total: Of how many, or None if that is not known. 1 for what cannot be counted.
        what: The one that comes next, such as the name of a layer; empty if it has none.
    """

    phase: str
    done: int
    total: int | None
    what: str = ""


Listener = Callable[[Progress], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("lightning_prehab_listeners", default=())
_names: ContextVar[Mapping[str, Sequence[str]]] = ContextVar("lightning_prehab_progress_names", default={})  # noqa: B039


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` hears of the progress of whatever this thread does.

    What a listener raises ends the work, and the model is then as it was. Nothing is told while a model changes; when
    it is measured afterwards (``"evaluate"``), what a listener raises is a warning, and the report has no scores.

    >>> heard = []
    >>> with listening(heard.append):
    ...     batches = list(counted(["a", "b"], "calibrate"))
    >>> [(phase, done, total) for phase, done, total, _ in heard]
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


@contextmanager
def naming_items(phase: str, names: Sequence[str]) -> Iterator[None]:
    """Inside, what is told of a phase says which one comes next: for code that knows its items by number alone.

    >>> heard = []
    >>> with listening(heard.append), naming_items("decompose", ["fc1", "fc2"]):
    ...     weights = list(counted([0.0, 1.0], "decompose"))
    >>> [one.what for one in heard]
    ['fc1', 'fc2', '']
    """
    token = _names.set({**_names.get(), phase: names})
    try:
        yield
    finally:
        _names.reset(token)


def tell(phase: str, done: int, total: int | None = None, what: str = "") -> None:
    """Says that ``done`` of ``total`` are done, and what comes next."""
    listeners = _listeners.get()
    if not listeners:
        return
    names = _names.get().get(phase, ())
    if not what and done < len(names):
        what = names[done]
    try:
        for listener in listeners:
            listener(Progress(phase, done, total, what))
    except Exception as error:
        error._lightning_prehab_heard = True  # type: ignore[attr-defined]
        raise


def ends_the_work(error: Exception) -> bool:
    """Whether a listener has raised this: who goes on after errors, since it can do without, must not after this one.

    >>> ends_the_work(ValueError("of the user's loss"))
    False
    """
    return getattr(error, "_lightning_prehab_heard", False)


@contextmanager
def doing(phase: str, what: str = "") -> Iterator[None]:
    """Tells of something that cannot be counted."""
    tell(phase, 0, 1, what)
    yield
    tell(phase, 1, 1)


def counted(items: Iterable[T], phase: str, total: int | None = None) -> Iterator[T]:
    """The same items; each is told of when the next one is asked for, and the end of the phase when there is none.

    Args:
        items: What the phase goes through, one after the other.
        phase: Its name.
        total: Their number; None takes their length, if they have one.
    """
    total = length_of(items) if total is None else total
    done = 0
    tell(phase, done, total)
    for done, item in enumerate(items, start=1):
        yield item
        tell(phase, done, total)
    if done != total:
        tell(phase, done, done)


def length_of(items: object) -> int | None:
    """``len(items)``, or None if that does not work: a DataLoader has a length or not, as its data set has.

    >>> length_of([1, 2]), length_of(iter([1, 2]))
    (2, None)
    """
    try:
        return len(items)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
