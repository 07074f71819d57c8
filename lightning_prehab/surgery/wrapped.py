"""Optimizers inside of optimizers, and what else one holds besides its groups and their state."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

#: What every optimizer has.
_OWN = ("param_groups", "state", "defaults")


def family(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """An optimizer and those that it wraps: the base of Lookahead or SAM, the members of a combination.

    A wrapper often shares the groups of its base, but the state stays with the base. One that shows the state of its
    base as its own stands for nothing more, and is left out.
    """
    found: list[torch.optim.Optimizer] = []
    seen: set[int] = set()
    waiting: list[Any] = [optimizer]
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if _is_optimizer(one):
            found.append(one)
            waiting.extend(value for _, value in _attributes(one))
        elif isinstance(one, list | tuple):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one.values())
    return [one for place, one in enumerate(found) if all(other.state is not one.state for other in found[place + 1 :])]


def caches(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> list[dict[Any, Any]]:
    """Dictionaries of an optimizer, besides its state, that have weights as keys: expressions, names."""
    ids = {id(weight) for weight in weights}
    own = (value for _, value in _attributes(optimizer) if isinstance(value, dict))
    return [value for value in own if any(id(key) in ids for key in value)]


def second_holder(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> str | None:
    """The first attribute of an optimizer that would go on with a weight that is replaced; None if there is none.

    That is one that holds the weight itself, in lists of its own, or tensors or an optimizer for it.
    """
    ids = {id(weight) for weight in weights}
    for name, value in _attributes(optimizer):
        own = [one for key, one in value.items() if id(key) in ids] if isinstance(value, dict) else []
        if _leaves(own) or any(id(one) in ids for one in _leaves(value)):
            return name
    return None


def _is_optimizer(value: Any) -> bool:
    """Also one that is no subclass: the wrappers of schedule-free optimizers."""
    return hasattr(value, "param_groups") and hasattr(value, "state") and not isinstance(value, type)


def _attributes(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in vars(optimizer).items() if name not in _OWN)


def _leaves(value: Any) -> list[Any]:
    """All tensors and optimizers in nested plain containers; keys of dictionaries are no values."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor) or _is_optimizer(one):
            found.append(one)
        elif isinstance(one, dict | list | tuple | set) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return found
