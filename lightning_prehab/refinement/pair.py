"""A model and the dense one that it learns from, asked the same."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.errors import ArgumentError, PrehabError, UnsupportedError
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.refinement.distance import Distance, answers_in, distance_of_all, measure_for
from lightning_prehab.refinement.stand_ins import StandIns
from lightning_prehab.refinement.trained import is_short, trainable
from lightning_prehab.statistics.batches import as_predicted, call_model, explained, has_decoder, tensors, to_device
from lightning_prehab.statistics.running import copied

_WAY_OUT = "both forms of the model are called on the batches alone, without loss="


class Pair:
    """A model and its teacher.

    Args:
        model: What is trained; its outputs have to be those of the teacher in form.
        teacher: What counts as right.
        half: Compute in bfloat16 where autocast does so.
        measure: See :class:`~lightning_prehab.Refinement`.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, half: bool, measure: str | None = None) -> None:
        self.model, self.teacher, self.half, self.measure = model, teacher, half, measure
        self.device = next(model.parameters()).device
        self.stand_ins = StandIns(model)
        self._short = all(map(is_short, _floats(model)))
        self._lifted = False

    @contextmanager
    def training(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, the model is ready to be trained: see :func:`~lightning_prehab.refinement.trained.trainable`."""
        self._lifted = any(map(is_short, _floats(self.model)))
        try:
            with trainable(self.model, parameters), self.stand_ins.in_place():
                yield
        finally:
            self._lifted = False

    @torch.no_grad()
    def right(self, batch: Any) -> list[Tensor]:
        """The teacher's answers to a batch.

        Raises:
            ArgumentError: If they are no predictions of several classes, and are to be compared as such.
        """
        output = self.ask(self.teacher, batch)
        found = [answer.detach().to(self.device) for answer in answers_in(output)]
        if self.measure is None:
            self.measure = measure_for(self.teacher, output, batch)
        if self.measure == "divergence" and (found[0].dim() < 2 or found[0].shape[-1] < 2):
            raise ArgumentError(
                f"measure='divergence' compares predictions of two classes and more, and the answer has shape "
                f"{tuple(found[0].shape)}; take measure='squared'."
            )
        return found

    def distance(self, batch: Any, right: Sequence[Tensor] | None = None) -> Distance:
        """How far the model's answers are from the teacher's, with their graph if gradients are on.

        Args:
            batch: What is asked.
            right: The teacher's answers, if they are known.
        """
        if right is None:
            right = self.right(batch)
        assert self.measure is not None
        found = [answer.to(self.device) for answer in answers_in(self.ask(self.model, batch))]
        return in_full_precision(distance_of_all)(
            self.measure, found, right, as_predicted(batch, has_decoder(self.teacher))
        )

    def ask(self, module: nn.Module, batch: Any) -> Any:
        """What the model or the teacher, whichever is given, answers to a copy of a batch.

        Raises:
            ArgumentError: If it does not take it.
        """
        dense = module is self.teacher
        device = next((one.device for one in module.parameters()), self.device)
        given = to_device(copied(batch), device)
        for one in tensors(given):
            if self._lifted and module is self.model and is_short(one):  # as its weights were
                one.data = one.data.float()
        with explained(batch, "The dense model" if dense else "The cut model", _WAY_OUT):
            return self.precisely(lambda: call_model(module, given), device, dense)

    def precisely(self, work: Callable[[], Any], device: torch.device, dense: bool) -> Any:
        """What work of the model or the teacher gives in the precision of this pair, whatever autocast is on around it.

        What is in half precision all through answers as it is.
        """
        if not self.half or (self._short and (dense or not self._lifted)):
            return in_full_precision(work)()
        try:
            # no cache of casts: inside the user's own autocast it would outlive a step
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                return work()
        except RuntimeError as error:
            if isinstance(error, PrehabError) or not any(word in str(error) for word in ("BFloat16", "dtype")):
                raise
            raise UnsupportedError(
                f"The model does not compute in bfloat16 ({error}); take Refinement(precision='full')."
            ) from error


def _floats(model: nn.Module) -> list[nn.Parameter]:
    return [one for one in model.parameters() if one.is_floating_point()]
