"""All processes have to be given the same callbacks and settings: each does its part of one work."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed, nn

from lightning_prehab.callbacks._distributed import gather, together
from lightning_prehab.errors import ArgumentError

#: Settings that are names or patterns; their order has no meaning.
_NAMES = {"target_modules", "exclude_modules", "feature_modules"}
#: Functions of the user's: each process has its own, and two of them cannot be compared.
_FUNCTIONS = {"forward"}
#: Of a callback its class and, by the name of the argument, its settings as plain data.
Told = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Thing:
    """What is no number, text or collection: its text, or the name of its class and what it holds."""

    text: str
    held: dict[str, Any] | None = None

    def __repr__(self) -> str:
        if self.held is None:
            return self.text
        return f"{self.text}({', '.join(f'{name}={value!r}' for name, value in self.held.items())})"


def check_same_settings(trainer: "pl.Trainer", settings: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises on all processes if one of them was given other callbacks of ours, or other settings, than the first.

    Two small messages; every process that has a callback of ours has to call it.

    Args:
        trainer: Of the run.
        settings: Of each callback, in order: its class, and its settings by the name of the argument. If to find them
            can fail, give a generator: a failure in it on one process is raised on all of them.

    Raises:
        ArgumentError: It names the callback, the setting, and what it is where.
    """
    if trainer.world_size == 1 or not distributed.is_initialized():  # else the strategy is refused next
        return
    first, *others = gather(trainer, together(trainer, lambda: [(who, as_told(mine)) for who, mine in settings]))
    for rank, other in enumerate(others, start=1):
        difference = _difference(first, other, rank)
        if difference is not None:
            raise ArgumentError(
                f"{difference}. All processes do parts of the same work: give the same on all of them. Settings that "
                "are read from a file, the environment or a random number have to come out alike everywhere."
            )


def _difference(first: Sequence[Told], other: Sequence[Told], rank: int) -> str | None:
    callbacks, theirs = (", ".join(who for who, _ in told) for told in (first, other))
    if callbacks != theirs:
        return f"Rank 0 was given {callbacks}, in this order, and rank {rank} {theirs}"
    for (who, mine), (_, its) in zip(first, other, strict=True):
        for name in sorted(mine.keys() | its.keys()):
            if mine.get(name) != its.get(name):
                return f"{who}: {name} is {mine.get(name)!r} on rank 0 and {its.get(name)!r} on rank {rank}"
    return None


def as_told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a callback as plain data, equal in all processes that have been given the same.

    >>> as_told({"target_modules": ["b", "a"], "forward": print, "epoch": 3})
    {'target_modules': ['a', 'b'], 'forward': given, 'epoch': 3}
    """
    several = isinstance(settings.get("epoch"), list)  # cuts: each of their settings is a list, one for each of them
    told: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _FUNCTIONS and value is not None:
            told[name] = Thing("given")
        elif name in _NAMES:
            told[name] = list(map(_as_names, value)) if several else _as_names(value)
        else:
            told[name] = as_plain(value)
    return told


def _as_names(patterns: object) -> Any:
    """One name is a list of one; what is no list of names stays, for others to refuse."""
    found = [as_plain(patterns)] if isinstance(patterns, str) else as_plain(patterns)
    names = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return sorted(set(found)) if names else found


def as_plain(value: object) -> Any:
    """A setting as data that can be sent, compared and shown: equal values are equal, in whatever process.

    >>> as_plain({"b", "a"}), as_plain(print), as_plain((0.5, None))
    (['a', 'b'], <built-in function print>, [0.5, None])
    """
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():  # a number of numpy's
        value = value.tolist()  # type: ignore[attr-defined]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and not math.isnan(value):  # nan is not even equal to itself
        return float(value)
    if isinstance(value, Mapping):
        return {Thing(repr(as_plain(key))): as_plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):  # strings come in another order in each process
        return sorted(map(as_plain, value), key=repr)
    if isinstance(value, list | tuple):
        return list(map(as_plain, value))
    if isinstance(value, torch.Tensor | nn.Module):
        return Thing(type(value).__name__)  # not looked into
    if is_dataclass(value) and not isinstance(value, type):
        held = {one.name: as_plain(getattr(value, one.name, None)) for one in fields(value) if one.compare}
        return Thing(type(value).__name__, held)
    return Thing(_text(value))


def _text(value: object) -> str:
    """What the object says of itself, without addresses: they differ from process to process."""
    try:
        return re.sub(rf" at 0x[0-9a-f]+|(0x0*)?{id(value):x}|{id(value)}", "", repr(value), flags=re.IGNORECASE)
    except Exception:  # somebody's own __repr__
        return type(value).__name__
