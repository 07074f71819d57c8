"""The rows that are held back, asked again and again: the teacher answers once, where its answers can be kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.errors import StatisticsError
from lightning_prehab.refinement.memory import free_memory
from lightning_prehab.refinement.pair import Pair
from lightning_prehab.statistics.effect import same_randomness

#: Share of the free memory that answers of the teacher may take.
ROOM = 0.1


class Exam:
    """How far the model of a pair is from its teacher on some batches.

    Both start from the same random state at a batch, and each time from the same one.

    Args:
        pair: Both.
        batches: What they are asked, the same each time; at least one.
    """

    def __init__(self, pair: Pair, batches: Sequence[Any]) -> None:
        self._pair, self._batches = pair, batches
        self._known: dict[int, list[Tensor]] = {}
        self._room: float | None = None

    def begin(self) -> None:
        """Asks the teacher the first question, as a whole: by its answer it is told what is compared."""
        self._right(0)

    @torch.no_grad()
    def distance(self) -> float:
        """The mean over all predictions.

        Raises:
            StatisticsError: If there are none, or the teacher answers with zeros alone where squares are compared.
        """
        found = []
        for number, batch in enumerate(self._batches):
            right = self._right(number)
            with same_randomness(self._pair.device, number):
                found.append(self._pair.distance(batch, right))
        total, weight = (sum(float(one[place]) for one in found) for place in range(2))
        if weight == 0.0:
            raise StatisticsError(
                "There is nothing to measure on in the rows that are held back: attention_mask or labels leave out "
                "every position of them, or the dense model answers with zeros alone."
            )
        return max(total, 0.0) / weight  # of equal answers rounding is left

    def _right(self, number: int) -> list[Tensor]:
        if number in self._known:
            return self._known[number]
        if self._room is None:
            self._room = ROOM * (free_memory(self._pair.device) or 0)
        with same_randomness(self._pair.device, number):
            answers = self._pair.right(self._batches[number])
        size = sum(answer.numel() * answer.element_size() for answer in answers)
        if size <= self._room and all(answer.layout is torch.strided for answer in answers):
            self._room -= size
            self._known[number] = [answer.clone() for answer in answers]  # the teacher may write over its own
        return answers
