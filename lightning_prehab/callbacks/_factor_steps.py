"""What FactorTraining does at the steps of one optimizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prehab.callbacks._steps import StepWatch
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.layers.pairs import FactorPair
from lightning_prehab.linalg.sharding import local_part
from lightning_prehab.surgery.rescaling import rebalance_
from lightning_prehab.surgery.step_groups import Apart, StepGroups

#: What a step starts from in the place of the parameter: schedule-free optimizers, MADGRAD, those for half precision.
_HIDDEN = ("z", "x0", "master_param")
#: Where the decay of the product acts.
DecayForm = Literal["decoupled", "gradient"]


@dataclass(frozen=True)
class FactorSettings:
    """What is wished for; see :class:`~lightning_prehab.FactorTraining`."""

    product_decay: float | None
    decay_form: DecayForm
    rebalance_every: int | None
    rate_A: float
    rate_B: float
    alternate: int | None


class FactorSteps:
    """Acts before and after each step of an optimizer that holds factors.

    Gradients are changed when they are complete and before they are clipped: where Lightning announces the step, else
    when it begins. The groups are divided for the arithmetic of the step alone.

    Args:
        settings: What to do.
        optimizer: One of the Trainer.
        optimizers: All of them, and those inside: any may know something of a factor.
        pairs: The factors of the model.
        steps: How many steps it has made since the cut.
    """

    def __init__(
        self,
        settings: FactorSettings,
        optimizer: Optimizer,
        optimizers: Sequence[Optimizer],
        pairs: Sequence[FactorPair],
        steps: int,
    ) -> None:
        self.steps = steps
        self.watch = StepWatch(optimizer, self._before, self._after)
        self._settings, self._optimizers = settings, optimizers
        held = {id(parameter) for parameter in self.watch.parameters()}
        self._pairs = [pair for pair in pairs if any(id(one) in held for one in pair.both)]
        self._mine = {id(one) for pair in self._pairs for one in pair.both if id(one) in held}
        self._groups = StepGroups(self.watch.family)
        self._scale: float | Tensor = 1.0
        self._prepared = self._opened = self._skipped = False
        self._said = False

    def announce(self, scale: float | Tensor) -> None:
        """Lightning is about to make a step, or makes it: gradients are there.

        Args:
            scale: The factor of loss scaling that the gradients still have.
        """
        self.watch.announce()
        self._scale = scale
        self._prepare()
        if self.watch.in_step:
            self._open()

    def forget(self) -> None:
        """Nothing is under way; a step that has failed leaves nothing behind."""
        self.watch.forget()
        self._scale = 1.0
        self._prepared = self._opened = self._skipped = False
        self._groups.close()

    def remove(self) -> None:
        """Takes the hooks off."""
        self.forget()
        self.watch.remove()

    def _before(self, watch: StepWatch, optimizer: Optimizer) -> None:
        if not self._prepared and watch.announced:
            return  # it has a closure, within which it is announced
        if not self._prepared:
            self._prepare()
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer is called, and skips the step itself
        self._skipped = found is not None and bool(found)
        self._open()

    def _prepare(self) -> None:
        """Changes the gradients."""
        self._prepared = True
        for parameter in self._idle():
            parameter.grad = None  # no step, no decay, no moment; and clipping does not count it
        decay = self._settings.product_decay
        if not decay or self._settings.decay_form != "gradient":
            return
        for parameter, gradient in self._decays():
            assert parameter.grad is not None
            local_part(parameter.grad).add_(gradient.to(parameter.grad.dtype) * decay * self._scale)

    def _open(self) -> None:
        """Divides the groups, and decays the product as an optimizer decays weights: before it updates them."""
        if self._opened:
            self._groups.follow_rates()
            return
        self._opened = True
        settings, decays = self._settings, self._settings.product_decay is None
        wishes = {}
        for pair in self._pairs:
            for parameter, rate in zip(pair.both, (settings.rate_A, settings.rate_B), strict=True):
                wishes[id(parameter)] = Apart(rate, decays)
        self._groups.open(wishes)
        if not settings.product_decay or settings.decay_form != "decoupled" or self._skipped:
            return
        rates = self._groups.rates()
        with torch.no_grad():
            for parameter, gradient in self._decays():
                self._check_own(parameter)
                decay = rates[id(parameter)] * settings.product_decay * gradient
                local_part(parameter).sub_(decay.to(parameter.dtype))

    def _check_own(self, parameter: Tensor) -> None:
        """Raises :class:`UnsupportedError` if a step makes the parameter of something else than its last value."""
        for optimizer in self.watch.family:
            hidden = set(optimizer.state.get(parameter, {})).intersection(_HIDDEN)
            if hidden:
                raise UnsupportedError(
                    f"{type(optimizer).__name__} keeps other values of a factor in its state ({hidden.pop()!r}), which "
                    "a decoupled decay does not reach. Use FactorTraining(decay_form='gradient')."
                )

    def _decays(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The factors that are about to be stepped, with the gradient of half the squared size of the product.

        Both gradients of a pair are those of before it is changed; those of one pair are there at a time.
        """
        for pair in self._pairs:
            for parameter, gradient in zip(pair.both, pair.size_gradients(), strict=True):
                if parameter.grad is not None and id(parameter) in self._mine:
                    yield parameter, gradient

    def _idle(self) -> list[nn.Parameter]:
        """The factors that have to wait: ``A`` while ``B`` is trained, then ``B``."""
        every = self._settings.alternate
        if every is None:
            return []
        waits = self.steps // every % 2
        return [pair.both[waits] for pair in self._pairs if id(pair.both[waits]) in self._mine]

    def _after(self, watch: StepWatch) -> None:
        opened, skipped = self._opened, self._skipped
        self._scale = 1.0
        self._prepared = self._opened = self._skipped = False
        self._groups.close()
        if self._pairs and not opened:
            raise UnsupportedError(
                f"FactorTraining has to act between the gradients and the step of {type(watch.optimizer).__name__}, "
                "which makes its gradients within a step that Lightning does not announce. Step it through "
                "self.optimizers(), or without a closure."
            )
        if skipped:
            return
        self.steps += 1
        every = self._settings.rebalance_every
        if every is not None and self.steps % every == 0:
            self._rebalance()

    def _rebalance(self) -> None:
        left = [
            pair.name
            for pair in self._pairs
            if pair.scalable and id(pair.B) in self._mine and not rebalance_(pair, self._optimizers)
        ]
        if left and not self._said:
            self._said = True
            rank_zero_info(
                f"FactorTraining leaves the sizes of the factors of {len(left)} layers as they are (first: "
                f"{left[0]!r}): what {type(self.watch.optimizer).__name__} knows of them cannot be carried."
            )


def settings_are_idle(settings: FactorSettings) -> bool:
    """Whether nothing is to be done at any step."""
    values: dict[str, Any] = {"rate_A": 1.0, "rate_B": 1.0, "decay_form": settings.decay_form}
    return all(getattr(settings, name) == values.get(name) for name in settings.__dataclass_fields__)
