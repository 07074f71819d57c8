"""Tensors in whatever modules are called with and return."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def all_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, tuples, lists and dataclasses, in order; of other objects their logits."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in list(value.values()):
            yield from all_tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from all_tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from all_tensors(getattr(value, one.name, None))
    elif isinstance(logits := getattr(value, "logits", None), Tensor):
        yield logits


def held(value: Any) -> Any:
    """The same in dicts, lists and tuples of its own, so that nobody puts anything else into them later.

    >>> batch = {"x": [1, 2]}
    >>> mine = held(batch)
    >>> batch["x"].pop(), batch.pop("x"), mine
    (2, [1], {'x': [1, 2]})
    """
    if type(value) is dict or isinstance(value, UserDict):
        made = copy.copy(value)
        for key, part in value.items():
            made[key] = held(part)
        return made
    if type(value) in (list, tuple):
        return type(value)(map(held, value))
    return value


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors in it; types are kept, and what holds none that changes stays the same object."""
    if isinstance(value, Tensor):
        return change(value)
    if not any(change(one) is not one for one in all_tensors(value)):
        return value
    if isinstance(value, dict):
        made: Any = copy.copy(value)
        for key, part in value.items():
            made[key] = with_tensors(part, change)
        return made
    if isinstance(value, Mapping):
        return {key: with_tensors(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [with_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one.name for one in dataclasses.fields(value) if one.init]
        return dataclasses.replace(value, **{name: with_tensors(getattr(value, name), change) for name in fields})
    made = copy.copy(value)
    made.logits = change(value.logits)
    return made
