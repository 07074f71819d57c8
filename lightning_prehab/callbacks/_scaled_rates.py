"""The learning rates of an optimizer, multiplied while it steps and while other callbacks look, and then given back."""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_prehab.callbacks._steps import StepWatch
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError


class ScaledRates:
    """The learning rates of one optimizer of the Trainer, times a factor.

    Args:
        optimizer: The one.
        factor: Called for the factor of now.
        stepped: Called after each step.
        of_groups: ``{name of a group, pattern or number: factor}`` on top of that, once there is one.
        first: Number of its first group among those of all optimizers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Callable[[], float | None],
        stepped: Callable[[], None],
        of_groups: Mapping[int | str, float],
        first: int,
    ) -> None:
        self.optimizer = optimizer
        self._factor, self._stepped = factor, stepped
        self._own: dict[int, tuple[float, float]] = {}  # by group: the user's rate and ours, while ours is in place
        self.watch = StepWatch(optimizer, self._before_step, self._after_step)
        self._of_groups, self._first = of_groups, first

    def apply(self) -> None:
        """Multiplies the rates, once; a rate that was changed since is the user's new one and is multiplied anew."""
        common = self._factor()
        if common is None:
            return
        for number, group in self._groups():
            factor = common * _factor_of(group, number, self._of_groups)
            slot, rate = id(group), float(group["lr"])
            if factor != 1.0 and (slot not in self._own or rate != self._own[slot][1]):
                _set_rate(group, rate * factor)
                self._own[slot] = rate, float(group["lr"])

    def restore(self) -> None:
        """Puts the user's rates back, except where the user has set another one in the meantime."""
        for _, group in self._groups():
            own = self._own.get(id(group))
            if own is not None and float(group["lr"]) == own[1]:
                _set_rate(group, own[0])
        self._own = {}

    def remove(self) -> None:
        """Puts the user's rates back and takes the hooks off."""
        self.restore()
        self.watch.remove()

    def _groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Groups that have a rate, with their numbers; one that optimizers share, or a tensor of a rate, comes once."""
        seen: set[int] = set()
        for member in self.watch.family:
            for number, group in enumerate(member.param_groups, self._first):
                shared = {id(group), *([id(group["lr"])] if isinstance(group.get("lr"), Tensor) else [])}
                if "lr" in group and not shared & seen:
                    yield number, group
                seen |= shared

    def _before_step(self, *_: Any) -> None:
        self.apply()

    def _after_step(self, *_: Any) -> None:
        self.restore()
        self._stepped()


class RestoreRates(pl.Callback):
    """Stands last in the Trainer: whatever follows the callbacks (the module's own hooks) sees the user's rates."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """After LearningRateMonitor."""
        self._restore()

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """After LearningRateMonitor."""
        self._restore()


def check_groups(optimizers: list[Optimizer], of_groups: Mapping[int | str, float]) -> None:
    """Raises :class:`ArgumentError` for what names no group, and for groups that share what is to differ."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for key in of_groups:
        if not any(_names(key, group, number) for number, group in enumerate(groups)):
            there = [f"{n} ({show(group['name'])})" if "name" in group else str(n) for n, group in enumerate(groups)]
            raise ArgumentError(
                f"group_factors: no parameter group is {show(key)}; the groups are {', '.join(there)}. They are told "
                "by their number, or by what they have as 'name'."
            )
    factors: dict[int, float] = {}
    for number, group in enumerate(groups):
        own = _factor_of(group, number, of_groups)
        if isinstance(group.get("lr"), Tensor) and factors.setdefault(id(group["lr"]), own) != own:
            raise ArgumentError(
                f"group_factors: parameter group {number} shares the tensor of its learning rate with another one, "
                "which has another factor. Give each group a tensor of its own."
            )


def _factor_of(group: Mapping[str, Any], number: int, of_groups: Mapping[int | str, float]) -> float:
    """Of the last key that names the group."""
    return next((factor for key, factor in reversed(list(of_groups.items())) if _names(key, group, number)), 1.0)


def _names(key: int | str, group: Mapping[str, Any], number: int) -> bool:
    return key == number if isinstance(key, int) else "name" in group and fnmatchcase(str(group["name"]), key)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
