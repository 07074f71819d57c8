"""Who still holds a layer or a weight that has been replaced: nobody follows a change that nobody tells him of.

The surgery notes what it takes out of the model (:func:`note_replaced`), weakly. When the call that the user made is
over, and everything of ours has been let go of, whatever is still alive is held by somebody else.
"""

import functools
import gc
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from lightning_prehab.kinds import kind_of

P = ParamSpec("P")
T = TypeVar("T")

#: From a holder to what it holds at most so many containers lie, one in the other.
DEPTH = 8
#: Holders that a warning names.
NAMED = 8
#: What only stands between a holder and what it holds.
_BETWEEN = (
    dict,
    OrderedDict,
    defaultdict,
    list,
    tuple,
    set,
    frozenset,
    deque,
    types.CellType,
    types.MethodType,
    types.MappingProxyType,
    functools.partial,
)
#: Packages whose objects watch, cache or run; nobody trains with what they hold.
_BYSTANDERS = (
    "IPython",
    "_pytest",
    "doctest",
    "lightning_prehab",
    "onnx",
    "torch._",
    "torch.autograd",
    "torch.distributed",
    "torch.export",
    "torch.fx",
    "torch.jit",
    "torch.nn.parallel",
    "torch.onnx",
    "torch.utils",
)
_PASSING = (types.FrameType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, types.TracebackType)


class _Notes:
    """What has been replaced in one call, and hooks that had no place to go."""

    def __init__(self) -> None:
        self._replaced: list[weakref.ref[Any]] = []
        self.lost: list[str] = []

    def add(self, things: Iterable[object], lost: Iterable[str]) -> None:
        self._replaced += [weakref.ref(thing) for thing in things]
        self.lost += lost

    def alive(self) -> list[object]:
        return [thing for ref in self._replaced if (thing := ref()) is not None]


_NOTES: ContextVar[_Notes | None] = ContextVar("replaced", default=None)


def note_replaced(pairs: Iterable[tuple[nn.Module, nn.Module]], lost: Iterable[str] = ()) -> None:
    """Remembers what went out of a model, for who is going to name its holders.

    Args:
        pairs: Layers, each with what has taken its place.
        lost: Names of what had hooks that could not follow.
    """
    notes = _NOTES.get()
    if notes is None:
        return
    for old, new in pairs:
        kept = {id(thing) for thing in (*new.modules(), *new.parameters())}
        notes.add((thing for thing in (*old.modules(), *old.parameters()) if id(thing) not in kept), lost)
        lost = ()


def note_gone(things: Iterable[object]) -> None:
    """The same for single modules and parameters."""
    notes = _NOTES.get()
    if notes is not None:
        notes.add(things, ())


def names_holders(call: Callable[P, T]) -> Callable[P, T]:
    """Makes a call of the user's warn of everybody who still holds what it has replaced."""

    @functools.wraps(call)
    def watched(*args: P.args, **kwargs: P.kwargs) -> T:
        with _naming_holders():
            return call(*args, **kwargs)

    return watched


@contextmanager
def holders_named_later() -> Iterator[Callable[[], None]]:
    """Notes what is replaced inside; the call that it gives warns, when whoever is told has had time to let go."""
    notes = _Notes()
    token = _NOTES.set(notes)
    try:
        yield functools.partial(_warn, notes)
    finally:
        _NOTES.reset(token)


@contextmanager
def _naming_holders() -> Iterator[None]:
    if _NOTES.get() is not None:  # a call inside of another one, which is going to tell
        yield
        return
    notes = _Notes()
    token = _NOTES.set(notes)
    try:
        yield
    finally:
        _NOTES.reset(token)
    _warn(notes)


def _warn(notes: _Notes) -> None:
    found, optimizers = holders(notes.alive())
    if found or optimizers:  # what waits for the garbage collector holds nothing
        gc.collect()
        found, optimizers = holders(notes.alive())
    for optimizer in optimizers:
        _warn_when_it_steps(optimizer, notes)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        warnings.warn(
            f"Layers or weights that have been replaced are still held by {', '.join(found[:NAMED])}{more}; these do "
            "not follow. Make them anew from the model after the cut (in a Trainer: in on_surgery, and for runs that "
            "are resumed in on_train_start too), or ask the model each time.",
            stacklevel=2,
        )
    if notes.lost:
        warnings.warn(
            f"Hooks on {', '.join(notes.lost[:NAMED])} had no place to go and are gone; put them on the layers and the "
            "parameters that are there now.",
            stacklevel=2,
        )


