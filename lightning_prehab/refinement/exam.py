"""The rows that are held back, asked again and again: the teacher answers once, where its answers can be kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.refinement.memory import free_memory
from lightning_prehab.refinement.pair import Pair

#: Share of the free memory that answers of the teacher may take.
ROOM = 0.1


class Exam:
    """How far the model of a pair is from its teacher on some batches.

    Args:
        pair: Both.
        batches: What they are asked, the same each time.
    """

    def __init__(self, pair: Pair, batches: Sequence[Any]) -> None:
        self._pair, self._batches = pair, batches
        self._known: dict[int, Tensor] = {}
        self._room: float | None = None

    @torch.no_grad()
    def distance(self) -> float:
        """The mean over all predictions."""
        if self._room is None:
            self._room = ROOM * (free_memory(self._pair.device) or 0)
        found = [self._pair.distance(batch, self._right(number)) for number, batch in enumerate(self._batches)]
        total = sum(float(one.total) for one in found)
        return max(total, 0.0) / max(sum(one.weight for one in found), 1e-30)  # of equal answers rounding is left

    def _right(self, number: int) -> Tensor:
        if number in self._known:
            return self._known[number]
        answer = self._pair.right(self._batches[number])
        size = answer.untyped_storage().nbytes()
        if self._room is not None and size <= self._room:
            self._room -= size
            self._known[number] = answer
        return answer
