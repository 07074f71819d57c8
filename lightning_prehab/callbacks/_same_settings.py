"""All processes have to be given the same callbacks and settings: each does its part of one work."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed, nn

from lightning_prehab.callbacks._distributed import gather
from lightning_prehab.errors import ArgumentError

#: What Python adds to the names of functions and objects; it differs from process to process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
#: Of a callback its class and, by the name of the argument, its settings as text.
Told = tuple[str, dict[str, str]]


def check_same_settings(trainer: "pl.Trainer", settings: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises on all processes if one of them was given other callbacks of ours, or other settings, than the first.

    One small message; every process has to call it.

    Args:
        trainer: Of the run.
        settings: Of each callback, in order: its class, and its settings by the name of the argument.

    Raises:
        ArgumentError: It names the callback, the setting, and what it is where.
    """
    if trainer.world_size == 1 or not distributed.is_initialized():  # else the strategy is refused next
        return
    own: list[Told] = [(who, {name: as_text(value) for name, value in mine.items()}) for who, mine in settings]
    first, *others = gather(trainer, own)
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
        return f"Rank 0 was given {callbacks}, in this order, and rank {rank} {theirs or 'none of them'}"
    for (who, mine), (_, its) in zip(first, other, strict=True):
        for name in sorted(mine.keys() | its.keys()):
            if mine.get(name) != its.get(name):
                return f"{who}: {name} is {mine.get(name)} on rank 0 and {its.get(name)} on rank {rank}"
    return None


def as_text(value: object) -> str:
    """A setting as text, which is the same in all processes that have been given the same.

    >>> as_text({"b", "a"}), as_text(print), as_text([0.5, None])
    ("{'a', 'b'}", '<built-in function print>', '[0.5, None]')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{as_text(key)}: {as_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, set | frozenset):  # strings come in another order in each process
        return "{" + ", ".join(sorted(map(as_text, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_text, value)) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        held = ", ".join(f"{one.name}={as_text(getattr(value, one.name, None))}" for one in fields(value))
        return f"{type(value).__name__}({held})"
    if isinstance(value, torch.Tensor | nn.Module):
        return type(value).__name__  # not looked into
    return _ADDRESS.sub("", repr(value))