def _warn_when_it_steps(optimizer: torch.optim.Optimizer, notes: _Notes) -> None:
    """One that is done with need not follow; one that goes on would train nothing."""

    def tell(*_: object) -> None:
        handle.remove()
        replaced = {id(thing) for thing in notes.alive()}
        stale = sum(id(parameter) in replaced for group in optimizer.param_groups for parameter in group["params"])
        if stale:
            warnings.warn(
                f"{type(optimizer).__name__} steps {stale} weights that have been replaced since it was made, and not "
                "what took their place: pass it to the surgery as optimizers=[...], or make a new one after it.",
                stacklevel=2,
            )

    handle = optimizer.register_step_pre_hook(tell)


def holders(things: Sequence[object]) -> tuple[list[str], list[torch.optim.Optimizer]]:
    """Who holds some layers or parameters, in words, as far as there is a name: attributes, closures, globals.

    Optimizers come apart from the others.

    Local variables do not count, nor do graphs and what libraries keep to themselves. All objects of the process are
    gone through once for each level of containers, not once for each thing.

    >>> layer = nn.Linear(2, 2)
    >>> clipper = types.SimpleNamespace(params=[layer.weight])
    >>> holders([layer, layer.weight])
    (['SimpleNamespace.params (list)'], [])
    """
    held = {id(thing) for thing in things}  # and the containers that lead there
    skipped = {id(things), id(held)}
    for thing in things:
        if isinstance(thing, nn.Module):
            skipped |= {id(vars(thing)), id(thing._parameters), id(thing._modules), id(thing._buffers)}
    skipped |= held
    found: dict[str, None] = {}
    optimizers: list[torch.optim.Optimizer] = []
    level: list[object] = list(things)
    for _ in range(DEPTH):
        if not level:
            break
        skipped.add(id(level))
        above: list[object] = []
        for one in gc.get_referrers(*level):
            if id(one) in skipped or isinstance(one, _PASSING) or _is_bystander(one):
                continue
            skipped.add(id(one))
            if isinstance(one, torch.optim.Optimizer):
                optimizers.append(one)
                continue
            names = _names(one, held)
            found.update(dict.fromkeys(names))
            if not names and (isinstance(one, _BETWEEN) or _is_container(one)):
                above.append(one)
        held |= {id(one) for one in above}
        level = above
    return list(found), optimizers


def _names(one: object, held: set[int]) -> list[str]:
    """What an object calls those of its attributes or variables that are held, or contain what is."""
    kind = type(one).__name__
    if isinstance(one, types.FunctionType):
        cells = zip(one.__code__.co_freevars, one.__closure__ or (), strict=True)
        names = [f"{one.__qualname__} (its variable {name!r})" for name, cell in cells if id(cell) in held]
        return names or ([f"{one.__qualname__} (a default)"] if id(one.__defaults__) in held else [])
    if isinstance(one, _BETWEEN):
        return []
    if isinstance(one, types.ModuleType):
        kind = one.__name__
        attributes = {key: value for key, value in _attributes(one).items() if not key.startswith("_")}
    elif isinstance(one, type):
        kind, attributes = one.__name__, _attributes(one)
    elif _is_container(one):
        return []
    else:
        attributes = _attributes(one)
    return [f"{kind}.{key} ({type(value).__name__})" for key, value in attributes.items() if id(value) in held]


def _attributes(one: object) -> dict[str, Any]:
    """What an object holds by name; of an ``nn.Module`` its children and parameters too."""
    found = dict(getattr(one, "__dict__", {}))
    for base in type(one).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(base).get(slot), types.MemberDescriptorType) and hasattr(one, slot):
                found[slot] = getattr(one, slot)
    if isinstance(one, nn.Module):
        for inside in (found.pop("_modules", {}), found.pop("_parameters", {}), found.pop("_buffers", {})):
            found.update(inside)
    return found


def _is_bystander(one: object) -> bool:
    package = one.__module__ if isinstance(one, type | types.FunctionType) else type(one).__module__
    return not isinstance(package, str) or package.startswith(_BYSTANDERS)


def _is_container(one: object) -> bool:
    """A module that says nothing by itself: one of torch, such as an ``nn.Sequential``, or a layer that can be cut."""
    known = type(one).__module__.startswith("torch.nn.")
    return isinstance(one, nn.Module) and (known or kind_of(one) is not None)
