"""What optimizers do, whoever makes them do it: Lightning, the module by hand, or an optimizer around another.

Lightning announces the steps that it makes itself (``on_before_optimizer_step``, ``global_step``). Nobody announces
``self.optimizers().optimizer.step()``, nor the ``second_step`` of a SAM that steps an optimizer inside of it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.surgery.wrapped import family

#: Entries of each parameter that tell whether it has moved.
_SAMPLE = 8


class StepWatch:
    """Sees each step of one optimizer of the Trainer, and of those that it holds.

    A step inside of a step is no step of its own. An optimizer class that calls ``super().step()`` runs the hooks
    twice, nested; the inner ones enclose the update. A step that fails and is caught leaves no trace.

    Args:
        optimizer: One of ``trainer.optimizers``.
        before: Called with the optimizer that is about to step; ``announced`` and ``prepared`` say what is known of it.
        after: Called after a step with what was watched.

    Attributes:
        steps: Steps seen so far.
        announced: Lightning has announced the step that comes, with ``on_before_optimizer_step``; or it may do so
            within the step, which has a closure.
        prepared: For whoever wants to do something once before each step; False again after it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[["StepWatch", Optimizer], None],
        after: Callable[["StepWatch"], None],
    ) -> None:
        self.optimizer = optimizer
        self.family = list(dict.fromkeys((optimizer, *family(optimizer))))
        self.steps = 0
        self._before, self._after = before, after
        self._samples = [
            (weakref.ref(parameter), _sample(parameter)) for parameter in self.parameters() if parameter.requires_grad
        ]
        self._handles: list[RemovableHandle] = []
        for member in self.family:
            with suppress(AttributeError):  # no torch optimizer, or one that never was set up as one
                self._handles.append(member.register_step_pre_hook(self._before_step))
                self._handles.append(member.register_step_post_hook(self._after_step))
        self.forget()

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._outer or self._inner

    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups of the optimizer and of those inside; groups that they share come once."""
        seen: set[int] = set()
        for member in self.family:
            for group in member.param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group

    def parameters(self) -> Iterator[Tensor]:
        """What it steps."""
        for group in self.groups():
            yield from group["params"]

    def forget(self) -> None:
        """A new batch begins: whatever was under way has failed."""
        self._outer = self._inner = self.announced = self.prepared = False

    def announce(self) -> None:
        """Lightning is about to make a step; of an optimizer that takes no hooks, that is all that can be known."""
        self.announced = True
        if not self._handles:
            self._count()

    def moved_unseen(self) -> list[Tensor]:
        """The parameters that have changed, while no step has been seen."""
        pairs = ((reference(), sample) for reference, sample in self._samples)
        return [found for found, sample in pairs if found is not None and not torch.equal(_sample(found), sample)]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is self.optimizer:
            self._outer = True
        else:
            self._inner = True
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args begin with the optimizer
        if closure is None:
            self._before(self, optimizer)
        else:
            announced, self.announced = self.announced, True
            self._before(self, optimizer)
            self.announced = announced

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        inside = optimizer is not self.optimizer
        if (inside and self._outer) or not self.in_step:
            return
        self._outer = self._inner = False
        self._count()

    def _count(self) -> None:
        self.steps += 1
        self._samples = []
        self._after(self)
        self.announced = self.prepared = False


class WeightSteps:
    """Whether a batch has stepped certain weights, and at which learning rates.

    Args:
        optimizers: Those of the Trainer.
        manual: Optimization is manual: what changes a weight while no step was ever seen is taken for one.
        before: Called with an optimizer before a step that Lightning does not announce.
        after: Called after each step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        manual: bool,
        before: Callable[[Optimizer], None],
        after: Callable[[], None],
    ) -> None:
        self.watches = [StepWatch(optimizer, self._before, self._after) for optimizer in optimizers]
        self.rates: dict[int, float | Tensor] = {}  # of each weight's last step
        self._manual, self._on_before, self._on_after = manual, before, after
        self._now: set[int] = set()  # the weights of this batch's steps
        self._versions: dict[int, int] = {}  # of the weights when the batch began, while no step was ever seen
        self._unseen = False  # steps are told by the versions of the weights alone

    def optimizers(self) -> Iterator[Optimizer]:
        """All of them, and those inside of others."""
        for watch in self.watches:
            yield from watch.family

    def announce(self, optimizer: Optimizer) -> None:
        """Lightning is about to make a step."""
        for watch in self.watches:
            if watch.optimizer is optimizer:
                watch.announce()

    def begin_batch(self, weights: Sequence[Tensor]) -> None:
        """Looks at the weights before a batch."""
        for watch in self.watches:
            watch.forget()
        self._now = set()
        blind = self._manual and not any(watch.steps for watch in self.watches)
        self._versions = {id(weight): _version(weight) for weight in weights if blind}

    def end_batch(self, weights: Sequence[Tensor]) -> bool:
        """Whether one of the weights was stepped since the batch began."""
        if any(id(weight) in self._now for weight in weights):
            return True
        seen = any(watch.steps for watch in self.watches)
        if seen or all(self._versions.get(id(weight), _version(weight)) == _version(weight) for weight in weights):
            return False
        self._unseen = True
        for watch in self.watches:
            self._note(watch)
        return True

    def check_seen(self, who: pl.Callback) -> None:
        """Raises :class:`UnsupportedError` if weights move and no step was ever seen."""
        if not self._unseen:
            check_seen(self.watches, who)

    def remove(self) -> None:
        """Takes the hooks off."""
        for watch in self.watches:
            watch.remove()

    def _before(self, watch: StepWatch, optimizer: Optimizer) -> None:
        if not watch.announced and not watch.prepared:
            watch.prepared = True
            self._on_before(optimizer)

    def _after(self, watch: StepWatch) -> None:
        self._now.update(id(parameter) for parameter in watch.parameters())
        self._note(watch)
        self._on_after()

    def _note(self, watch: StepWatch) -> None:
        for group in watch.groups():
            rate = group.get("lr", 0.0)
            rate = rate.clone() if isinstance(rate, Tensor) else rate  # it is read only where it is needed
            self.rates.update((id(parameter), rate) for parameter in group["params"])


def are_of_now(watches: Sequence[StepWatch], optimizers: Sequence[Optimizer]) -> bool:
    """Whether these optimizers are watched, and not others that they have taken the place of."""
    pairs = zip_longest((watch.optimizer for watch in watches), optimizers)
    return all(watched is optimizer for watched, optimizer in pairs)


def check_seen(watches: Sequence[StepWatch], who: pl.Callback) -> None:
    """Raises :class:`UnsupportedError` if parameters have moved while no step of any optimizer was seen.

    Where one steps, another one may begin later, and its weights be clipped until then.
    """
    for watch in () if any(watch.steps for watch in watches) else watches:
        if watch.moved_unseen():
            name = type(who).__name__
            raise UnsupportedError(
                f"{name} acts at the steps of {type(watch.optimizer).__name__}, but has seen none in a whole epoch, "
                "though its parameters have moved: they are changed by other means than the step() of a torch "
                f"optimizer. Call step() of the optimizer, or keep one inside of it that makes the steps; or leave "
                f"{name} out."
            )


def _sample(parameter: Tensor) -> Tensor:
    return local_part(parameter).reshape(-1)[:_SAMPLE].clone()


def _version(weight: Tensor) -> int:
    """Counts the changes in place; those of a sharded tensor are made in what this process has of it."""
    return local_part(weight)._version
