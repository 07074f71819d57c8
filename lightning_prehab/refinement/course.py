"""A course of training that ends with the best state that was measured, or with the first one."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.progress import counted, tell

#: Share of the steps in which the learning rate rises, and what is left of it at the end.
WARM_UP, LAST = 0.1, 0.1
#: Largest norm of all gradients together.
CLIP = 1.0
#: Measurements of a whole course, at most.
MEASUREMENTS = 8
NOT_FINITE = "the measure was not finite before the first step"


class Outcome(NamedTuple):
    """What a course has come to.

    Attributes:
        before: What was measured before the first step.
        after: Of the state that was kept.
        steps: That were made.
        kept: Whether a later state than the first was kept.
        stopped: Why it ended early, or None.
    """

    before: float
    after: float
    steps: int
    kept: bool
    stopped: str | None


@dataclass
class Course:
    """Training with AdamW: warm-up, cosine, clipping, and measuring.

    Args:
        parameters: What is trained.
        steps: At most.
        lr: The largest learning rate, or what says it by the measure before the first step.
        patience: Measurements without a new best after which it ends.
    """

    parameters: Sequence[nn.Parameter]
    steps: int
    lr: float | Callable[[float], float]
    patience: int

    def run(
        self,
        numbers: Iterable[int],
        loss_of: Callable[[int], Tensor],
        measure: Callable[[], float],
        start: Callable[[], None] = lambda: None,
        better: Callable[[], None] = lambda: None,
        phase: str | None = "refine",
    ) -> Outcome:
        """Trains; afterwards the parameters are the best that were measured, bit by bit the first ones if none were.

        Args:
            numbers: Of what each step takes.
            loss_of: The loss of it, with its graph.
            measure: How good the present state is; lower is better.
            start: Called between the first measurement and the first step; it may change the parameters, not what they
                stand for.
            better: Called whenever a state is measured to be better than all before.
            phase: Of the progress that is told; None tells nothing.

        Returns:
            What came of it. Whatever is raised on the way (an interruption too) leaves the best state so far.
        """
        if phase is not None:
            tell(phase, 0, self.steps)
        best, before = self._state(), measure()
        value, done, without, stopped = before, 0, 0, None
        if not math.isfinite(before):
            return Outcome(before, before, 0, False, NOT_FINITE)
        lr = self.lr(before) if callable(self.lr) else self.lr
        optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        every = math.ceil(self.steps / MEASUREMENTS)
        steps = list(numbers)
        try:
            start()
            for number in steps if phase is None else counted(steps, phase):
                if not self._step(optimizer, loss_of(number), lr * share_of_rate(done, self.steps)):
                    stopped = f"step {done + 1} was not finite"
                    break
                done += 1
                if done % every and done < self.steps:
                    continue
                found = measure()
                if found < value:
                    best, value, without = self._state(), found, 0
                    better()
                else:
                    without += 1
                if not math.isfinite(found):
                    stopped = f"the measure was not finite after step {done}"
                elif without >= self.patience and done < self.steps:
                    stopped = f"no better in {without} measurements"
                if stopped:
                    break
        finally:
            self._restore_(best)
            for parameter in self.parameters:
                parameter.grad = None
        return Outcome(before, value, done, value < before, stopped)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> bool:
        """One step; False, without it, if something is not finite."""
        if not bool(torch.isfinite(loss.detach())):
            return False
        in_full_precision(loss.backward)()
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP)
        if not bool(torch.isfinite(norm)):
            return False
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return True

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _restore_(self, state: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)


def share_of_rate(done: int, steps: int) -> float:
    """The learning rate of the next step, as a share of the largest one.

    >>> [round(share_of_rate(done, 20), 2) for done in (0, 1, 2, 10, 19)]
    [0.5, 1.0, 1.0, 0.63, 0.11]
    """
    rising = max(round(WARM_UP * steps), 1)
    if done < rising:
        return (done + 1) / rising
    passed = (done - rising) / max(steps - rising, 1)
    return LAST + (1.0 - LAST) * (1.0 + math.cos(math.pi * passed)) / 2
