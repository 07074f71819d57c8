"""Parameter groups that exist for one step: some parameters are stepped with settings of their own.

The user's groups are there again after the step, with what the optimizer has counted in them. So schedulers, monitors
and checkpoints know nothing of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prehab.errors import UnsupportedError

#: What a group for one step has of its own.
_OWN = ("params", "param_names", "lr", "weight_decay")


class Apart(NamedTuple):
    """How a parameter is stepped.

    Attributes:
        rate: A factor on the learning rate.
        decays: Whether the weight decay of the group acts on it.
    """

    rate: float = 1.0
    decays: bool = True


class _Divided(NamedTuple):
    group: dict[str, Any]
    kept: dict[str, Any]  # its own lists
    others: list[dict[str, Any]]


class StepGroups:
    """Takes parameters out of the groups of an optimizer, and puts them back.

    Args:
        optimizers: The optimizer and those inside of it, which may share groups.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._lists: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []  # those of now, and what was in them
        self._divided: dict[int, _Divided] = {}

    def open(self, wishes: Mapping[int, Apart]) -> None:
        """Puts parameters into groups of their own.

        Args:
            wishes: By the id of the parameter; the others stay where they are.
        """
        self.close()
        for optimizer in self._optimizers:
            groups = optimizer.param_groups
            if any(groups is other for other, _ in self._lists):
                continue
            self._lists.append((groups, list(groups)))
            for group in list(groups):
                if id(group) not in self._divided:
                    self._divided[id(group)] = _divide(group, wishes)
            groups[:] = [one for group in groups for one in (group, *self._divided[id(group)].others)]

    def rates(self) -> dict[int, float | Tensor]:
        """The learning rate of each parameter, by its id, as the groups are now."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {id(parameter): group.get("lr", 0.0) for group in groups for parameter in group["params"]}

    def close(self) -> None:
        """The groups are the user's again.

        Raises:
            UnsupportedError: If the optimizer has counted something that is not the same for all of a group any more.
        """
        divided, self._divided = list(self._divided.values()), {}
        for groups, before in self._lists:
            groups[:] = before
        self._lists = []
        strange = [key for one in divided for key in _unite(one)]
        if strange:
            name = type(self._optimizers[0]).__name__
            raise UnsupportedError(
                f"{name} keeps {strange[0]!r} in its parameter groups, and it depends on the settings that "
                "FactorTraining gives the factors there. Leave out rate_A, rate_B and product_decay, or use another "
                "optimizer."
            )


def _divide(group: dict[str, Any], wishes: Mapping[int, Apart]) -> _Divided:
    """Takes parameters out of a group."""
    kept: dict[str, Any] = {key: group[key] for key in ("params", "param_names") if key in group}
    names = group.get("param_names", [None] * len(group["params"]))
    parts: dict[Apart, list[tuple[Tensor, Any]]] = {}
    for parameter, name in zip(group["params"], names, strict=True):
        parts.setdefault(wishes.get(id(parameter), Apart()), []).append((parameter, name))
    rest = parts.pop(Apart(), [])
    if not parts:
        return _Divided(group, kept, [])
    others = []
    for wish, members in parts.items():
        other = {**group, **_lists(group, members)}
        if "lr" in group and wish.rate != 1.0:
            other["lr"] = group["lr"] * wish.rate
        if "weight_decay" in group and not wish.decays:
            other["weight_decay"] = 0.0
        others.append(other)
    group.update(_lists(group, rest))
    return _Divided(group, kept, others)


def _lists(group: Mapping[str, Any], members: Sequence[tuple[Tensor, Any]]) -> dict[str, Any]:
    lists = {"params": [parameter for parameter, _ in members], "param_names": [name for _, name in members]}
    return {key: value for key, value in lists.items() if key in group}


def _unite(divided: _Divided) -> list[str]:
    """Puts the lists of a group back; returns what differs between it and the others."""
    group, kept, others = divided
    if others and not group["params"]:  # the optimizer may not even have looked at it
        group.update({key: value for key, value in others[0].items() if key not in _OWN})
    group.update(kept)
    keys = {key for one in (group, *others) for key in one if key not in _OWN}
    return [key for key in sorted(keys) if any(not _same(group.get(key), other.get(key)) for other in others)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
