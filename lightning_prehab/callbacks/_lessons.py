"""How the distance to the teacher gets into a step: with its loss, or into the gradients that come by its answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prehab.callbacks._injection import add_to_loss_
from lightning_prehab.distillation.comparison import Comparison
from lightning_prehab.distillation.replay import Pair
from lightning_prehab.linalg.modes import in_full_precision


class Lessons:
    """Compares answers of the model with those of the teacher, and has the model learn from it.

    Args:
        comparison: How.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.forget()

    def forget(self) -> None:
        """No gradient is waited for any more."""
        self._waiting = self._reached = False

    @property
    def in_vain(self) -> bool:
        """Whether gradients have been waited for, and none has come by."""
        return self._waiting and not self._reached

    def add_to_loss_(
        self, loss: Tensor, pairs: Sequence[Pair], batch: Any, scale: float | Tensor, task: float
    ) -> Tensor:
        """The mean distance goes into the loss itself, in place.

        Args:
            loss: What is about to be backpropagated.
            pairs: The answers.
            batch: Of the step; masks and labels may be in it.
            scale: Factor of the distance.
            task: Factor of the loss.

        Returns:
            The distance, a scalar without graph.
        """
        values = [in_full_precision(self.comparison.value)(*self._decided(pair, batch)) for pair in pairs]
        value = torch.stack(values).mean()
        if task != 1.0:
            loss.mul_(task)
        add_to_loss_(loss, value, scale)
        return value.detach()

    def add_to_gradients(self, pairs: Sequence[Pair], batch: Any, scale: float | Tensor) -> Tensor:
        """Hooks on the answers add the gradient of the mean distance to what comes by; as of :meth:`add_to_loss_`."""
        values = []
        for pair in pairs:
            value, addend = self.comparison.gradient(*self._decided(pair, batch), scale / len(pairs))
            values.append(value)
            self._add_once(pair.answer, addend)
        self._waiting = True
        return torch.stack(values).mean()

    @torch.no_grad()
    def try_out(self, pairs: Sequence[Pair], batch: Any) -> None:
        """Compares, and forgets what it has found out: raises what would be raised later."""
        trial = Comparison(self.comparison.temperature, self.comparison.relative)
        for pair in pairs:
            asked = [*pair.asked, batch]
            trial.decide(pair.module, pair.output, asked)
            in_full_precision(trial.value)(pair.answer, pair.right, asked)

    def _decided(self, pair: Pair, batch: Any) -> tuple[Tensor, Tensor, list[Any]]:
        asked = [*pair.asked, batch]
        self.comparison.decide(pair.module, pair.output, asked)
        return pair.answer, pair.right, asked

    def _add_once(self, answer: Tensor, addend: Tensor) -> None:
        """Adds to the gradient of an answer, the first time that it comes by."""

        def add(gradient: Tensor) -> Tensor:
            handle.remove()
            self._reached = True
            return gradient + addend.to(gradient.dtype)

        handle = each_time(answer, add)


def each_time(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Changes the gradient of a tensor whenever it comes by."""
    handle: RemovableHandle = tensor.register_hook(change)  # type: ignore[no-untyped-call]
    return handle
